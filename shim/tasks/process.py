"""One process of a container as containerd sees it: its state, its exit, its stdio.

What: the table of what each call may do in each state, and `Process`, which holds one process
to it. The init process of a container and an exec differ only in the table's rows.
Why: containerd's clients probe illegal calls on purpose and act on the error code they get.
Invariants:
- The status changes only along `TABLE`; whatever is not in it is refused.
- A process exits once: `exited` resolves once, with the status 0..255 and the host's time.
- Exit is never told before the start that is under way has been told (`begin_start`, `end_start`).
- The clock of SIGKILL begins once (`condemn`); what holds `lock` is given up when its end is known and the
  guest still owes an answer (`hurry`): nobody waits for a guest behind somebody else.
Source: containerd's task v2 API; the states are runc's shim's (created, running, paused, stopped,
deleted), facts/containerd-shim.md 3.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Mapping

from devices.errors import CallerError, GuestError
from shim.protocols import Exit
from shim.stdio.stdio import Stdio, StdioSpec
from shim.tasks.window import Window

__all__ = ["TABLE", "Call", "Kind", "Process", "Status"]


class Status(enum.Enum):
    """Where a process is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETED = "deleted"


class Call(enum.Enum):
    """What can happen to a process: the calls that depend on its state, and its exit."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    KILL = "kill"
    EXEC = "exec in"
    UPDATE = "update"
    STATS = "read the statistics of"
    EXIT = "exit"
    DELETE = "delete"


class Kind(enum.Enum):
    """Init process of a container, or a process added by Exec."""

    INIT = "container"
    EXEC = "exec"


_C, _R, _P, _S, _D = Status
_ALIVE_UNCHANGED = {_C: _C, _R: _R, _P: _P}

#: kind -> call -> {status in which it is legal: status after it}. Absent means refused. ResizePty,
#: CloseIO, State, Wait, Pids and Connect are legal in every state, so they are not here.
TABLE: Mapping[Kind, Mapping[Call, Mapping[Status, Status]]] = {
    Kind.INIT: {
        Call.START: {_C: _R},
        Call.PAUSE: {_R: _P},
        Call.RESUME: {_P: _R},
        Call.KILL: _ALIVE_UNCHANGED,
        Call.EXEC: {_C: _C, _R: _R},
        Call.UPDATE: _ALIVE_UNCHANGED,
        Call.STATS: {**_ALIVE_UNCHANGED, _S: _S},
        Call.EXIT: {_C: _S, _R: _S, _P: _S},
        Call.DELETE: {_C: _D, _S: _D},
    },
    Kind.EXEC: {
        Call.START: {_C: _R},
        Call.KILL: {_R: _R},
        Call.EXIT: {_C: _S, _R: _S},
        Call.DELETE: {_C: _D, _S: _D},
    },
}


class Process:
    """One process. `exec_id` is empty for the init process.

    `lock` orders Start, Pause, Resume and Delete of this process; State and Kill never take it.
    """

    def __init__(self, container_id: str, exec_id: str, spec: StdioSpec) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.kind = Kind.EXEC if exec_id else Kind.INIT
        self.stdio_spec = spec
        self.stdio: Stdio | None = None
        self.status = Status.CREATED
        self.lock = asyncio.Lock()
        #: Known as soon as the guest says so; `exited` resolves only when output is drained.
        self.ended: Exit | None = None
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.window = Window()
        #: Set with SIGKILL, whatever the guest said to that: from then on its end must come soon.
        self.killed = asyncio.Event()
        #: By the loop's clock: until when the guest may end what was killed, and when its exit must be told.
        self.guests_until = self.told_by = 0.0
        #: The guest did not end it in time.
        self.overdue = False
        self._limit: asyncio.Timeout | None = None
        self._not_starting = asyncio.Event()
        self._not_starting.set()

    @property
    def name(self) -> str:
        """For messages: `container ID` or `exec ID of container ID`."""
        return f"exec {self.exec_id} of {self.container_id}" if self.exec_id else self.container_id

    @property
    def exit(self) -> Exit | None:
        """How it ended, once that has been told."""
        return self.exited.result() if self.exited.done() else None

    def check(self, call: Call) -> Status:
        """The status after `call`; raises CallerError FAILED_PRECONDITION if it is illegal now.

        Kill of a process that has ended raises NOT_FOUND instead: clients take that for success.
        """
        if call is Call.KILL and (self.ended is not None or self.status in {_S, _D}):
            raise CallerError("process already finished: not found", code="NOT_FOUND")
        after = TABLE[self.kind].get(call, {}).get(self.status)
        if after is None:
            raise CallerError(
                f"cannot {call.value} {self.name}: it is {self.status.value}: failed precondition",
                code="FAILED_PRECONDITION",
            )
        return after

    def apply(self, call: Call) -> None:
        """Make the transition of `call`; raises as `check`."""
        self.status = self.check(call)

    def condemn(self, limit: float, patience: float) -> None:
        """SIGKILL is sent: the guest has `patience` seconds, and the exit is told after `limit`. Once."""
        if not self.killed.is_set():
            now = asyncio.get_running_loop().time()
            self.guests_until, self.told_by = now + patience, now + limit
            self.killed.set()

    def seconds_left(self) -> float | None:
        """Until its exit must be told; None while nobody has killed it."""
        if not self.killed.is_set():
            return None
        return max(0.0, self.told_by - asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold `lock` for calls to the guest. Raises GuestError when `hurry` has given them up."""
        async with self.lock:
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    self._limit = limit
                    yield
            except TimeoutError:
                if not limit.expired():
                    raise
                raise GuestError(
                    f"{self.name} has ended, and the guest does not answer", phase="agent", code="ABORTED"
                ) from None
            finally:
                self._limit = None

    def hurry(self, seconds: float) -> None:
        """Whoever holds `lock` now lets go of it after so many seconds at the latest."""
        if self._limit is not None and not self._limit.expired():
            until = asyncio.get_running_loop().time() + seconds
            before = self._limit.when()
            self._limit.reschedule(until if before is None else min(until, before))

    def begin_start(self) -> None:
        """From here to `end_start` the process's exit is not told."""
        self._not_starting.clear()

    def end_start(self) -> None:
        """The start has been told, or has failed."""
        self._not_starting.set()

    async def until_started_or_not(self) -> None:
        """Wait while a start is under way."""
        await self._not_starting.wait()

    def finish(self, ended: Exit) -> bool:
        """Take the exit down: status stopped, waiters released. False if that happened before."""
        if self.exited.done():
            return False
        self.ended = ended
        if self.status is not Status.DELETED:
            self.apply(Call.EXIT)
        self.exited.set_result(ended)
        return True
