"""A container's files without a shared file system: its root as disks, its volumes as copies.

What: `BlockFiles` implements `shim.resources.container_files.ContainerFiles` for VMMs (or configurations)
that share no directory.
Why two kinds of disks: where the snapshotter gives a block device (devmapper, blockfile), that is the
disk. Else an erofs image of the root file system, made once, with a scratch disk above it.
Invariants: as `ContainerFiles`; what a container writes above an image goes with it, and does not come back
to the snapshotter.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from devices import mounts
from devices.errors import HostError, KataError
from devices.manager import DeviceManager
from devices.rootfs_mounts import bind_rootfs, mount_rootfs
from devices.threads import acquire, look
from devices.undo import Entry, UndoLog
from hypervisors.base import Hypervisor
from proto import agent_pb2
from shim.protocols import RootfsMount
from shim.resources.copied_volumes import FileCopier, copy_volume
from shim.resources.disk_images import DATA_DIR, ImageStore, make_scratch, rootfs_digest
from shim.resources.disks import DiskStyle
from shim.spec.guest_spec import Volume, guest_rootfs

if TYPE_CHECKING:
    from shim.spec.guest_image import PulledImage

__all__ = ["BlockFiles"]

_log = structlog.get_logger("files")


@dataclass(slots=True)
class _Container:
    """What one container holds: disks in the VM, files on the host, an image in the store."""

    disks: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    image: int = -1


class BlockFiles:
    """By disks and copies, for the sandbox with this key. `agent` answers the agent once the VM runs."""

    live = False

    def __init__(
        self,
        key: str,
        devices: DeviceManager,
        hypervisor: Hypervisor,
        undo: UndoLog,
        agent: Callable[[], FileCopier],
        *,
        style: DiskStyle = DiskStyle(),  # noqa: B008
        data_dir: str = DATA_DIR,
    ) -> None:
        self._style = style
        self._data_dir = data_dir
        self._folder = f"{data_dir}/sandboxes/{key}"
        self._devices = devices
        self._hypervisor = hypervisor
        self._undo = undo
        self._agent = agent
        self._store = ImageStore(undo, f"{data_dir}/images")
        self._containers: dict[str, _Container] = {}
        self._own: list[Entry] = []
        self._lock = asyncio.Lock()

    async def set_up(self) -> None:
        """A directory for scratch disks, root's alone. Raises HostError."""
        try:
            os.makedirs(os.path.dirname(self._folder), mode=0o700, exist_ok=True)
            self._own.append(self._undo.record("dir", path=self._folder))
            os.mkdir(self._folder, 0o700)
        except OSError as error:
            raise HostError(
                f"cannot make {self._folder}: {error.strerror}",
                phase="share",
                hint="disks of containers are kept there; is it writable, and left over from nobody?",
            ) from error

    def sandbox_storages(self) -> list[agent_pb2.Storage]:
        """None: there is nothing shared."""
        return []

    def rootfs(self, container_id: str) -> str:
        """See `ContainerFiles`."""
        return guest_rootfs(container_id)

    async def name(self, volumes: Sequence[Volume]) -> list[Volume]:
        """As they are: each container gets a copy of its own."""
        return list(volumes)

    async def add(
        self,
        container_id: str,
        rootfs: Sequence[RootfsMount],
        root_path: str,
        volumes: Sequence[Volume],
        *,
        image: PulledImage | None = None,  # noqa: ARG002
    ) -> list[agent_pb2.Storage]:
        """See `ContainerFiles`."""
        async with self._lock:
            held = self._containers[container_id] = _Container()
            try:
                device = await look(_block_rootfs, rootfs)
                if device is not None:
                    path, fstype, options = device
                    storages = [await self._disk(held, path, guest_rootfs(container_id), fstype, options)]
                else:
                    storages = await self._layers(held, container_id, rootfs, root_path)
                for volume in volumes:
                    await copy_volume(self._agent(), volume)
                return storages
            except (OSError, KataError) as error:
                await self._remove(container_id)
                if isinstance(error, KataError):
                    raise error.with_context(phase="rootfs") from None
                raise HostError(
                    f"cannot bring the root file system of {container_id} into the VM:"
                    f" {error.strerror or error}",
                    phase="rootfs",
                ) from error
            except BaseException:
                await self._remove(container_id)
                raise

    def plugged(self, container_id: str) -> bool:
        """See `ContainerFiles`."""
        return container_id in self._containers and bool(self._containers[container_id].disks)

    async def remove(self, container_id: str, *, alive: bool = True) -> list[Exception]:
        """See `ContainerFiles`."""
        async with self._lock:
            if not alive and container_id in self._containers:
                self._containers[container_id].disks.clear()
            return await self._remove(container_id)

    async def tear_down(self) -> list[Exception]:
        """See `ContainerFiles`."""
        async with self._lock:
            errors = []
            for container_id in list(self._containers):
                self._containers[container_id].disks.clear()  # they went with the VM
                errors += await self._remove(container_id)
            errors += await self._release(self._own)
            return errors

    async def _layers(
        self, held: _Container, container_id: str, rootfs: Sequence[RootfsMount], root_path: str
    ) -> list[agent_pb2.Storage]:
        """An image of the root file system, a scratch disk, and one above the other."""
        base = os.path.dirname(guest_rootfs(container_id))
        digest = await look(rootfs_digest, rootfs)
        image = await self._image(held, container_id, rootfs, root_path, digest)
        scratch = f"{self._folder}/{container_id}.ext4"
        held.entries.append(self._undo.record("file", path=scratch))
        await make_scratch(self._undo, scratch)
        upper = await self._disk(held, scratch, base, "ext4", [])
        lower = await self._disk(held, image, f"{base}/lower", "erofs", ["ro"])
        overlay = agent_pb2.Storage(
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            options=["io.katacontainers.fs-opt.overlay-rw", f"lowerdir={base}/lower"],
            mount_point=guest_rootfs(container_id),
        )
        return [upper, lower, overlay]

    async def _image(
        self, held: _Container, container_id: str, rootfs: Sequence[RootfsMount], root_path: str, digest: str
    ) -> str:
        """The path of the erofs image; the root file system is mounted on the host only to make it."""
        stage = f"{self._folder}/{container_id}"
        entries = [self._undo.record("dir", path=stage)]
        try:
            os.mkdir(stage, 0o700)
            entries.append(self._undo.record("mount", path=stage))
            if rootfs:
                await acquire(mount_rootfs, rootfs, stage)
            else:
                await acquire(bind_rootfs, root_path, stage, read_only=True)
            await acquire(mounts.seal, stage)
            image, held.image = await self._store.image(stage, digest)
        finally:
            for error in await self._release(entries):
                _log.error("not released", path=stage, error=str(error))
        if not digest:
            held.entries.append(self._undo.record("file", path=image))
        return image

    async def _disk(
        self, held: _Container, path: str, mount_point: str, fstype: str, options: Sequence[str]
    ) -> agent_pb2.Storage:
        """Plug the disk in; how the agent finds and mounts it."""
        read_only = "ro" in options
        name = "d" + hashlib.sha256(mount_point.encode()).hexdigest()[:16]
        info = await look(os.stat, path)
        ours = path.startswith(f"{self._data_dir}/")
        config = await self._style.disk(name, path, read_only=read_only, ours=ours)
        device = await self._devices.try_add_device(config, self._hypervisor)
        held.disks.append(device)
        found = await self._devices.generate_agent_device(device)
        storage = agent_pb2.Storage(
            driver=found.type, source=found.id, fstype=fstype, options=list(options), mount_point=mount_point
        )
        if stat.S_ISREG(info.st_mode):
            # The disk may be there already, of another size: the guest hears of this one in its own time.
            storage.driver_options.append(f"kata-shim.bytes={info.st_size}")
        return storage

    async def _remove(self, container_id: str) -> list[Exception]:
        held = self._containers.pop(container_id, None)
        errors: list[Exception] = []
        if held is None:
            return errors
        for disk in reversed(held.disks):
            with _collected(errors):
                await self._devices.try_remove_device(disk, self._hypervisor)
        errors += await self._release(held.entries)
        if held.image >= 0:
            os.close(held.image)
        return errors

    async def _release(self, entries: list[Entry]) -> list[Exception]:
        errors: list[Exception] = []
        while entries:
            entry = entries.pop()
            with _collected(errors):
                await acquire(_release, entry)
                self._undo.forget(entry)
        return errors


class _collected(contextlib.AbstractContextManager["_collected"]):  # noqa: N801
    """Put an error into the list and go on."""

    def __init__(self, errors: list[Exception]) -> None:
        self._errors = errors

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, OSError | KataError):
            self._errors.append(error)
            return True
        return False


def _release(entry: Entry) -> None:
    path = str(entry.facts["path"])
    with contextlib.suppress(FileNotFoundError):
        if entry.kind == "mount":
            mounts.unmount(path)
        elif entry.kind == "file":
            os.unlink(path)
        else:
            os.rmdir(path)


def _block_rootfs(rootfs: Sequence[RootfsMount]) -> tuple[str, str, list[str]] | None:
    """(path, file system, options) if the snapshotter gives a block device or an image file."""
    if len(rootfs) != 1 or rootfs[0].type in ("", "bind", "overlay"):
        return None
    mount = rootfs[0]
    kind = os.stat(mount.source).st_mode
    if stat.S_ISBLK(kind) or (stat.S_ISREG(kind) and "loop" in mount.options):
        return mount.source, mount.type, [option for option in mount.options if option != "loop"]
    return None
