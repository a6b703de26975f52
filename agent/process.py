"""One process of a container: its pid, its streams, its exit code.

Invariants: the exit code is set exactly once and stays readable by any number of waiters; a signal
is sent only while the reaper has not seen the process die, so it can never hit a reused pid.
"""

from __future__ import annotations

import asyncio
import os

from agent.stdio.stdio import Stdio
from ttrpc import Code, RpcError

__all__ = ["Process"]


class Process:
    """A started (or created) process. `exec_id` is "" for a container's init."""

    def __init__(self, exec_id: str, stdio: Stdio) -> None:
        self.exec_id = exec_id
        self.stdio = stdio
        self.pid = 0
        self.exited: asyncio.Future[int] | None = None

    def born(self, pid: int, exited: asyncio.Future[int]) -> None:
        """The pid is known: from here on signals and waits work."""
        self.pid = pid
        self.exited = exited
        self.stdio.start()
        exited.add_done_callback(lambda _: self.stdio.process_died())

    @property
    def alive(self) -> bool:
        """Whether the process exists and has not been reaped."""
        return self.exited is not None and not self.exited.done()

    def signal(self, number: int) -> None:
        """Raises RpcError: NOT_FOUND when it is gone, INVALID_ARGUMENT for no such signal."""
        if not self.alive:
            raise RpcError(Code.NOT_FOUND, f"process {self.exec_id or 'init'} has ended")
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            raise RpcError(Code.NOT_FOUND, f"process {self.exec_id or 'init'} has ended") from None
        except OSError as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"signal {number}: {error.strerror}") from None

    async def wait(self) -> int:
        """The exit code, 128 + n after signal n."""
        if self.exited is None:
            raise RpcError(Code.FAILED_PRECONDITION, "the process was not created")
        return await asyncio.shield(self.exited)
