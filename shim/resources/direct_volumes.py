"""Direct-assigned volumes: a bind mount that stands for a disk which the guest itself mounts.

What: `find` tells which of a container's volumes are assigned directly, `DirectVolumes` plugs their disks
and has the agent mount them where the container's spec then binds them from.
Why: a file system on a disk is faster in the guest than shared from the host, and only one kernel may
have it mounted.
Invariants: a disk that is mounted on the host is refused; one disk is plugged once per VM, however many
containers use it; what `add` plugged is among the container's holdings.
Source: Kata's direct-assigned-volume design: the storage driver (or an administrator) leaves
`<DIRECTORY>/<base64url of the volume's path>/mountInfo.json`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.errors import CallerError, HostError
from devices.holdings import Holdings
from devices.manager import DeviceManager
from proto import agent_pb2, types_pb2
from shim.guest_spec import Volume
from shim.resources.disks import DiskStyle

__all__ = ["DIRECTORY", "Assigned", "DirectVolumes", "check", "find", "rewrite"]

DIRECTORY = "/run/kata-containers/shared/direct-volumes"
_GUEST = "/run/kata-containers/sandbox/storage"
_KINDS = ("block", "directvol")  # Kata's Go runtime and its Rust one
_MAX_INFO = 64 << 10  # bytes
_PHASE = "volumes"


@dataclass(frozen=True, slots=True)
class Assigned:
    """One mount of the spec and the disk behind it. `group`: whom the files shall belong to; -1: nobody."""

    index: int
    device: str
    fstype: str
    options: tuple[str, ...]
    read_only: bool
    group: int = -1
    only_if_needed: bool = False

    @property
    def mount_point(self) -> str:
        """Where the guest mounts it: one place per disk and way of mounting."""
        key = f"{self.device}\0{self.fstype}\0{','.join(self.options)}"
        return f"{_GUEST}/{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def find(volumes: Sequence[Volume], directory: str = DIRECTORY) -> dict[int, Assigned]:
    """The directly assigned ones of these volumes, by their index in the spec's mounts. Blocks.

    Raises HostError for a mountInfo.json that cannot be used, CallerError for a disk that must not be.
    """
    if not volumes or not os.path.isdir(directory):
        return {}
    found = {}
    for volume in volumes:
        name = base64.urlsafe_b64encode(volume.source.encode()).decode()
        path = f"{directory}/{name}/mountInfo.json"
        try:
            with open(path, "rb") as file:
                text = file.read(_MAX_INFO)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if len(name) > 255:  # no such directory can exist
                continue
            raise HostError(f"cannot read {path}: {error.strerror}", phase=_PHASE) from error
        found[volume.index] = _assigned(volume, path, text)
    return found


def check(volumes: Sequence[Volume], directory: str = DIRECTORY) -> None:
    """Raise CallerError or HostError for the first disk among them that cannot be had. Blocks."""
    for volume in find(volumes, directory).values():
        from devices.in_use import probe

        probe(volume.device, read_only=volume.read_only)


def _assigned(volume: Volume, path: str, text: bytes) -> Assigned:
    try:
        info = json.loads(text)
        kind, device, fstype = info["volume-type"], info["device"], info["fstype"]
        options = tuple(info.get("options") or ())
        metadata = info.get("metadata") or {}
        group = int(metadata.get("fsGroup", -1))
        if not all(isinstance(word, str) for word in (kind, device, fstype, *options)):
            raise TypeError("a value is no string")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HostError(
            f"{path} is no mountInfo: {error!r}",
            phase=_PHASE,
            hint='it needs "volume-type", "device" and "fstype"',
        ) from error
    if kind not in _KINDS:
        raise CallerError(
            f"the volume {volume.source} is of type {kind[:40]!r}; supported: {', '.join(_KINDS)}",
            phase=_PHASE,
            code="UNIMPLEMENTED",
        )
    _check_disk(device, path)
    read_only = volume.readonly or "ro" in options
    if read_only and "ro" not in options:
        options += ("ro",)
    policy = metadata.get("fsGroupChangePolicy") == "OnRootMismatch"
    return Assigned(volume.index, device, fstype, options, read_only, group, policy)


def _check_disk(device: str, path: str) -> None:
    try:
        info = os.stat(device) if os.path.isabs(device) else None
    except OSError as error:
        raise HostError(
            f"{device}, named by {path}, cannot be used: {error.strerror}", phase=_PHASE
        ) from error
    if info is None or not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
        raise HostError(f"{device[:200]!r}, named by {path}, is neither a disk nor an image", phase=_PHASE)


def rewrite(document: Mapping[str, Any], assigned: Mapping[int, Assigned]) -> None:
    """Have the guest's spec bind these from where the guest mounts them."""
    for index, volume in assigned.items():
        mount = document["mounts"][index]
        kept = [option for option in mount.get("options") or [] if option not in ("bind", "rbind")]
        mount.update(type="bind", source=volume.mount_point, options=["rbind", *kept])


class DirectVolumes:
    """The plugged ones of one sandbox."""

    def __init__(
        self,
        devices: DeviceManager,
        holdings: Holdings,
        style: DiskStyle = DiskStyle(),  # noqa: B008
    ) -> None:
        self._devices = devices
        self._holdings = holdings
        self._style = style

    async def add(self, container_id: str, assigned: Mapping[int, Assigned]) -> list[agent_pb2.Storage]:
        """Plug the disks; what the agent must mount. Raises KataError; releasing the container's holdings
        undoes what was done."""
        storages = []
        for volume in assigned.values():
            name = "v" + hashlib.sha256(volume.device.encode()).hexdigest()[:16]
            config = await self._style.disk(name, volume.device, read_only=volume.read_only)
            held = await self._holdings.take(container_id, config)
            disk = await self._devices.generate_agent_device(held)
            storage = agent_pb2.Storage(
                driver=disk.type,
                source=disk.id,
                fstype=volume.fstype,
                options=volume.options,
                mount_point=volume.mount_point,
            )
            if volume.group >= 0:
                storage.fs_group.group_id = volume.group
                if volume.only_if_needed:
                    storage.fs_group.group_change_policy = types_pb2.FSGroupChangePolicy.OnRootMismatch
            storages.append(storage)
        return storages
