"""Where one Firecracker lives: its working directory, with or without the jailer around it.

What: `Den` is the directory that Firecracker's relative paths start from, and the host files lent into it.
`Den.open` makes it: without a jailer the sandbox's state directory, with one a tmpfs at the place where
the jailer will look for it.
Why a tmpfs of its own: /run may be mounted nodev and noexec, and in the jail Firecracker is executed and
opens its own /dev/kvm. Why made by us: the jailer creates missing directories but accepts existing ones;
whoever could plant a link there would choose what root writes to (CVE-2026-1386).
Invariants:
- All parents are directories of root that nobody else may write to; the jail's own directory is created,
  never found. A link or a stranger's directory anywhere on the way is refused before anything is made.
- Everything made is in the undo log before it is made. Files are lent by bind mounts, read-only where the
  guest may only read; the mount is shared, so what is lent later appears in the running jail too.
- Relative names mean the same with and without jailer, so a snapshot taken in one sandbox loads in another.
Source: jailer(1) of Firecracker 1.12: <base>/<name of the executable>/<id>/root.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field

from devices import mounts
from devices.beneath import open_entry, open_named
from devices.errors import BugError, HostError
from devices.syscalls import mount
from devices.undo import Entry, UndoLog

__all__ = ["JAIL_BASE", "Den", "jail_id"]

JAIL_BASE = "/run/kata-shim"
_JAIL_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,30}")
_SIZE = 16 << 20  # bytes of the jail's tmpfs: the jailer copies Firecracker's executable into it


def jail_id(state_dir: str) -> str:
    """The last part of the state directory's path, which names the sandbox on this host and no other, if the
    jailer takes it (letters, digits, hyphens), else a digest of it."""
    name = os.path.basename(state_dir)
    if _JAIL_ID.fullmatch(name):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:32]


@dataclass(slots=True)
class Den:
    """See the module's docstring. `root`: its path on the host. `jailed`: whether files must be lent.

    `uid` and `gid`: who must be able to write what is lent writable. All methods block for milliseconds:
    call them in a thread.
    """

    root: str
    jailed: bool
    undo: UndoLog
    uid: int = 0
    gid: int = 0
    _entries: list[Entry] = field(default_factory=list)
    _lent: dict[str, list[Entry]] = field(default_factory=dict)

    @classmethod
    def plain(cls, state_dir: str, undo: UndoLog) -> Den:
        """Without a jailer: Firecracker works in the sandbox's state directory and sees the host's root."""
        return cls(state_dir, False, undo)

    @classmethod
    def jail(
        cls, name: str, executable: str, undo: UndoLog, *, uid: int, gid: int, base: str = JAIL_BASE
    ) -> Den:
        """Make the jail `name` (see `jail_id`) for the program `executable`. Raises HostError; then nothing
        of it is left."""
        program = os.path.join(base, os.path.basename(executable))
        home = os.path.join(program, name)
        den = cls(os.path.join(home, "root"), True, undo, uid, gid)
        try:
            _own_directory(base)
            if not os.path.lexists(program):
                os.mkdir(program, 0o700)
            _own_directory(program)
            den._record("dir", home)
            try:
                os.mkdir(home, 0o700)
            except FileExistsError:
                undo.forget(den._entries.pop())  # not ours: must not be removed
                raise HostError(
                    f"{home} exists already; a jail is never made in what was found",
                    phase="jail",
                    hint="if no Firecracker of that sandbox runs, remove it by hand",
                ) from None
            den._record("mount", home)
            mount("tmpfs", home, "tmpfs", mounts.MS_NOSUID, f"mode=0755,size={_SIZE}")
            mounts.set_propagation(home, "shared")
            os.mkdir(den.root, 0o755)
            os.chown(den.root, uid, gid)
        except OSError as error:
            den.close()
            raise HostError(
                f"cannot make the jail {home}: {error.strerror or error}",
                phase="jail",
                hint="the shim needs root's rights and a writable /run",
            ) from error
        except BaseException:
            den.close()
            raise
        return den

    def path(self, name: str) -> str:
        """The host's path of what Firecracker calls `name`."""
        return os.path.join(self.root, name)

    def make_fifo(self, name: str) -> str:
        """A FIFO that Firecracker may write to; its path on the host. Raises OSError."""
        path = self.path(_checked(name))
        self._record("file", path)
        os.mkfifo(path, 0o600)
        if self.jailed:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)
        return path

    def make_file(self, name: str, size: int) -> None:
        """An empty file of `size` bytes, for Firecracker to read and write. Raises OSError."""
        path = self.path(_checked(name))
        self._record("file", path)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, size)
            if self.jailed:
                os.fchown(file, self.uid, self.gid)
        finally:
            os.close(file)

    def lend(self, source: str, name: str, *, read_only: bool = True) -> str:
        """Let Firecracker use the host's file, disk or directory `source`; the name to tell it.

        Raises OSError. Without a jailer that is the file's own path.
        """
        if not self.jailed:
            return source
        if name in self._lent:
            raise BugError(f"something is lent as {name} already")
        target = self.path(_checked(name))
        entries: list[Entry] = []
        found = open_named(source)
        try:
            directory = stat.S_ISDIR(os.fstat(found).st_mode)
            entries.append(self.undo.record("dir" if directory else "file", path=target))
            where = self._make(name, directory)
            try:
                entries.append(self.undo.record("mount", path=target))
                mounts.bind(found, where, read_only=read_only, recursive=False)
            finally:
                os.close(where)
        except BaseException:
            self._release(entries)
            raise
        finally:
            os.close(found)
        self._lent[name] = entries
        return name

    def _make(self, name: str, directory: bool) -> int:
        """Something empty to mount on, as a descriptor: Firecracker may write to the root, and rename it."""
        root = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not directory:
                return os.open(
                    name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root
                )
            os.mkdir(name, 0o755, dir_fd=root)
            return open_entry(root, name)
        finally:
            os.close(root)

    def take_back(self, name: str) -> None:
        """Undo `lend`. Idempotent. Raises OSError."""
        self._release(self._lent.pop(name, []))

    def close(self) -> None:
        """Release everything, what was lent first. Idempotent. Raises OSError."""
        for name in reversed(list(self._lent)):
            self.take_back(name)
        made = bool(self._entries)
        self._release(self._entries)
        if self.jailed and made:
            with contextlib.suppress(OSError):  # others live there
                os.rmdir(os.path.dirname(os.path.dirname(self.root)))

    def _record(self, kind: str, path: str) -> None:
        self._entries.append(self.undo.record(kind, path=path))

    def _release(self, entries: list[Entry]) -> None:
        while entries:
            entry = entries[-1]
            path = str(entry.facts["path"])
            try:
                if entry.kind == "mount":
                    mounts.unmount(path)
                elif entry.kind == "dir":
                    os.rmdir(path)
                else:
                    os.unlink(path)
            except FileNotFoundError:
                pass
            entries.pop()
            self.undo.forget(entry)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BugError(f"{name!r} is no name for a file in a jail")
    return name


def _own_directory(path: str) -> None:
    """Refuse to build below what others may change. Raises HostError, OSError."""
    if not os.path.lexists(path):
        os.mkdir(path, 0o700)
    at = "/"
    for part in ["", *path.strip("/").split("/")]:
        at = os.path.join(at, part)
        info = os.lstat(at)
        if stat.S_ISLNK(info.st_mode) or not stat.S_ISDIR(info.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "no directory"
            raise HostError(f"{at} is {what}: no jail is made below it", phase="jail")
        if info.st_uid != 0 or (info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX):
            raise HostError(
                f"{at} belongs to user {info.st_uid} with mode {stat.S_IMODE(info.st_mode):o}:"
                " others could change what is below it, so no jail is made there",
                phase="jail",
                hint=f"chown root:root {at} && chmod go-w {at}",
            )
