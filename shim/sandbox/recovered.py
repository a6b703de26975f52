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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from devices.errors import CallerError, KataError
from devices.undo import Entry, UndoLog
from hypervisors.base import Adopting, HypervisorState
from proto import oci_pb2
from shim.protocols import Deadlines, GuestContainer, HostUsage, RootfsMount, Takeover
from shim.sandbox.health import HealthSettings
from shim.sandbox.running import RunningVm
from shim.state.recoveryfile import SavedSandbox
from shim.state.sandboxes import places_of
from shim.state.trace import Trace

__all__ = ["RecoveredSandbox"]

_HEALTH = 10.0  # seconds for the agent's first answer: its guest may have a lot to do

_log = structlog.get_logger("sandbox")


class RecoveredSandbox(RunningVm):
    """See the module's docstring. `vm`: what was saved of it; `share`: what it shares with its guest;
    `writing`: the containers with disks that they may write."""

    def __init__(
        self,
        sandbox_id: str,
        takeover: Takeover,
        hypervisor: Adopting,
        vm: HypervisorState,
        *,
        state_dir: str,
        share: str,
        undo: UndoLog,
        tasks: asyncio.TaskGroup,
        trace: Trace,
        on_oom: Callable[[str], None],
    ) -> None:
        saved: SavedSandbox = takeover.saved.sandbox
        super().__init__(
            sandbox_id,
            hypervisor,
            deadlines=Deadlines(saved.boot, saved.request, saved.stop, saved.kill),
            health=HealthSettings(saved.health_interval, saved.health_timeout, ends=saved.health_ends),
            state_dir=state_dir,
            tasks=tasks,
            trace=trace,
            on_oom=on_oom,
        )
        self.is_pod = saved.is_pod
        self.direct_stdio = saved.direct_stdio
        self.vmm_pid = vm.pid
        self.writing = set(saved.writing)
        self._vm = vm
        self._agent_port = saved.agent_port
        self._adopting = hypervisor
        self._entries = takeover.entries
        self._share = share
        self._undo = undo
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
            await self._adopting.adopt(self._vm, processes)
        except KataError as error:
            raise error.with_context(phase="recover the VM") from None
        self._watch(self._loss.watch_vm(), "vm")
        try:
            self._channel = await self._hypervisor.get_agent_socket()
            agent = await self._connect(self._agent_port)
            await agent.check(_HEALTH)
        except KataError as error:
            raise error.with_context(
                phase="recover the agent", details=self._hypervisor.diagnostics()
            ) from None

    def watch(self) -> None:
        """Everything is there again: see to it."""
        self._watch_guest()
        if self.direct_stdio:
            self._share_localhost(self.vmm_pid)

    # --- shim.protocols.Sandbox

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

    async def stop(self) -> None:
        """End the VM. What the journal still has is released by the daemon, with the rest of it. Never raises
        but for cancellation."""
        async with self._stop_lock:
            if self._gone:
                return
            self._loss.asked = True
            await self._end_vm(self.writing)
            self._gone = True

    async def let_go(self) -> None:
        """Recovery failed: drop the connections, and leave the VM to `delete`, or to another try."""
        await self._end_watchers()
        if self._agent is not None:
            await self._agent.close()
        await self._adopting.disconnect()
