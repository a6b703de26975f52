"""The state directory of a sandbox: whoever has its lock owns the sandbox.

What: `StateDir.make` is for the daemon, which keeps it for life; `StateDir.find` for who undoes what a dead
one left; `is_owned` and `holder` ask.
Why a lock: the end of one daemon (or a `delete`) and the start of the next may meet at the same directory,
and each would take the other's away. A lock of the kernel's ends with its process, however that ends.
Invariants: what is locked is what the path names, so a directory that its owner removed while we waited is
not taken for the next one. Whoever removes the directory has the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

__all__ = ["Owned", "StateDir", "holder", "is_owned"]

_LOOK = 0.01  # seconds between two looks at a lock that somebody has; the kernel has no wait with a deadline


class Owned(Exception):  # noqa: N818  (a state, not a fault)
    """Somebody else has the lock, and kept it."""


class StateDir:
    """A state directory with its lock. Made by `make` or `find`; `close` gives the lock back."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def make(cls, path: str, timeout: float) -> StateDir:
        """Make it (0700) if need be, and lock it. Blocks for `timeout` seconds at most, then raises Owned."""
        until = time.monotonic() + timeout
        while True:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            found = cls._lock(path, until)
            if found is not None:
                return found

    @classmethod
    def find(cls, path: str, timeout: float) -> StateDir | None:
        """Lock it; None if it is not there (any more). Blocks for `timeout` seconds at most, then raises
        Owned."""
        until = time.monotonic() + timeout
        while os.path.lexists(path):
            found = cls._lock(path, until)
            if found is not None:
                return found
        return None

    @classmethod
    def _lock(cls, path: str, until: float) -> StateDir | None:
        """None if what was locked is not at `path` any more. Raises Owned, OSError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            while not _try(fd):
                if time.monotonic() >= until:
                    raise Owned(path)
                time.sleep(_LOOK)
            if _is_at(fd, path):
                return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def empty(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove all that is in it but for the names in `keep`. Raises OSError."""
        from shim.state.safefs import remove_tree

        for name in os.listdir(self._fd):
            if name not in keep:
                remove_tree(os.path.join(self.path, name))

    def remove(self) -> None:
        """Remove it with all that is in it, and give the lock back. Raises OSError; the lock is kept then."""
        from shim.state.safefs import remove_tree

        if self._fd >= 0 and _is_at(self._fd, self.path):
            remove_tree(self.path)
        self.close()

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_owned(path: str) -> bool:
    """Whether somebody has the directory's lock now: a daemon that lives, or somebody who cleans up."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def holder(path: str) -> int:
    """The pid of whoever has the directory's lock; 0 if nobody has, or it cannot be told."""
    try:
        wanted = os.lstat(path)
        with open("/proc/locks", encoding="ascii") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return 0
    where = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}:{wanted.st_ino}"
    for line in lines:
        words = line.split()  # "1: FLOCK  ADVISORY  WRITE 1234 00:19:567 0 EOF"; a waiter has "->" before
        if len(words) > 5 and words[1] == "FLOCK" and words[3] == "WRITE" and words[5] == where:
            return int(words[4]) if words[4].isdigit() else 0
    return 0


def _try(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
