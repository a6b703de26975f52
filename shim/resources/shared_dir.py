"""The directory that a sandbox shares with its guest by virtio-fs, and what is mounted into it.

What: `<root>/<sandbox>/rw` is where the host mounts root file systems and volumes; `ro` is the same
tree bound read-only, and what virtiofsd exports. A mount made below `rw` propagates to `ro` and on
into virtiofsd's own mount namespace.
`roots/rw` and `roots/ro` are two more of the same kind, for root file systems alone, where another
virtiofsd serves them (`virtio_fs_rootfs_mknod`).
Why two trees: the guest must not create files beside the mounts (symlinks for the host to trip
over, or a full /run), while a container's root file system stays writable.
Why volumes are counted: containers of a pod that mount the same source must see each other's writes at
once, and each other's locks. Two mounts of it would be two files to the guest, each with a cache.
Invariants: everything is recorded in the undo log before it exists; a read-only volume is read-only
before it becomes visible; nothing is removed across a mount. All methods block for a few
milliseconds: call them in a thread.
Source: the layout is Kata's (facts/kata.md 3.1).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from devices import mounts
from devices.beneath import open_named
from devices.errors import CallerError, HostError, KataError
from devices.rootfs_mounts import bind_rootfs, mount_rootfs
from devices.undo import Entry, UndoLog
from shim.protocols import RootfsMount
from shim.spec.guest_spec import Volume
from shim.state.safefs import remove_tree

__all__ = ["ROOTS", "ROOTS_TAG", "SHARE_TAG", "SharedDir"]

_log = structlog.get_logger("volumes")

SHARE_TAG, ROOTS_TAG = "kataShared", "kataRoots"
"""What the guest mounts: the share (Kata's name), and that of root file systems."""
ROOTS = "roots"


@dataclass(eq=False, slots=True)
class _Shared:
    """A volume in the share: what it shows, its entries in the undo log, and how many containers use it."""

    key: tuple[object, ...]
    entries: list[Entry]
    users: int = 0


class SharedDir:
    """One sandbox's share. Not thread-safe: its owner calls one method at a time."""

    def __init__(self, path: str, undo: UndoLog, *, roots_apart: bool = False) -> None:
        self.path = path
        self.roots_apart = roots_apart
        self.rw = os.path.join(path, "rw")
        self.ro = os.path.join(path, "ro")
        self._undo = undo
        self._passthrough = os.path.join(self.rw, "passthrough")
        self._roots = os.path.join(path, ROOTS, "rw") if roots_apart else self._passthrough
        self._own: list[Entry] = []
        self._containers: dict[str, list[Entry]] = {}
        self._volumes: dict[str, _Shared] = {}  # by name below passthrough/
        self._uses: dict[str, list[str]] = {}  # container id -> names of its volumes

    @property
    def exported(self) -> str:
        """The directory for virtiofsd."""
        return self.ro

    def set_up(self) -> None:
        """Make both trees. Raises HostError."""
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            self._own.append(self._undo.record("dir", path=self.path))
            os.mkdir(self.path, 0o700)
            if self.roots_apart:
                os.mkdir(os.path.dirname(self._roots), 0o700)
                self._make_trees(self._roots, os.path.join(os.path.dirname(self._roots), "ro"))
            self._make_trees(self.rw, self.ro, self._passthrough)
        except OSError as error:
            raise HostError(
                f"cannot prepare {self.path}: {error.strerror or error}",
                phase="share",
                hint="the shim needs CAP_SYS_ADMIN and a writable /run",
            ) from error

    def _make_trees(self, rw: str, ro: str, *below: str) -> None:
        """What is mounted below `rw` appears below `ro`, which cannot be written."""
        for folder in (rw, *below, ro):
            _make_searchable(folder)
        self._own.append(self._undo.record("mount", path=rw))
        mounts.bind(rw, rw)
        mounts.set_propagation(rw, "shared")
        self._own.append(self._undo.record("mount", path=ro))
        mounts.bind(rw, ro, read_only=True)
        mounts.set_propagation(ro, "slave")

    def merge(self, volumes: Sequence[Volume]) -> list[Volume]:
        """The same volumes, each under the name of one there that shows the same, or a name not taken."""
        names = {shared.key: name for name, shared in self._volumes.items()}
        nested = _nested(volumes)
        merged = []
        for volume in volumes:
            name = names.get(_key(volume), volume.share_name)
            while name in self._volumes and self._volumes[name].key != _key(volume):
                name += "_"  # its container is gone, and another one with its id has come
            merged.append(replace(volume, share_name=name, nested=volume.index in nested))
        return merged

    def add_container(
        self, container_id: str, rootfs: Sequence[RootfsMount], root_path: str, volumes: Sequence[Volume]
    ) -> None:
        """Mount one container's root file system and volumes.

        `rootfs` is containerd's list; if it is empty, the directory `root_path` of the bundle is
        bound instead. On error nothing of this container stays. Raises CallerError, HostError.
        """
        if container_id in self._containers:
            raise CallerError(f"container {container_id} is in the share already", code="ALREADY_EXISTS")
        entries: list[Entry] = []
        self._containers[container_id] = entries
        folder = os.path.join(self._roots, container_id)
        target = os.path.join(folder, "rootfs")
        try:
            entries.append(self._undo.record("dir", path=folder))
            _make_searchable(folder)
            _make_searchable(target)
            entries.append(self._undo.record("mount", path=target))
            if rootfs:
                mount_rootfs(rootfs, target)
            else:
                bind_rootfs(root_path, target)
            for volume in volumes:
                self._use_volume(volume, self._uses.setdefault(container_id, []))
        except (OSError, KataError) as error:
            self.remove_container(container_id)
            if isinstance(error, KataError):
                raise error.with_context(phase="rootfs") from None
            raise HostError(
                f"cannot mount the root file system of {container_id}: {error.strerror or error}",
                phase="rootfs",
                hint="see dmesg; is the snapshotter's file system available on this host?",
            ) from error

    def _use_volume(self, volume: Volume, uses: list[str]) -> None:
        shared = self._volumes.get(volume.share_name)
        if shared is None:
            shared = self._volumes[volume.share_name] = _Shared(_key(volume), [])
        elif shared.key != _key(volume):
            raise _changed(volume)
        shared.users += 1
        uses.append(volume.share_name)
        if not shared.entries:
            self._add_volume(volume, shared)

    def _add_volume(self, volume: Volume, shared: _Shared) -> None:
        """Mount what the source leads to at one moment: it is opened once, looked at, and bound by that."""
        try:
            source = open_named(volume.source)
        except OSError as error:
            raise CallerError(
                f"the source {volume.source} of the mount at {volume.destination} cannot be used:"
                f" {error.strerror}",
                phase="volume",
                code="INVALID_ARGUMENT",
                hint="create it on the host first",
            ) from error
        try:
            info = os.fstat(source)
            if not _is_what(shared.key, info):
                raise _changed(volume)
            if stat.S_ISBLK(info.st_mode) or stat.S_ISCHR(info.st_mode):
                raise CallerError(
                    f"the source {volume.source} of the mount at {volume.destination} is a device; a bind"
                    " mount of the host's device means nothing in the guest",
                    phase="volume",
                    code="INVALID_ARGUMENT",
                )
            if stat.S_ISSOCK(info.st_mode) or stat.S_ISFIFO(info.st_mode):
                _log.warning(
                    "a socket or FIFO of the host as a volume: through the VM's wall nobody answers on it",
                    source=volume.source,
                    destination=volume.destination,
                )
            target = os.path.join(self._passthrough, volume.share_name)
            if stat.S_ISDIR(info.st_mode):
                shared.entries.append(self._undo.record("dir", path=target))
                _make_searchable(target)
            else:
                shared.entries.append(self._undo.record("file", path=target))
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
            shared.entries.append(self._undo.record("mount", path=target))
            mounts.bind(
                source,
                target,
                read_only=volume.readonly,
                deep=volume.deep,
                recursive=volume.recursive,
                tenant=True,
            )
        finally:
            os.close(source)

    def remove_container(self, container_id: str) -> list[OSError]:
        """Unmount and remove one container's part, going on past errors, which are returned."""
        errors: list[OSError] = []
        for name in reversed(self._uses.pop(container_id, [])):
            shared = self._volumes[name]
            shared.users -= 1
            if shared.users == 0:
                del self._volumes[name]
                errors += self._release(shared.entries)
        return errors + self._release(self._containers.pop(container_id, []))

    def _release(self, entries: list[Entry]) -> list[OSError]:
        errors: list[OSError] = []
        while entries:
            entry = entries.pop()
            try:
                _release(entry)
            except OSError as error:
                errors.append(error)
            else:
                self._undo.forget(entry)
        return errors

    def tear_down(self) -> list[OSError]:
        """Unmount and remove everything, containers included, going on past errors. Idempotent."""
        errors: list[OSError] = []
        for container_id in reversed(list(self._containers)):
            errors += self.remove_container(container_id)
        return errors + self._release(self._own)


def _nested(volumes: Sequence[Volume]) -> set[int]:
    """The indexes of those read-only ones below which something is mounted that is to stay as it is."""
    wanted = {
        volume.index: os.path.realpath(volume.source)
        for volume in volumes
        if volume.readonly and volume.recursive and not volume.deep and os.path.isdir(volume.source)
    }
    targets = [entry.target for entry in mounts.mounts_below("/")] if wanted else []
    return {
        index
        for index, real in wanted.items()
        if any(target.startswith(f"{real.rstrip('/')}/") for target in targets)
    }


def _key(volume: Volume) -> tuple[object, ...]:
    """What makes two volumes the same: the source, what lies there now, and how it may be used."""
    try:
        there = os.stat(volume.source)
    except OSError:  # `_add_volume` says so
        return (volume.share_name,)
    return volume.source, there.st_dev, there.st_ino, volume.readonly, volume.deep, volume.recursive


def _is_what(key: tuple[object, ...], info: os.stat_result) -> bool:
    """Whether the key is of what is there; one of nothing fits whatever has come since."""
    return len(key) == 1 or key[1:3] == (info.st_dev, info.st_ino)


def _changed(volume: Volume) -> CallerError:
    return CallerError(
        f"the source {volume.source} of the mount at {volume.destination} changed meanwhile",
        phase="volume",
        code="UNAVAILABLE",
        hint="try again",
    )


def _release(entry: Entry) -> None:
    path = str(entry.facts["path"])
    try:
        if entry.kind == "mount":
            mounts.unmount(path)
        elif entry.kind == "file":
            os.unlink(path)
        else:
            remove_tree(path)
    except FileNotFoundError:
        pass


def _make_searchable(path: str) -> None:
    """A directory below ours (0700) that the guest's users pass through: the daemon's umask is for files
    of the host's. Root of a user namespace in the guest is such a user."""
    os.mkdir(path)
    os.chmod(path, 0o711)  # noqa: S103  (the directory above is 0700)
