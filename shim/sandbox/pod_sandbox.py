"""The life of a sandbox that containerd makes by the Sandbox API: without a container of its own.

What: the table of what each call may do in each state, and `PodSandbox`, which holds the sandbox to
it, starts the VM, sees its end and ends it.
Why apart from the containers: they come and go by the Task service; here nothing but StopSandbox and
ShutdownSandbox, or its own death, ends the VM.
Invariants:
- The state changes only along `TABLE`; whatever is not in it is refused.
- It ends once: `ended` resolves once, with a status (0: it was stopped, 255: it died or never came
  up) and the host's time, and never back.
- A start runs to its end even if its caller is gone: who asks again waits for the same one. A stop
  ends a start under way.
- After the end nothing of the VM is left on the host, whoever caused it; containers that were in it
  have told their exits before.
Source: containerd's sandbox v1 API; facts/containerd-shim.md 3.2.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Mapping
from typing import Protocol

import structlog

from devices.errors import CallerError, KataError
from shim.protocols import VM_DEATH, Exit, GuestContainer
from shim.sandbox.pod_config import pause_spec
from shim.sandbox.sandbox import VirtSandbox
from shim.spec.oci import spec_from_json

__all__ = ["TABLE", "Call", "PodSandbox", "State"]

_log = structlog.get_logger("pod")


class State(enum.Enum):
    """Where a sandbox is in its life. CREATED includes its boot."""

    CREATED = "created"
    READY = "ready"
    STOPPED = "stopped"


class Call(enum.Enum):
    """The calls that depend on its state; Status, Wait, Platform and Shutdown are legal in each."""

    START = "start"
    STOP = "stop"
    PING = "ping"
    METRICS = "measure"
    ADD = "create a container in"


_C, _R, _S = State

#: call -> {state in which it is legal: state after it}. Absent means refused.
TABLE: Mapping[Call, Mapping[State, State]] = {
    Call.START: {_C: _R, _R: _R},
    Call.STOP: {_C: _S, _R: _S, _S: _S},
    Call.PING: {_R: _R},
    Call.METRICS: {_R: _R},
    Call.ADD: {_R: _R},
}

#: Seconds for the exits of the containers of a dead VM to be told before what is left of it goes.
_DEATH_GRACE = 5.0
#: The same of a VM that was stopped under them, because its guest did not end them.
_STOP_GRACE = 1.0


class Tenants(Protocol):
    """The containers in it, which its end concerns: a part of `shim.tasks.container_manager`."""

    async def end_all(self, grace: float) -> None:
        """SIGTERM to all, SIGKILL after `grace` seconds (0: at once), and their exits; bounded."""
        ...

    async def all_quiet(self, limit: float) -> None:
        """Until the exits of all are told, `limit` seconds at most."""
        ...

    async def stop_sandbox(self, sandbox: VirtSandbox) -> None:
        """End the VM; whatever goes wrong is logged."""
        ...


class PodSandbox:
    """One sandbox. `tasks` is where its own task lives, `tenants` are its containers."""

    def __init__(self, sandbox: VirtSandbox, tenants: Tenants, tasks: asyncio.TaskGroup) -> None:
        self.sandbox = sandbox
        self.state = State.CREATED
        #: Nanoseconds of the host's clock at which it was ready; 0 before.
        self.started_at = 0
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self._tenants = tenants
        self._tasks = tasks
        self._up: asyncio.Future[None] = loop.create_future()
        self._life: asyncio.Task[None] | None = None
        self._stop: asyncio.Task[None] | None = None

    def check(self, call: Call) -> State:
        """The state after `call`; raises CallerError FAILED_PRECONDITION if it is illegal now."""
        state = self.state if self._stop is None else State.STOPPED  # whoever stops it is not overtaken
        after = TABLE[call].get(state)
        if after is None:
            raise CallerError(
                f"cannot {call.value} sandbox {self.sandbox.id}: it is {state.value}: failed precondition",
                code="FAILED_PRECONDITION",
            )
        return after

    def admit(self, container_id: str) -> VirtSandbox:
        """The sandbox for a container that is to be created in it."""
        if container_id == self.sandbox.id:
            raise CallerError(f"{container_id} is the sandbox: already exists", code="ALREADY_EXISTS")
        self.check(Call.ADD)
        return self.sandbox

    async def start(self) -> None:
        """Boot the VM; at once if that was done. Raises what the boot raises, and then has ended."""
        self.check(Call.START)
        if self._life is None:
            self._life = self._tasks.create_task(self._live(), name=f"life of {self.sandbox.id}")
        await asyncio.shield(self._up)

    async def _live(self) -> None:
        try:
            await self.sandbox.start()
            await self._hold_pids()
            self.check(Call.START)  # a stop may have come with its last step
        except KataError as error:
            await self._tenants.stop_sandbox(self.sandbox)
            self._end(VM_DEATH if self._stop is None else 0)
            self._up.set_exception(error)
            self._up.exception()  # its caller may be gone, which is no reason for asyncio to complain
            return
        self.started_at = time.time_ns()
        self.state = State.READY
        self._up.set_result(None)
        reason = await asyncio.shield(self.sandbox.died)
        _log.error("the sandbox has died", sandbox=self.sandbox.id, reason=reason)
        self._end(VM_DEATH)
        await self._tenants.all_quiet(_DEATH_GRACE)
        await self._tenants.stop_sandbox(self.sandbox)

    async def _hold_pids(self) -> None:
        settings = self.sandbox.settings
        # Our agent has a pause of its own; another one would need an image's.
        if settings.pod is not None and settings.pod.shared_pids and settings.direct_stdio:
            spec, _ = spec_from_json(pause_spec(settings.hostname))
            await self.sandbox.agent.create_container(
                self.sandbox.id, GuestContainer(spec=spec, sandbox_pidns=True)
            )
            await self.sandbox.agent.start_container(self.sandbox.id)

    async def stop(self, grace: float) -> None:
        """End the containers and the VM. Idempotent.

        `grace`: seconds that containers which still run are given after SIGTERM; 0 kills them at once.
        """
        self.check(Call.STOP)
        if self._stop is None:
            self._stop = self._tasks.create_task(self._stop_all(grace), name=f"stop of {self.sandbox.id}")
        await asyncio.shield(self._stop)

    async def _stop_all(self, grace: float) -> None:
        if self.state is State.READY:
            await self._tenants.end_all(grace)
        await self._tenants.stop_sandbox(self.sandbox)
        await self._tenants.all_quiet(_STOP_GRACE)
        if self._life is not None:
            if self._up.done():
                self._life.cancel()  # it waits for a death that cannot come any more
            await asyncio.wait([self._life])
        self._end(0)

    def _end(self, status: int) -> None:
        if not self.ended.done():
            self.state = State.STOPPED
            self.ended.set_result(Exit.now(status))

    async def wait(self) -> Exit:
        """How it ended, as soon as it has."""
        return await asyncio.shield(self.ended)
