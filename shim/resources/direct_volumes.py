"""Direct-assigned volumes: a bind mount that stands for a disk which the guest itself mounts.

What: `find` tells which of a container's volumes are assigned directly, `DirectVolumes` plugs their disks
and has the agent mount them where the container's spec then binds them from.
Why: a file system on a disk is faster in the guest than shared from the host, and only one kernel may
have it mounted.
Invariants: a disk that is mounted on the host is refused; one disk is plugged once per VM, however many
containers use it; what `add` plugged is among the container's holdings. A volume never shrinks.
Source: Kata's direct-assigned-volume design: the storage driver (or an administrator) leaves
`<DIRECTORY>/<base64url of the volume's path>/mountInfo.json`.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from devices.beneath import open_named, reopen
from devices.config import DeviceConfig
from devices.device import ChangingHost
from devices.errors import CallerError, HostError
from devices.holdings import Holdings
from devices.manager import AgentDevice, DeviceManager
from devices.small_file import read_small
from devices.strict_json import parse
from devices.threads import acquire
from devices.undo import Entry, UndoLog
from proto import agent_pb2, csi_pb2, types_pb2
from shim.resources.disks import DiskStyle
from shim.spec.guest_spec import Volume
from shim.spec.oci_types import ID, PATH, TEXT
from shim.spec.shape import ListOf, MapOf, Table, fit

__all__ = [
    "DIRECTORY",
    "MOUNT_INFO",
    "Assigned",
    "DirectVolumes",
    "VolumeAgent",
    "check",
    "find",
    "rewrite",
    "volume_directory",
]

DIRECTORY = "/run/kata-containers/shared/direct-volumes"
MOUNT_INFO = "mountInfo.json"
_GUEST = "/run/kata-containers/sandbox/storage"
_KINDS = ("block", "directvol", "spdkvol")  # Kata's Go runtime and its Rust one; its disks of SPDK
_SCHEME = "spdk://"
_INFO = Table(
    {
        "volume-type": TEXT,
        "device": PATH,
        "fstype": TEXT,
        "options": ListOf(TEXT, 256),
        "metadata": MapOf(TEXT, 64),
    }
)
_MAX_INFO = 64 << 10  # bytes
_PHASE = "volumes"
_GROW = frozenset({"ext2", "ext3", "ext4", "xfs"})  # what the guest can grow while it is mounted
_MAX_SIZE = 1 << 60  # bytes


class VolumeAgent(Protocol):
    """What the guest is asked about volumes."""

    async def volume_stats(self, path: str) -> csi_pb2.VolumeStatsResponse: ...
    async def resize_volume(self, path: str, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Assigned:
    """One mount of the spec, its path on the host, and the disk behind it. `group`: whom the files shall
    belong to; -1: nobody. `create`: the guest makes the file system, if the disk is blank. `served`: `device`
    is the socket of a vhost-user back end."""

    index: int
    source: str
    device: str
    fstype: str
    options: tuple[str, ...]
    read_only: bool
    group: int = -1
    only_if_needed: bool = False
    create: bool = False
    served: bool = False

    @property
    def mount_point(self) -> str:
        """Where the guest mounts it: one place per disk and way of mounting."""
        key = f"{self.device}\0{self.fstype}\0{','.join(self.options)}"
        return f"{_GUEST}/{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def volume_directory(source: str, directory: str = DIRECTORY) -> str:
    """Where the storage driver says what this volume is."""
    return f"{directory}/{base64.urlsafe_b64encode(source.encode()).decode()}"


def find(volumes: Sequence[Volume], directory: str = DIRECTORY) -> dict[int, Assigned]:
    """The directly assigned ones of these volumes, by their index in the spec's mounts. Blocks.

    Raises HostError for a mountInfo.json that cannot be used, CallerError for a disk that must not be.
    """
    if not volumes or not os.path.isdir(directory):
        return {}
    found = {}
    for volume in volumes:
        path = f"{volume_directory(volume.source, directory)}/{MOUNT_INFO}"
        try:
            text = read_small(path, _MAX_INFO)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no such directory can exist
                continue
            raise HostError(f"cannot read {path}: {error.strerror}", phase=_PHASE) from error
        found[volume.index] = _assigned(volume, path, text)
    return found


def check(volumes: Sequence[Volume], directory: str = DIRECTORY) -> None:
    """Raise CallerError or HostError for the first disk among them that cannot be had. Blocks."""
    for volume in find(volumes, directory).values():
        if volume.served:
            continue
        from devices.in_use import probe

        probe(volume.device, read_only=volume.read_only)


def _assigned(volume: Volume, path: str, text: bytes) -> Assigned:
    try:
        info, _ = fit(_INFO, parse(text))
        missing = [key for key in ("volume-type", "device", "fstype") if key not in info]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        metadata = info.get("metadata", {})
        group = _group(metadata.get("fsGroup"))
    except ValueError as error:
        raise HostError(
            f"{path} is no mountInfo: {error}",
            phase=_PHASE,
            hint='it needs "volume-type", "device" and "fstype"',
        ) from error
    kind, device, fstype = info["volume-type"], info["device"], info["fstype"]
    options = tuple(info.get("options", ()))
    if kind not in _KINDS:
        raise CallerError(
            f"the volume {volume.source} is of type {kind[:40]!r}; supported: {', '.join(_KINDS)}",
            phase=_PHASE,
            code="UNIMPLEMENTED",
        )
    served = kind == "spdkvol"
    device = device.removeprefix(_SCHEME) if served else device
    _check_disk(device, path, served=served)
    read_only = volume.readonly or "ro" in options
    if read_only and "ro" not in options:
        options += ("ro",)
    policy = metadata.get("fsGroupChangePolicy") == "OnRootMismatch"
    create = metadata.get("create-filesystem") == "true" and not read_only
    return Assigned(
        volume.index, volume.source, device, fstype, options, read_only, group, policy, create, served
    )


def _group(text: str | None) -> int:
    """The id of a group, -1 for none. Raises ValueError: the agent's protocol could not say it, and what is
    beyond 32 bits would be another group's."""
    if text is None:
        return -1
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= ID.high):
        raise ValueError(f"metadata.fsGroup must be a number from 0 to {ID.high}")
    return int(text)


