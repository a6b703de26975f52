"""Out-of-memory kills, as the kernel counts them per cgroup.

What: an inotify watch on each container's `memory.events`; when its `oom_kill` grew, the container's
id is put on a queue, from which GetOOMEvent takes it.
Invariants: one event per observed growth; when nobody asks, the queue drops the newest instead of
growing; the watch of a removed cgroup disappears by itself (IN_IGNORED).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct

from agent import log

__all__ = ["OomWatcher", "oom_kills"]

IN_MODIFY = 0x00000002
IN_IGNORED = 0x00008000
_event = struct.Struct("iIII")  # wd, mask, cookie, len; inotify(7)


def oom_kills(text: str) -> int:
    """The `oom_kill` counter of memory.events' text."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill" and value.isdigit():
            return int(value)
    return 0


def _count(path: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return oom_kills(file.read())
    except OSError:
        return 0


class OomWatcher:
    """One inotify descriptor for all containers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[str]) -> None:
        self._events = events
        self._watched: dict[int, tuple[str, str, int]] = {}  # watch -> container id, path, kills
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        loop.add_reader(self._fd, self._readable)

    def watch(self, container_id: str, cgroup: str) -> None:
        """Begin to watch a container's cgroup; one without a memory controller is left out."""
        path = f"{cgroup}/memory.events"
        watch: int = self._libc.inotify_add_watch(self._fd, path.encode(), IN_MODIFY)
        if watch < 0:
            log.debug(f"no OOM events from {path}: {os.strerror(ctypes.get_errno())}")
            return
        self._watched[watch] = (container_id, path, _count(path))

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            return
        offset = 0
        while offset + _event.size <= len(data):
            watch, mask, _, length = _event.unpack_from(data, offset)
            offset += _event.size + length
            if mask & IN_IGNORED:
                self._watched.pop(watch, None)
            elif watch in self._watched:
                self._check(watch)

    def _check(self, watch: int) -> None:
        container_id, path, before = self._watched[watch]
        now = _count(path)
        if now <= before:
            return
        self._watched[watch] = (container_id, path, now)
        try:
            self._events.put_nowait(container_id)
        except asyncio.QueueFull:
            log.error(f"nobody reads OOM events; dropped one of {container_id}")
