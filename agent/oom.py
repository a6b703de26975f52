"""Out-of-memory kills, as the kernel counts them per cgroup.

What: an inotify watch on each container's `memory.events`; when its `oom_kill` grew, the container's
id waits for GetOOMEvent.
Why `told` before an exit: containerd's clients learn from the event why a process was killed, so it must
reach the host before the exit that it explains.
Invariants: of a container one event waits, further growth is merged into it, so that no container's is
behind a thousand of another's; the watch of a removed cgroup disappears by itself.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque

from agent import log
from agent.inotify import Inotify

__all__ = ["OomWatcher", "oom_kills"]

_TOLD_DEADLINE = 1.0  # seconds that an exit waits for the host to take the event


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
    """One for all containers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._inotify = Inotify(loop)
        self._seen: dict[str, tuple[str, int]] = {}  # container id -> path, kills
        self._queue: deque[str] = deque()
        self._added, self._taken = asyncio.Event(), asyncio.Event()

    def watch(self, container_id: str, cgroup: str) -> None:
        """Begin to watch a container's cgroup; one without a memory controller is left out."""
        path = f"{cgroup}/memory.events"
        try:
            self._inotify.watch(path, functools.partial(self._check, container_id))
        except OSError as error:
            log.debug(f"no OOM events from {path}: {error.strerror}")
            return
        self._seen[container_id] = (path, _count(path))

    def forget(self, container_id: str) -> None:
        """The container is gone."""
        self._seen.pop(container_id, None)

    async def next(self) -> str:
        """The container of the next kill, as soon as there is one."""
        while not self._queue:
            self._added.clear()
            await self._added.wait()
        self._taken.set()
        return self._queue.popleft()

    async def told(self, container_id: str) -> None:
        """Return when all kills of the container up to now were taken by `next`; waits a second at most."""
        self._check(container_id)
        try:
            async with asyncio.timeout(_TOLD_DEADLINE):
                while container_id in self._queue:
                    self._taken.clear()
                    await self._taken.wait()
        except TimeoutError:
            log.debug(f"nobody takes the OOM event of {container_id}")

    def close(self) -> None:
        """Stop watching."""
        self._inotify.close()

    def _check(self, container_id: str) -> None:
        path, before = self._seen.get(container_id, ("", 0))
        now = _count(path) if path else 0
        if now <= before:
            return
        self._seen[container_id] = (path, now)
        if container_id not in self._queue:
            self._queue.append(container_id)
            self._added.set()
