"""Reaps the orphans that the daemon inherits as a child subreaper.

Why: helpers of helpers (a logger's child, a daemonised virtiofsd) become our children when their
parents end, and a zombie in the pod's cgroup is a leak.
Invariants: a child that somebody supervises is never taken from its owner. Owners reap at once (by
pidfd); so only a child that has been a zombie at two looks, five seconds apart, is nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from shim.state.procfs import stat

__all__ = ["Reaper"]

GRACE = 5.0
"""Seconds that an owner has to reap its child."""


class Reaper:
    """Installs itself for SIGCHLD on `loop`; `close` takes it away."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, grace: float = GRACE) -> None:
        self._loop = loop
        self._grace = grace
        self._seen: dict[int, int] = {}  # zombies of the last look: pid -> start time
        self._timer: asyncio.TimerHandle | None = None
        loop.add_signal_handler(signal.SIGCHLD, self._schedule)

    def close(self) -> None:
        """Stop looking."""
        self._loop.remove_signal_handler(signal.SIGCHLD)
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._grace, self._look)

    def _look(self) -> None:
        self._timer = None
        zombies = _zombie_children()
        for pid, start in zombies.items():
            if self._seen.get(pid) == start:
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        self._seen = {pid: start for pid, start in zombies.items() if self._seen.get(pid) != start}
        if self._seen:
            self._schedule()


def _zombie_children() -> dict[int, int]:
    found: dict[int, int] = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
            for word in file.read().split():
                with contextlib.suppress(ProcessLookupError):
                    state, _, start = stat(int(word))
                    if state == "Z":
                        found[int(word)] = start
    return found
