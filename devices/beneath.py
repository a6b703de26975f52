"""Opening what a tenant may change: the kernel finds it, once, and it is used by its descriptor from then on.

What: `open_entry` for what lies beneath an open directory, `open_in_root` for what a path means inside a root
file system, `open_named` for what a caller's own path leads to, and `reopen` to read what was found.
Why: images, volumes and writable trees change under our hands: whoever looks at a path and then uses it by
its name follows the link that was put there between the two (CVE-2020-2024, CVE-2020-2026).
Invariants: what a path means is decided by one openat2 of a directory that is open already, and no magic link
of /proc is ever followed. The result is an O_PATH descriptor: nothing was opened yet that could wait (a FIFO)
or act (a device). Look at it by fstat, then `reopen` it, bind it, or mount on it. All block for moments, or
as long as a dead file server: call them in a thread.
Source: openat2(2), open(2) O_PATH, path_resolution(7).
"""

from __future__ import annotations

import errno
import os
import socket
import stat

from devices.syscalls import (
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    openat2,
)

__all__ = ["connect_to", "descriptor_path", "open_entry", "open_in_root", "open_named", "reopen"]

_AT_FDCWD = -100
_TRIES = 64
_NO_LIST = (
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
)  # no directory, or one that this file server lets us pass only


def open_entry(directory: int, below: str) -> int:
    """What `below` (names joined by "/") is now beneath the open `directory`, without following any link: in
    the last place a link itself. Raises OSError, ELOOP for a link on the way and EXDEV for a way out."""
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    return openat2(directory, below, os.O_PATH | os.O_NOFOLLOW, resolve)


def open_in_root(root: int, path: str) -> int:
    """What `path` leads to for a process whose root is the open directory `root`: links are followed and end
    inside, whatever they say. Raises OSError."""
    for _ in range(_TRIES):
        try:
            return openat2(root, path, os.O_PATH, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
        except BlockingIOError:  # somebody renames while the kernel climbs a ".."
            continue
    raise OSError(errno.EAGAIN, "it is renamed all the time", path)


def open_named(path: str, *, follow: bool = True) -> int:
    """What the host's `path` leads to: it is the caller's own, so links on the way are followed, and one in
    the last place if `follow`, else it is opened itself. Raises OSError."""
    flags = 0 if follow else os.O_NOFOLLOW
    try:
        # A directory is opened to be read: O_PATH would not make an automounter mount what belongs there.
        return openat2(_AT_FDCWD, path, os.O_RDONLY | os.O_DIRECTORY | flags, RESOLVE_NO_MAGICLINKS)
    except OSError as error:
        if error.errno not in _NO_LIST:
            raise
    return openat2(_AT_FDCWD, path, os.O_PATH | flags, RESOLVE_NO_MAGICLINKS)


def reopen(descriptor: int, flags: int = os.O_RDONLY) -> int:
    """Open for real what an O_PATH descriptor is of. For regular files and directories: to open others may
    wait or act."""
    return os.open(descriptor_path(descriptor), flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def connect_to(sock: socket.socket, path: str) -> None:
    """Connect to the unix socket that lies at `path` itself: whoever may write to its directory can put a
    link to somebody else's there. Raises OSError, as connect(2)."""
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise OSError(errno.ENOTSOCK, "it is no socket", path)
        sock.connect(descriptor_path(found))
    finally:
        os.close(found)


def descriptor_path(descriptor: int) -> str:
    """A path that means exactly what the descriptor is of, for system calls that take paths only."""
    return f"/proc/self/fd/{descriptor}"
