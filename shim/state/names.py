"""Names that more than one sandbox could want: a shim's socket, and Kata's link to a state directory.

What: making them when they are free, and removing them only while they are ours.
Why: the end of one daemon comes late, when the next one of the same sandbox (or another sandbox with the
same id) may have its own there already; who removes by name alone removes that.
Invariants: a socket is ours if inode and time of creation are those that we saw; one that nobody listens on
is nobody's. What is compared and then removed is so under a lock of the directory, which everybody who
removes or replaces such a name takes; making one that is free needs none. Nobody waits for the lock longer
than `_PATIENCE`.
"""

from __future__ import annotations

import _socket  # the module socket costs `delete` three milliseconds
import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

__all__ = ["make_link", "remove_link", "socket_facts", "unlink_dead", "unlink_socket"]

_PATIENCE = 0.3  # seconds; the lock is held for microseconds, for _PROBE by who asks a socket
_PROBE = 0.1  # seconds


def socket_facts(path: str) -> dict[str, str | int]:
    """What a record of the socket at `path` needs for it to be known again: path, inode, time of creation."""
    try:
        info = os.lstat(path)
    except OSError:
        return {"path": path, "inode": 0, "made": 0}  # gone: whatever comes there is somebody else's
    return {"path": path, "inode": info.st_ino, "made": info.st_mtime_ns}


def unlink_socket(path: str, inode: int, made: int) -> bool:
    """Remove the socket if it is still that one; whether it was. Raises OSError."""
    with _locked(os.path.dirname(path)):
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if (info.st_ino, info.st_mtime_ns) != (inode, made):
            return False
        os.unlink(path)
        return True


def unlink_dead(path: str) -> bool:
    """Remove the socket if nobody listens on it; whether nothing is there (any more). Raises OSError."""
    if not os.path.lexists(path):
        return True
    with _locked(os.path.dirname(path)):
        if not _is_dead(path):
            return not os.path.lexists(path)
        os.unlink(path)
        return True


def make_link(link: str, target: str) -> bool:
    """Have `link` point to `target`; whether it does. Something else that is there stays, but for a link
    whose own target is gone. Raises OSError."""
    directory = os.path.dirname(link)
    os.makedirs(directory, 0o700, exist_ok=True)
    with _locked(directory):
        there = _target(link)
        if there == target:
            return True
        if there and not os.path.lexists(there):
            os.unlink(link)
        try:
            os.symlink(os.path.relpath(target, directory), link)
        except FileExistsError:
            return False
        return True


def remove_link(link: str, target: str) -> bool:
    """Remove `link` if it points to `target`; whether it did. Raises OSError."""
    if _target(link) != target:
        return False
    with _locked(os.path.dirname(link)):
        if _target(link) != target:
            return False
        os.unlink(link)
        return True


def _target(link: str) -> str:
    """Where it points to, as an absolute path; "" if it is no link."""
    try:
        text = os.readlink(link)
    except OSError:
        return ""
    return os.path.normpath(os.path.join(os.path.dirname(link), text))


def _is_dead(path: str) -> bool:
    """Whether there is a socket that nobody listens on."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(_PROBE)
        probe.connect(path)
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    finally:
        probe.close()
    return False


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """With a lock of the directory, or, if somebody will not let go of it, without."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EINTR) or time.monotonic() > until:
                    break
                time.sleep(0.002)
        yield
    finally:
        os.close(fd)