def _check_disk(device: str, path: str, *, served: bool) -> None:
    try:
        info = os.stat(device) if os.path.isabs(device) else None
    except OSError as error:
        raise HostError(
            f"{device}, named by {path}, cannot be used: {error.strerror}", phase=_PHASE
        ) from error
    if served:
        if info is None or not stat.S_ISSOCK(info.st_mode):
            raise HostError(f"{device[:200]!r}, named by {path}, is no socket", phase=_PHASE)
        return
    if info is None or not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
        raise HostError(f"{device[:200]!r}, named by {path}, is neither a disk nor an image", phase=_PHASE)


def rewrite(document: Mapping[str, Any], assigned: Mapping[int, Assigned]) -> None:
    """Have the guest's spec bind these from where the guest mounts them."""
    for index, volume in assigned.items():
        mount = document["mounts"][index]
        kept = [option for option in mount.get("options") or [] if option not in ("bind", "rbind")]
        mount.update(type="bind", source=volume.mount_point, options=["rbind", *kept])


@dataclass(slots=True)
class _Used:
    """A volume in use: its disk, who uses it, and the note of it in the volume's directory."""

    volume: Assigned
    disk: str
    note: Entry
    containers: set[str] = field(default_factory=set)


class DirectVolumes:
    """The plugged ones of one sandbox. `alias`: the name that Kata's tools find its socket by (see
    `shim.protocols.DaemonContext`). `directory`: see `find`."""

    def __init__(
        self,
        devices: DeviceManager,
        holdings: Holdings,
        undo: UndoLog,
        *,
        alias: str,
        style: DiskStyle,
        directory: str = DIRECTORY,
    ) -> None:
        self._devices = devices
        self._holdings = holdings
        self._undo = undo
        self._alias = alias
        self._style = style
        self._directory = directory
        self._used: dict[str, _Used] = {}  # by the volume's path

    async def add(self, container_id: str, assigned: Mapping[int, Assigned]) -> list[agent_pb2.Storage]:
        """Plug the disks; what the agent must mount. Raises KataError; releasing the container's holdings and
        `remove` undo what was done."""
        storages = []
        for volume in assigned.values():
            held = await self._holdings.take(container_id, await self.disk(volume))
            disk = await self._devices.generate_agent_device(held)
            used = self._used.get(volume.source)
            if used is None:
                used = self._used[volume.source] = _Used(volume, held, await self._note(volume))
            used.containers.add(container_id)
            storages.append(_storage(volume, disk))
        return storages

    async def disk(self, volume: Assigned) -> DeviceConfig:
        """What is plugged for it."""
        name = "v" + hashlib.sha256(volume.device.encode()).hexdigest()[:16]
        if volume.served:
            return self._style.served(name, volume.device)
        return await self._style.disk(name, volume.device, read_only=volume.read_only)

    async def _note(self, volume: Assigned) -> Entry:
        """Leave our name with the volume, as Kata does: by it `kata-ctl direct-volume` finds us."""
        path = f"{volume_directory(volume.source, self._directory)}/{self._alias}"

        def remove() -> None:
            with contextlib.suppress(OSError):
                os.unlink(path)

        entry = self._undo.record("file", remove, path=path)
        with contextlib.suppress(OSError):  # an administrator removes it as he likes
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        return entry

    async def remove(self, container_id: str = "") -> None:
        """The container's disks are let go of (with the holdings); of all containers if none is named."""
        for source, used in list(self._used.items()):
            used.containers = used.containers - {container_id} if container_id else set()
            if not used.containers:
                del self._used[source]
                await self._undo.release(used.note)

    def _find(self, name: str) -> _Used:
        """By the volume's path, or by its disk's. Raises CallerError NOT_FOUND."""
        used = self._used.get(name)
        if used is None:
            used = next((one for one in self._used.values() if one.volume.device == name), None)
        if used is None:
            raise CallerError(f"no volume {name[:200]!r} is in this sandbox", phase=_PHASE, code="NOT_FOUND")
        return used

    async def stats(self, name: str, agent: VolumeAgent) -> csi_pb2.VolumeStatsResponse:
        """How full it is, by the guest's account. Raises KataError."""
        return await agent.volume_stats(self._find(name).volume.mount_point)

    async def resize(self, name: str, size: int, agent: VolumeAgent, host: ChangingHost) -> None:
        """Have a volume of `size` bytes: an image grows here, a block device must have grown; then the disk,
        then the file system in the guest. Raises KataError; it can be tried again."""
        used = self._find(name)
        volume = used.volume
        why = ""
        if volume.read_only:
            why = "it is read-only"
        elif volume.served:
            why = "its back end decides its size"
        elif volume.fstype not in _GROW:
            why = f"{volume.fstype} cannot grow while it is mounted"
        elif not 0 < size <= _MAX_SIZE or size % 512:
            why = f"{size} bytes are no size for a disk"
        if why:
            raise CallerError(
                f"volume {volume.source} cannot be resized: {why}", phase=_PHASE, code="INVALID_ARGUMENT"
            )
        await acquire(_grow, volume.device, size)
        await self._devices.update_disk(used.disk, host)
        await agent.resize_volume(volume.mount_point, size)


