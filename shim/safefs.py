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

from shim.syscalls import openat2

__all__ = ["SafeRemoveError", "remove_tree"]

_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
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
        left = _Remover(above).remove(name, path)
    finally:
        os.close(above)
    if left:
        raise SafeRemoveError(path, left)


class _Remover:
    """One removal: `above` is where the tree hangs, and where deep directories are moved to."""

    def __init__(self, above: int) -> None:
        self._above = above
        self._left: list[str] = []
        self._moved: list[tuple[str, str]] = []  # (name in `above`, what it was called)

    def remove(self, name: str, shown: str) -> list[str]:
        """Remove `name` of `above`; returns the paths that had to stay."""
        self._entry(self._above, name, shown, 0)
        while self._moved:
            moved, shown = self._moved.pop()
            self._entry(self._above, moved, shown, 0)
        return self._left

    def _entry(self, directory: int, name: str, shown: str, depth: int) -> None:
        try:
            os.unlink(name, dir_fd=directory)
            return
        except FileNotFoundError:
            return
        except IsADirectoryError:
            pass
        except OSError as error:
            if error.errno != errno.EPERM:  # what POSIX says for directories
                self._keep(shown, error)
                return
        if depth > _MAX_DEPTH:
            self._move_up(directory, name, shown)
            return
        try:
            fd = openat2(directory, name, _FLAGS, _RESOLVE)
        except FileNotFoundError:
            return
        except OSError as error:
            self._keep(shown, error)
            return
        try:
            for child in os.listdir(fd):
                self._entry(fd, child, os.path.join(shown, child), depth + 1)
        except OSError as error:
            self._keep(shown, error)
        finally:
            os.close(fd)
        try:
            os.rmdir(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            if not self._left:  # else the reason is below and already told
                self._keep(shown, error)

    def _move_up(self, directory: int, name: str, shown: str) -> None:
        target = f".removing-{os.getpid()}-{len(self._moved)}"
        try:
            os.rename(name, target, src_dir_fd=directory, dst_dir_fd=self._above)
        except OSError as error:
            self._keep(shown, error)
        else:
            self._moved.append((target, shown))

    def _keep(self, shown: str, error: OSError) -> None:
        reason = "is a mount" if error.errno in (errno.EXDEV, errno.EBUSY) else error.strerror
        self._left.append(f"{shown} ({reason})")
