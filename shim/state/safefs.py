"""Removing directory trees without ever leaving them.

What: `remove_tree`: everything below a directory and the directory, on one mount only.
Why: the trees hold what a guest wrote and, if something went wrong, mounts of the user's volumes; a
recursive remove that follows either deletes the user's data.
Invariants:
- Each step down is openat2 relative to an open directory, with RESOLVE_BENEATH, RESOLVE_NO_XDEV and
  RESOLVE_NO_SYMLINKS: the kernel refuses to enter a mount (bind mounts included) or to follow a
  link, whatever is swapped meanwhile.
- What is a mount stays, with the directories above it, and is reported; the rest goes.
- Depth is bounded: a directory deeper than 64 levels is moved up before it is emptied.
"""

from __future__ import annotations

import errno
import os

from devices.syscalls import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    openat2,
)

__all__ = ["SafeRemoveError", "remove_tree"]

_RESOLVE = RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_MAX_DEPTH = 64


class SafeRemoveError(OSError):
    """Something of the tree had to stay; `left` names it."""

    def __init__(self, path: str, left: list[str]) -> None:
        names = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        super().__init__(errno.EBUSY, f"not removed: {names}", path)
        self.left = left


def remove_tree(path: str) -> None:
    """Remove the directory `path` and all that is below it on the same mount.

    Something missing is fine. `path` itself must not be a mount or a link. Raises SafeRemoveError
    when something had to stay, OSError when the parent cannot be opened. Blocks.
    """
    parent, name = os.path.split(path)
    if not name or name in (".", "..") or not path.startswith("/"):
        raise ValueError(f"not a path of a directory: {path!r}")
    try:
        above = os.open(parent, _FLAGS | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        remover = _Remover()
        remover.remove(above, name, path)
    finally:
        os.close(above)
    if remover.left:
        raise SafeRemoveError(path, remover.left)


class _Remover:
    """One removal; `left` gathers what had to stay."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self._root = -1  # the tree itself, where directories that are too deep are moved to
        self._moves = 0
        self._moved: list[tuple[str, str]] = []  # (name in the root, what it was called)

    def remove(self, above: int, name: str, shown: str) -> None:
        """Remove `name` of the directory `above`."""
        if self._unlink(above, name, shown):
            return
        self._root = self._open(above, name, shown)
        if self._root < 0:
            return
        try:
            self._empty(self._root, shown, 1)
            while self._moved:
                moved, was = self._moved.pop()
                self._directory(self._root, moved, was, 1)
        finally:
            os.close(self._root)
        self._rmdir(above, name, shown)

    def _empty(self, directory: int, shown: str, depth: int) -> None:
        """Remove what is in the open `directory`, whose entries are `depth` levels below the root."""
        try:
            names = os.listdir(directory)
        except OSError as error:
            self._keep(shown, error)
            return
        for name in names:
            path = os.path.join(shown, name)
            if not self._unlink(directory, name, path):
                self._directory(directory, name, path, depth)

    def _directory(self, parent: int, name: str, shown: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            self._move_up(parent, name, shown)
            return
        fd = self._open(parent, name, shown)
        if fd < 0:
            return
        try:
            self._empty(fd, shown, depth + 1)
        finally:
            os.close(fd)
        self._rmdir(parent, name, shown)

    def _unlink(self, directory: int, name: str, shown: str) -> bool:
        """Whether nothing remains to be done for `name`: it is no directory."""
        try:
            os.unlink(name, dir_fd=directory)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except IsADirectoryError:
            return False
        except OSError as error:
            self._keep(shown, error)
        return True

    def _open(self, directory: int, name: str, shown: str) -> int:
        try:
            return openat2(directory, name, _FLAGS, _RESOLVE)
        except FileNotFoundError:
            return -1
        except OSError as error:
            self._keep(shown, error)
            return -1

    def _rmdir(self, directory: int, name: str, shown: str) -> None:
        try:
            os.rmdir(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            if not self.left:  # else the reason is below and already told
                self._keep(shown, error)

    def _move_up(self, directory: int, name: str, shown: str) -> None:
        self._moves += 1
        target = f".removing-{os.getpid()}-{self._moves}"
        try:
            os.rename(name, target, src_dir_fd=directory, dst_dir_fd=self._root)
        except OSError as error:
            self._keep(shown, error)
        else:
            self._moved.append((target, shown))

    def _keep(self, shown: str, error: OSError) -> None:
        reason = "is a mount" if error.errno in (errno.EXDEV, errno.EBUSY) else error.strerror
        self.left.append(f"{shown} ({reason})")
