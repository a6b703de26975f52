"""The one place that waits for processes.

What: as PID 1 (or as a subreaper) the agent inherits every orphan of the guest. One SIGCHLD handler
reaps them all; whoever spawned or adopted a process gets its exit code from a future.
Why one place: two callers of waitpid steal each other's statuses.
Invariants: nothing else in the agent calls wait*; a status is delivered exactly once to the future
of its pid; statuses nobody claimed yet are kept for `UNCLAIMED_MAX` processes, the oldest dropped
first; a status recorded before `mark()` is never given to a process created after it, even when the
kernel reused the pid.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping

from agent import log

__all__ = ["UNCLAIMED_MAX", "Reaper", "exit_code"]

UNCLAIMED_MAX = 1024
_NONE: Mapping[int, int] = {}

_DEFAULT_SIGNALS = [number for number in range(1, 32) if number not in (signal.SIGKILL, signal.SIGSTOP)]


def exit_code(status: int) -> int:
    """A wait status as a shell shows it: `exit N` is N, death by signal S is 128 + S."""
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


class Reaper:
    """Spawns processes and hands out their exit codes. Lives on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: dict[int, asyncio.Future[int]] = {}
        self._unclaimed: dict[int, tuple[int, int]] = {}  # pid -> (sequence, code)
        self._sequence = 0

    def start(self) -> None:
        """Begin to reap, including what died before."""
        self._loop.add_signal_handler(signal.SIGCHLD, self.reap)
        self.reap()

    def stop(self) -> None:
        """Give SIGCHLD back; for tests."""
        self._loop.remove_signal_handler(signal.SIGCHLD)

    def mark(self) -> int:
        """Take this before a process is created whose pid only becomes known later; see `watch`."""
        return self._sequence

    def reap(self) -> None:
        """Collect every dead child. Runs on SIGCHLD."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = exit_code(status)
            waiter = self._watched.pop(pid, None)
            if waiter is not None:
                if not waiter.done():
                    waiter.set_result(code)
                continue
            self._sequence += 1
            self._unclaimed.pop(pid, None)
            self._unclaimed[pid] = (self._sequence, code)
            if len(self._unclaimed) > UNCLAIMED_MAX:
                del self._unclaimed[next(iter(self._unclaimed))]

    def has_died(self, pid: int, since: int) -> bool:
        """Whether a child `pid`, created after `since = mark()`, has died that nobody watches yet."""
        return self._unclaimed.get(pid, (0, 0))[0] > since

    def watch(self, pid: int, since: int) -> asyncio.Future[int]:
        """The exit code of `pid`, created after `since = mark()`, dead or alive."""
        future: asyncio.Future[int] = self._loop.create_future()
        sequence, code = self._unclaimed.pop(pid, (0, 0))
        if sequence > since:
            future.set_result(code)
        else:
            self._watched[pid] = future
        return future

    def spawn(
        self,
        argv: list[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        more: Mapping[int, int] = _NONE,
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a program with exactly these descriptors, `more` by its numbers; `(pid, exit code)`.

        Signals are back at their defaults in it (the interpreter ignores SIGPIPE, and ignored
        signals survive exec). Raises OSError when the program cannot be started.
        """
        since = self.mark()
        # posix_spawn is vfork+exec: it does not copy the interpreter's page tables, and it returns
        # after the exec, so the child's descriptors may be closed here at once.
        pid = os.posix_spawn(
            argv[0],
            argv,
            env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin, 0),
                (os.POSIX_SPAWN_DUP2, stdout, 1),
                (os.POSIX_SPAWN_DUP2, stderr, 2),
                *((os.POSIX_SPAWN_DUP2, ours, its) for its, ours in more.items()),
            ],
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
        log.debug(f"spawned {pid}: {' '.join(argv[:8])}")
        return pid, self.watch(pid, since)
