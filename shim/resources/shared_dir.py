"""The directory that a sandbox shares with its guest by virtio-fs, and what is mounted into it.

What: `<root>/<sandbox>/rw` is where the host mounts root file systems and volumes; `ro` is the same
tree bound read-only, and what virtiofsd exports. A mount made below `rw` propagates to `ro` and on
into virtiofsd's own mount namespace.
Why two trees: the guest must not create files beside the mounts (symlinks for the host to trip
over, or a full /run), while a container's root file system stays writable.
Invariants: everything is recorded in the undo log before it exists; a read-only volume is read-only
before it becomes visible; nothing is removed across a mount. All methods block for a few
milliseconds: call them in a thread.
Source: the layout is Kata's (facts/kata.md 3.1).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from devices import mounts
from devices.errors import CallerError, HostError, KataError
from devices.undo import Entry, UndoLog
from shim.guest_spec import Volume
from shim.protocols import RootfsMount
from shim.safefs import remove_tree

__all__ = ["SharedDir"]


class SharedDir:
    """One sandbox's share. Not thread-safe: its owner calls one method at a time."""

    def __init__(self, path: str, undo: UndoLog) -> None:
        self.path = path
        self.rw = os.path.join(path, "rw")
        self.ro = os.path.join(path, "ro")
        self._undo = undo
        self._passthrough = os.path.join(self.rw, "passthrough")
        self._own: list[Entry] = []
        self._containers: dict[str, list[Entry]] = {}

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
            for folder in (self.rw, self._passthrough, self.ro):
                os.mkdir(folder, 0o755)
            self._own.append(self._undo.record("mount", path=self.rw))
            mounts.bind(self.rw, self.rw)
            mounts.set_propagation(self.rw, "shared")
            self._own.append(self._undo.record("mount", path=self.ro))
            mounts.bind(self.rw, self.ro, read_only=True)
            mounts.set_propagation(self.ro, "slave")
        except OSError as error:
            raise HostError(
                f"cannot prepare {self.path}: {error.strerror or error}",
                phase="share",
                hint="the shim needs CAP_SYS_ADMIN and a writable /run",
            ) from error

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
        folder = os.path.join(self._passthrough, container_id)
        target = os.path.join(folder, "rootfs")
        try:
            entries.append(self._undo.record("dir", path=folder))
            os.mkdir(folder, 0o755)
            os.mkdir(target, 0o755)
            entries.append(self._undo.record("mount", path=target))
            if rootfs:
                mounts.mount_rootfs(rootfs, target)
            else:
                mounts.bind(root_path, target, recursive=True)
            for volume in volumes:
                self._add_volume(volume, entries)
        except (OSError, KataError) as error:
            self.remove_container(container_id)
            if isinstance(error, KataError):
                raise error.with_context(phase="rootfs") from None
            raise HostError(
                f"cannot mount the root file system of {container_id}: {error.strerror or error}",
                phase="rootfs",
                hint="see dmesg; is the snapshotter's file system available on this host?",
            ) from error

    def _add_volume(self, volume: Volume, entries: list[Entry]) -> None:
        try:
            kind = os.stat(volume.source).st_mode
        except OSError as error:
            raise CallerError(
                f"the source {volume.source} of the mount at {volume.destination} cannot be used:"
                f" {error.strerror}",
                phase="volume",
                code="INVALID_ARGUMENT",
                hint="create it on the host first",
            ) from error
        if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind) or stat.S_ISFIFO(kind)):
            raise CallerError(
                f"the source {volume.source} of the mount at {volume.destination} is a device; a bind"
                " mount of the host's device means nothing in the guest",
                phase="volume",
                code="INVALID_ARGUMENT",
            )
        target = os.path.join(self._passthrough, volume.share_name)
        if stat.S_ISDIR(kind):
            entries.append(self._undo.record("dir", path=target))
            os.mkdir(target, 0o755)
        else:
            entries.append(self._undo.record("file", path=target))
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        entries.append(self._undo.record("mount", path=target))
        mounts.bind(volume.source, target, read_only=volume.readonly, recursive=volume.recursive)

    def remove_container(self, container_id: str) -> list[OSError]:
        """Unmount and remove one container's part, going on past errors, which are returned."""
        errors: list[OSError] = []
        for entry in reversed(self._containers.pop(container_id, [])):
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
        while self._own:
            entry = self._own.pop()
            try:
                _release(entry)
            except OSError as error:
                errors.append(error)
            else:
                self._undo.forget(entry)
        return errors


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
