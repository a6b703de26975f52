"""A sandbox that was another daemon's: its VM runs, its shim is dead, and we are the next one.

What: `RecoveredSandbox` implements `shim.protocols.Sandbox` for what is there: the VM (`Adopting.adopt`), its
agent, and what the journal records. Its containers go on, are killed, paused, looked at and deleted, and take
execs, as in any other.
Why not `VirtSandbox`: that one knows how it made everything (shares, cards, ports, sizes), and none of it is
written down. Here each thing is released by what the journal says of it, as `delete` would.
Invariants: `take_over` changes nothing but connections: what fails in it leaves the VM as it was. What would
need to know how the VM was made is refused (new containers), or leaves it as large as it is (`resize`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

import ttrpc
from devices.errors import CallerError, GuestError, KataError
from devices.undo import Entry, UndoLog
from devices.vsock import AgentChannel
from hypervisors.base import Adopting, HypervisorState
from proto import oci_pb2
from shim.protocols import Deadlines, GuestContainer, HostUsage, RootfsMount, Takeover
from shim.sandbox.agent_client import GuestAgent
from shim.sandbox.health import Health, HealthSettings
from shim.sandbox.loss import Loss
from shim.sandbox.oom_watch import watch_oom
from shim.state.recoveryfile import SavedSandbox
from shim.state.sandboxes import places_of
from shim.state.trace import Trace

__all__ = ["RecoveredSandbox"]

_SILENT = 0.5  # seconds for a silent guest to unmount its disks
_HEALTH = 10.0  # seconds for the agent's first answer: its guest may have a lot to do

_log = structlog.get_logger("sandbox")


class RecoveredSandbox:
    """See the module's docstring. `tasks`: the TaskGroup that its own tasks live in; `share`: what it shares
    with its guest; `writing`: the containers with disks that they may write."""

    def __init__(
        self,
        sandbox_id: str,
        takeover: Takeover,
        hypervisor: Adopting,
        *,
        state_dir: str,
        share: str,
        undo: UndoLog,
        tasks: asyncio.TaskGroup,
        trace: Trace,
        on_oom: Callable[[str], None],
    ) -> None:
        saved: SavedSandbox = takeover.saved.sandbox
        self.id = sandbox_id
        self.is_pod = saved.is_pod
        self.direct_stdio = saved.direct_stdio
        self.vmm_pid = int(saved.vm["pid"])
        self.writing = set(saved.writing)
        self._saved = saved
        self._deadlines = Deadlines(saved.boot, saved.request, saved.stop, saved.kill)
        self._hypervisor = hypervisor
        self._entries = takeover.entries
        self._share = share
        self._undo = undo
        self._tasks = tasks
        self._trace = trace
        self._on_oom = on_oom
        self._loss = Loss(hypervisor)
        self._health = Health(
            HealthSettings(saved.health_interval, saved.health_timeout, ends=saved.health_ends),
            state_dir,
            evidence=hypervisor.diagnostics,
            give_up=self._loss.give_up,
        )
        self._agent: GuestAgent | None = None
        self._channel: AgentChannel | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stop_lock = asyncio.Lock()
        self._gone = False

    async def take_over(self) -> None:
        """Connect to VMM and agent. Raises KataError, whose phase says how far it came."""
        processes = {
            int(entry.facts["pid"]): entry
            for entry in self._entries()
            if entry.kind == "process" and "pid" in entry.facts
        }
        try:
            await self._hypervisor.adopt(HypervisorState(**self._saved.vm), processes)
        except KataError as error:
            raise error.with_context(phase="recover the VM") from None
        self._watch(self._loss.watch_vm(), "vm")
        try:
            self._channel = await self._hypervisor.get_agent_socket()
            sock, _ = await self._channel.connect(self._saved.agent_port, self._deadlines.request)
            self._agent = GuestAgent(ttrpc.Client(sock), self._deadlines, self._trace)
            await self._agent.check(_HEALTH)
        except KataError as error:
            raise error.with_context(
                phase="recover the agent", details=self._hypervisor.diagnostics()
            ) from None
        self._loss.agent = self._agent

    def watch(self) -> None:
        """Everything is there again: see to it."""
        assert self._agent is not None  # by `take_over`
        self._watch(watch_oom(self._agent, self._on_oom), "oom")
        self._watch(self._loss.watch_agent(), "agent")
        self._watch(self._health.watch(self._agent.check), "health")

    def _watch(self, work: Any, name: str) -> None:
        self._watchers.append(self._tasks.create_task(work, name=f"{name} {self.id}"))

    # --- shim.protocols.Sandbox

    @property
    def agent(self) -> GuestAgent:
        """The agent's client."""
        if self._agent is None:
            raise GuestError("the sandbox is not recovered", phase="agent", code="FAILED_PRECONDITION")
        return self._agent

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
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

    async def start(self) -> None:
        """It runs."""

    async def prepare_container(
        self,
        container_id: str,
        bundle: str,  # noqa: ARG002
        spec: Mapping[str, Any],  # noqa: ARG002
        rootfs: Sequence[RootfsMount],  # noqa: ARG002
    ) -> GuestContainer:
        """Refused: see the module's docstring."""
        raise CallerError(
            f"a recovered sandbox takes no new containers: {container_id} cannot be created in {self.id}",
            phase="create",
            code="FAILED_PRECONDITION",
            hint="remove the pod and create it again",
        )

    async def container_starting(self, container_id: str) -> None:
        """Its network is as it was at its creation."""

    async def container_started(self, container_id: str) -> None:
        """Its poststart hooks, if it had any, went with their shim."""

    async def release_container(self, container_id: str) -> None:
        """What the journal has of it: mounts and directories of its root file system, its poststop hooks.
        Volumes, which others may use, go with the sandbox. Idempotent."""
        self.writing.discard(container_id)
        places = places_of(self._share, container_id)
        for entry in reversed(self._entries()):
            path = str(entry.facts.get("path", ""))
            below = any(path == place or path.startswith(f"{place}/") for place in places)
            if below or (entry.kind == "poststop" and entry.facts.get("container") == container_id):
                await self._release(entry)

    async def _release(self, entry: Entry) -> None:
        try:
            await self._undo.release(entry)
        except Exception as error:  # noqa: BLE001  (it stays in the journal, for `delete`)
            _log.error("not released", kind=entry.kind, facts=entry.facts, error=str(error))

    async def resize(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:  # noqa: ARG002
        """The VM stays as large as it is; the guest has the new limits."""
        _log.info("a recovered VM stays as large as it is", container=container_id)

    async def host_usage(self) -> HostUsage:
        """Of the VMM and its daemons."""
        metrics = await self._hypervisor.get_hypervisor_metrics()
        cpu, memory = metrics.get("cpu_seconds_total", 0.0), metrics.get("resident_bytes", 0.0)
        return HostUsage(int(cpu * 1e9), int(memory))

    async def open_stream(self) -> tuple[socket.socket, int]:
        """A connection for one stdio stream, and the number that names it to the agent."""
        if self._channel is None:
            raise GuestError("the sandbox is not recovered", phase="stdio", code="FAILED_PRECONDITION")
        return await self._channel.open_stream(self._deadlines.request)

    async def stop(self) -> None:
        """End the VM. What the journal still has is released by the daemon, with the rest of it. Never raises
        but for cancellation."""
        async with self._stop_lock:
            if self._gone:
                return
            self._loss.asked = True
            await self._step("unmount its disks", self._unmount_disks())
            await self._step("stop the VM", self._hypervisor.stop_vm())
            if self._agent is not None:
                await self._step("close the agent's connection", self._agent.close())
            for watcher in self._watchers:
                watcher.cancel()
            if self._watchers:
                await asyncio.wait(self._watchers)
            await self._step("clean up after the VMM", self._hypervisor.cleanup())
            self._gone = True

    async def let_go(self) -> None:
        """Recovery failed: drop the connections, and leave the VM to `delete`, or to another try."""
        for watcher in self._watchers:
            watcher.cancel()
        if self._watchers:
            await asyncio.wait(self._watchers)
        if self._agent is not None:
            await self._agent.close()
        await self._hypervisor.disconnect()

    async def _unmount_disks(self) -> None:
        """See `VirtSandbox`: what the guest has written to disks is in its memory still."""
        writing, agent = sorted(self.writing), self._agent
        self.writing.clear()
        if not writing or agent is None or self.died.done():
            return
        async with asyncio.timeout(_SILENT if self.unresponsive else self._deadlines.stop):
            removals = [agent.remove_container(container_id) for container_id in writing]
            for removed in await asyncio.gather(*removals, return_exceptions=True):
                if isinstance(removed, Exception):
                    raise removed

    async def _step(self, what: str, work: Any) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  (stopping goes on past every error)
            text = str(error) or type(error).__name__
            _log.error("stopping the sandbox: step failed", step=what, error=text)