def _grow(path: str, size: int) -> None:
    """Have at least `size` bytes behind the disk."""
    try:
        fd = _open_disk(path)
        try:
            present = os.lseek(fd, 0, os.SEEK_END)
            if size < present:
                raise CallerError(
                    f"{path} has {present} bytes; a volume does not shrink to {size}",
                    phase=_PHASE,
                    code="INVALID_ARGUMENT",
                )
            if size > present and not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CallerError(
                    f"the block device {path} has {present} bytes, not {size}",
                    phase=_PHASE,
                    hint="grow the device first",
                )
            if size > present:
                os.ftruncate(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"{path} cannot grow: {error.strerror}", phase=_PHASE) from error


def _open_disk(path: str) -> int:
    """For writing; what is neither disk nor image any more is not opened."""
    found = open_named(path)
    try:
        if not (stat.S_ISREG(mode := os.fstat(found).st_mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.ENODEV, "it is neither a disk nor an image")
        return reopen(found, os.O_RDWR)
    finally:
        os.close(found)


def _storage(volume: Assigned, disk: AgentDevice) -> agent_pb2.Storage:
    """What the agent is to mount. XFS refuses a second file system with the same id, and a clone has it."""
    options = list(volume.options)
    if volume.fstype == "xfs" and "nouuid" not in options:
        options.append("nouuid")
    storage = agent_pb2.Storage(
        driver=disk.type,
        source=disk.id,
        fstype=volume.fstype,
        options=options,
        mount_point=volume.mount_point,
    )
    if volume.create:
        storage.driver_options.append("create_filesystem")
    if volume.group >= 0:
        storage.fs_group.group_id = volume.group
        if volume.only_if_needed:
            storage.fs_group.group_change_policy = types_pb2.FSGroupChangePolicy.OnRootMismatch
    return storage
