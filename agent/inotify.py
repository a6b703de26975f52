"""Being told of changes of files: one inotify descriptor, a callback for each file.

Why ctypes: Python's library has no inotify, and the guest has no package that does.
Invariants: a callback runs on the loop, after the change and at least once for changes that came close
together; the watch of a removed file disappears by itself (IN_IGNORED); `close` ends all of them.
Source: inotify(7).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable

__all__ = ["Inotify"]

_IN_MODIFY = 0x00000002
_IN_IGNORED = 0x00008000
_event = struct.Struct("iIII")  # wd, mask, cookie, len


class Inotify:
    """Watches files. Raises OSError where the kernel does."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        loop.add_reader(self._fd, self._readable)

    def watch(self, path: str, changed: Callable[[], None]) -> None:
        """Call `changed` after each modification of the file; for a file watched twice the later one."""
        watch: int = self._libc.inotify_add_watch(self._fd, path.encode(), _IN_MODIFY)
        if watch < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        self._callbacks[watch] = changed

    def close(self) -> None:
        """No callback comes after this."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            return
        offset, changed = 0, {}
        while offset + _event.size <= len(data):
            watch, mask, _, length = _event.unpack_from(data, offset)
            offset += _event.size + length
            if mask & _IN_IGNORED:
                self._callbacks.pop(watch, None)
            elif watch in self._callbacks:
                changed[watch] = self._callbacks[watch]
        for callback in changed.values():
            callback()
