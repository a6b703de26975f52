"""Being told of changes in directories of the host: one descriptor, on the event loop.

What: `DirectoryWatch.watch` calls back after something was created in a directory, or moved into it or out
of it.
Why ctypes: Python's library has no inotify.
Invariants: a callback runs on the loop, once for changes that came close together; one watch for each inode,
the later callback counts; `close` ends all of them, and may be called twice.
Source: inotify(7).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable

__all__ = ["DirectoryWatch"]

_IN_MOVED, _IN_CREATE, _IN_DELETE = 0x40 | 0x80, 0x100, 0x200
_IN_ONLYDIR = 0x01000000
_IN_IGNORED, _IN_Q_OVERFLOW = 0x8000, 0x4000
_event = struct.Struct("iIII")  # wd, mask, cookie, len


class DirectoryWatch:
    """Watches directories. Raises OSError where the kernel does."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        loop.add_reader(self._fd, self._readable)

    def watch(self, path: str, changed: Callable[[], None]) -> int:
        """Answers a number for `forget`. Does not block, but on a dead file server."""
        mask = _IN_MOVED | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
        number: int = self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        self._callbacks[number] = changed
        return number

    def forget(self, number: int) -> None:
        """No callback for this one comes after this. Unknown numbers are fine."""
        if self._callbacks.pop(number, None) is not None and self._fd >= 0:
            self._libc.inotify_rm_watch(self._fd, number)

    def close(self) -> None:
        """No callback comes after this."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._callbacks.clear()

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            return
        offset, changed = 0, {}
        while offset + _event.size <= len(data):
            number, mask, _, length = _event.unpack_from(data, offset)
            offset += _event.size + length
            if mask & _IN_IGNORED:
                self._callbacks.pop(number, None)
            elif mask & _IN_Q_OVERFLOW:
                changed = dict(self._callbacks)
            elif number in self._callbacks:
                changed[number] = self._callbacks[number]
        for callback in changed.values():
            callback()
