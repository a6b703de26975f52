"""A sandbox's VM while it runs: whom its containers ask, how its loss is seen, and the first part of its end.

What: `RunningVm` has agent, channel, health and loss of one VM, and the tasks that watch them. `VirtSandbox`
begins as one by booting a VM, `RecoveredSandbox` by taking one over.
Why one: what is asked of a VM that runs does not depend on how we came to it.
Invariants: `died` resolves once, within moments of the VMM's death; nothing here waits for the guest without
a deadline.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import structlog

import ttrpc
from devices.errors import GuestError
from devices.vsock import AgentChannel
from hypervisors.base import Hypervisor
from shim.protocols import Deadlines
from shim.sandbox.agent_client import GuestAgent
from shim.sandbox.health import Health, HealthSettings
from shim.sandbox.loss import Loss
from shim.sandbox.oom_watch import watch_oom
from shim.state.trace import Trace

__all__ = ["RunningVm"]

_SETTLE = 1.0  # seconds: what else a pod starts comes before its localhost
_SILENT = 0.5  # seconds for a silent guest to unmount its disks

_log = structlog.get_logger("sandbox")


class RunningVm:
    """See the module's docstring. `tasks`: the TaskGroup that the sandbox's own tasks live in."""

    def __init__(
        self,
        sandbox_id: str,
        hypervisor: Hypervisor,
        *,
        deadlines: Deadlines,
        health: HealthSettings,
        state_dir: str,
        tasks: asyncio.TaskGroup,
        trace: Trace,
        on_oom: Callable[[str], None],
    ) -> None:
        #: The sandbox's id: the container's own, or the pod's.
        self.id = sandbox_id
        self._hypervisor = hypervisor
        self._deadlines = deadlines
        self._tasks = tasks
        self._trace = trace
        self._on_oom = on_oom
        self._loss = Loss(hypervisor)
        self._health = Health(health, state_dir, evidence=hypervisor.diagnostics, give_up=self._loss.give_up)
        self._agent: GuestAgent | None = None
        self._channel: AgentChannel | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._localhost_shared = False

    # --- shim.protocols.Sandbox

    @property
    def agent(self) -> GuestAgent:
        """The agent's client; only while there is a connection."""
        if self._agent is None:
            raise GuestError("the sandbox is not running", phase="agent", code="FAILED_PRECONDITION")
        return self._agent

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called: this object serves no longer."""
        return self._loss.asked

    @property
    def died(self) -> asyncio.Future[str]:
        """Resolves to the reason when the VM is gone without our asking."""
        return self._loss.died

    @property
    def kill_limit(self) -> float:
        """See `shim.protocols.Sandbox.kill_limit`."""
        return self._deadlines.kill

    @property
    def unresponsive(self) -> bool:
        """See `shim.protocols.Sandbox.unresponsive`."""
        return self._health.unresponsive

    def doubt(self, why: str) -> None:
        """See `shim.protocols.Sandbox.doubt`."""
        if self._loss.lives:
            self._health.doubt(why)

    def mark(self, phase: str, id: str, start: float, end: float) -> None:  # noqa: A002
        """See `shim.protocols.Sandbox.mark`."""
        self._trace.mark(phase, start, end, id=id)

    async def open_stream(self) -> tuple[socket.socket, int]:
        """A connection for one stdio stream, and the number that names it to the agent."""
        if self._channel is None:
            raise GuestError("the sandbox is not running", phase="stdio", code="FAILED_PRECONDITION")
        return await self._channel.open_stream(self._deadlines.request)

    # --- for the sandbox itself

    async def _connect(self, port: int) -> GuestAgent:
        """Have the agent's connection, over the channel that is there. Raises KataError."""
        assert self._channel is not None
        sock, _ = await self._channel.connect(port, self._deadlines.request)
        self._agent = self._loss.agent = GuestAgent(ttrpc.Client(sock), self._deadlines, self._trace)
        return self._agent

    def _watch(self, work: Any, name: str) -> None:
        self._watchers = [watcher for watcher in self._watchers if not watcher.done()]
        self._watchers.append(self._tasks.create_task(work, name=f"{name} {self.id}"))

    def _watch_guest(self) -> None:
        """All that is told or asked of a guest while it runs."""
        agent = self.agent
        self._watch(watch_oom(agent, self._on_oom), "oom")
        self._watch(self._loss.watch_agent(), "agent")
        self._watch(self._health.watch(agent.check), "health")

    def _share_localhost(self, pid: int) -> None:
        """From now on, soon: what dials localhost in the VMM's network namespace reaches the guest's.
        Idempotent."""
        if not self._localhost_shared and not self.stopped and self._loss.lives:
            self._localhost_shared = True
            self._watch(self._localhost(pid), "localhost")

    async def _localhost(self, pid: int) -> None:
        await asyncio.sleep(_SETTLE)
        from shim.resources.network.loopback import mirror  # not on the start path

        await mirror(pid, self.agent, self.open_stream)

    async def _end_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        if self._watchers:
            await asyncio.wait(self._watchers)
        self._watchers.clear()

    async def _unmount_disks(self, writing: set[str]) -> None:
        """What the guest has written to disks is in its memory still: those of the containers `writing`
        (emptied here) are unmounted there, all at once."""
        names, agent = sorted(writing), self._agent
        writing.clear()
        if not names or agent is None or self.died.done():
            return
        async with asyncio.timeout(_SILENT if self.unresponsive else self._deadlines.stop):
            removals = [agent.remove_container(container_id) for container_id in names]
            for removed in await asyncio.gather(*removals, return_exceptions=True):
                if isinstance(removed, Exception):
                    raise removed

    async def _end_vm(self, writing: set[str]) -> None:
        """Disks, VM, the agent's connection, watchers: each past the errors of the one before."""
        await self._step("unmount its disks", self._unmount_disks(writing))
        # The VM before all else: whoever waits for a container's exit waits for this.
        await self._step("stop the VM", self._hypervisor.stop_vm())
        if self._agent is not None:
            await self._step("close the agent's connection", self._agent.close())
        await self._end_watchers()
        await self._step("clean up after the VMM", self._hypervisor.cleanup())

    async def _step(self, what: str, work: Any) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  (stopping goes on past every error)
            text = str(error) or type(error).__name__
            _log.error("stopping the sandbox: step failed", step=what, error=text)
