"""The ends of one container's processes: seen, followed by what depends on them, and told once.

What: `Exits.watch` waits for one process's end (`shim.tasks.exit_status`), takes its last output, ends what
runs beside an init process, lets the sandbox follow, and publishes the exit.
Why apart from the container: its calls ask for ends; this is what happens when one comes, asked for or not.
Invariants:
- An exit is told once, after the start that is under way, after the execs of an init process, and after the
  VM that ends with it; but of what was killed not later than its time is over (`Process.condemn`).
- What was told without the guest's word has no output any more: its readers see the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

import structlog

from shim.protocols import VM_DEATH, Exit, Sandbox
from shim.stdio.stdio import DRAIN_IDLE, DRAIN_TOTAL
from shim.tasks.exit_status import KILLED, Word, exit_status
from shim.tasks.process import Kind, Process, Status
from shim.tasks.signals import Signals
from shim.tasks.task_events import TaskEvents

__all__ = ["EXEC_GRACE", "Exits"]

EXEC_GRACE = 1.0
"""Seconds for all execs of a container to follow its end."""
#: Seconds without progress, and in total, for output out of a VM that is dead or does not answer.
_DEAD_DRAIN = (0.2, 0.5)

_log = structlog.get_logger("container")


class Exits:
    """Those of one container. `execs`: its own table. `quieted` is awaited after the output of its init
    process is drained, before that exit is told."""

    def __init__(
        self,
        sandbox: Sandbox,
        execs: Mapping[str, Process],
        signals: Signals,
        events: TaskEvents,
        ending: Callable[[], None],
        quieted: Callable[[], Awaitable[None]],
    ) -> None:
        self._sandbox = sandbox
        self._execs = execs
        self._signals = signals
        self._events = events
        self._ending = ending
        self._quieted = quieted
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, process: Process) -> None:
        """The guest has it now."""
        self._keep(asyncio.create_task(self._surely(process), name=f"exit of {process.name}"))

    def tell(self, process: Process, ended: Exit) -> None:
        """Publish its exit, unless that was done."""
        if process.finish(ended):
            self._events.exited(process, ended)

    async def close(self) -> None:
        """Wait for nobody's end any more. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _surely(self, process: Process) -> None:
        """Whatever goes wrong on the way, the exit is told."""
        try:
            await self._see(process)
        except Exception:  # noqa: BLE001  (see above)
            _log.exception("what follows from an exit failed", process=process.name)
            self.tell(process, process.ended or Exit.now(VM_DEATH))

    async def _see(self, process: Process) -> None:
        watched = monotonic()
        status, word = await exit_status(self._sandbox, process)
        process.ended, seen = Exit.now(status), monotonic()
        if word is Word.OVERDUE:
            process.overdue = True
            self._sandbox.doubt(f"it did not end {process.name} after SIGKILL")
        if (left := process.seconds_left()) is not None:
            process.hurry(0.0 if process.overdue else left)  # a start that the guest does not answer
        init = process.kind is Kind.INIT
        if init and word is Word.GUEST:
            self._ending()
        if init and not self._sandbox.died.done():
            await self._end_execs(ask=word is Word.GUEST)
        await self._drain(process, word)
        if not init:
            self._sandbox.mark("exec.process", f"{process.container_id}/{process.exec_id}", watched, seen)
            self._sandbox.mark("exec.output", f"{process.container_id}/{process.exec_id}", seen, monotonic())
        dead = self._sandbox.died.done()
        if init and not dead:
            await self._follow(process)
        await process.until_started_or_not()
        self.tell(process, process.ended)
        if init:
            for exec_ in self._execs.values():
                if exec_.status is Status.CREATED and not exec_.lock.locked():
                    exec_.finish(Exit.now(KILLED))  # it can never run: nobody is to wait for it
            if dead:
                await self._quieted()

    async def _drain(self, process: Process, word: Word) -> None:
        """Take its last output, as long as there is any hope of it, and time."""
        assert process.stdio is not None
        limits: tuple[float, float] | None = None
        if word is not Word.GUEST:
            limits = _DEAD_DRAIN
        elif (left := process.seconds_left()) is not None:  # what follows needs time as well
            limits = (DRAIN_IDLE, min(DRAIN_TOTAL, left / 2))
        if not await process.stdio.drain(limits):
            _log.warning("output was not taken in time; the exit is told without it", process=process.name)
            if word is not Word.GUEST:
                await process.stdio.cut()

    async def _follow(self, process: Process) -> None:
        """What follows from its end (`quieted`), as long as there is time before it must be told."""
        work = asyncio.ensure_future(self._quieted())
        self._keep(work)
        _, late = await asyncio.wait([work], timeout=process.seconds_left())
        if late:
            _log.error("the exit is told before its VM has ended", process=process.name)

    async def _end_execs(self, *, ask: bool) -> None:
        """The init process has gone: what runs beside it goes too, and is told before it."""
        for exec_ in self._execs.values():
            exec_.hurry(EXEC_GRACE)
        running = [exec_ for exec_ in self._execs.values() if exec_.status is Status.RUNNING]
        await self._signals.end(running, EXEC_GRACE, ask=ask)
        for process in running:
            self.tell(process, process.ended or Exit.now(KILLED))
