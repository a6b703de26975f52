"""Signals to the processes of one container, whatever its guest does with them.

What: `Signals.send` has the agent deliver one; `condemn` starts the clock of a SIGKILL; `end` ends the execs
of an init process that is gone, all under one deadline.
Why: kill(2) takes a moment, and does not fail because a process is busy; a guest can be late, silent or
wrong. Who sends SIGTERM must come to send SIGKILL (the CRI plugin gives a stop up when its first signal
fails), and who sends SIGKILL must get an exit.
Invariants:
- `send` answers within `ANSWER` seconds. If the guest has not by then, the signal is on its way: the call
  goes on behind the caller's back, and what becomes of it is logged.
- SIGKILL's clock begins before the guest is asked, and runs whatever it answers. No answer makes SIGKILL fail
  but that the process has ended already.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable, Sequence
from typing import Any

import structlog

from devices.errors import CallerError, KataError
from shim.protocols import Sandbox
from shim.tasks.process import Process

__all__ = ["ANSWER", "Signals"]

ANSWER = 1.0
"""Seconds for the guest to say what it thinks of a signal, before the caller is answered without."""
_RESERVE = 2.0  # seconds of a kill's limit that are ours: to end a VM, and to take the last output
_KNOWN_BAD = 1.0  # seconds that a guest gets which is known not to answer

_log = structlog.get_logger("container")


class Signals:
    """The signals to one container's processes that are under way."""

    def __init__(self, sandbox: Sandbox, container_id: str) -> None:
        self._sandbox = sandbox
        self._id = container_id
        self._calls: set[asyncio.Task[None]] = set()

    def condemn(self, processes: Iterable[Process]) -> None:
        """SIGKILL is about to be sent to them: from now on they have an end, with the guest or without it."""
        limit = self._sandbox.kill_limit
        patience = limit - min(_RESERVE, limit / 2)
        if self._sandbox.unresponsive:
            patience = min(patience, _KNOWN_BAD)
        for process in processes:
            process.condemn(limit, patience)

    async def send(self, process: Process, target: str, number: int) -> None:
        """Send `number`. `target`: the agent's exec id, "" for each process of the container.

        Raises CallerError NOT_FOUND if the process has ended, and, but for SIGKILL, what the agent refuses.
        """
        call = self._call(target, number)
        either: list[asyncio.Future[Any]] = [call, process.exited]
        await asyncio.wait(either, timeout=ANSWER, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            if not process.exited.done():
                _log.warning("the guest has not taken a signal yet", process=process.name, signal=number)
            return
        if call.cancelled() or (error := call.exception()) is None:
            return
        if not isinstance(error, KataError):
            raise error
        if error.code == "NOT_FOUND" or process.ended is not None or self._sandbox.died.done():
            raise CallerError("process already finished: not found", code="NOT_FOUND") from error
        if number != signal.SIGKILL:
            raise error
        _log.warning("the guest did not take SIGKILL", process=process.name, error=str(error))

    async def end(self, execs: Sequence[Process], seconds: float, *, ask: bool) -> None:
        """Until these have told their exits, `seconds` at most in all; `ask`: the guest is to kill them."""
        if not execs:
            return
        calls = [self._call(one.exec_id, signal.SIGKILL) for one in execs if ask and one.ended is None]
        await asyncio.wait([one.exited for one in execs], timeout=seconds)
        for call in calls:
            call.cancel()

    async def close(self) -> None:
        """Forget what is under way. Idempotent."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)

    def _call(self, target: str, number: int) -> asyncio.Task[None]:
        call = asyncio.create_task(self._signal(target, number))
        self._calls.add(call)
        call.add_done_callback(self._done)
        return call

    async def _signal(self, target: str, number: int) -> None:
        await self._sandbox.agent.signal_process(self._id, target, number)

    def _done(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        if not call.cancelled() and (error := call.exception()) is not None:
            _log.debug("a signal was not delivered", container=self._id, error=str(error))
