"""One sandbox: a VM, the agent in it, the directory they share, and the order in which these begin and end.

What: `VirtSandbox` implements `shim.protocols.Sandbox`. `start` goes through the phases share, vmm,
boot, agent; `stop` releases all of them in reverse.
Why one class: the phases depend on each other, and an error in any of them must be told with what
the VMM and the guest's console said last, and must leave nothing behind.
Invariants:
- `start` runs once, in the sandbox's own task; callers wait for it and may go away.
- `died` resolves within moments of the VMM's death, whoever waits for what (`shim.sandbox.loss`).
- `stop` does not need the guest: each step has a deadline (docs/endings.md has their sum).
- After `stop` nothing of the sandbox is left on the host; `stop` may be called at any time, also
  while `start` is under way, and any number of times.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import structlog

from devices.config import ShareFsConfig
from devices.errors import BugError, GuestError, HostError, HypervisorError, KataError
from devices.manager import DeviceManager
from devices.threads import look
from devices.undo import UndoLog
from hypervisors.base import Hosted, Hypervisor
from proto import agent_pb2, oci_pb2
from shim.protocols import GuestContainer, HostUsage, RootfsMount
from shim.resources.container_files import ContainerFiles, SharedFiles
from shim.resources.host_cgroup import HostCgroup
from shim.resources.network.pod import PodNetwork
from shim.resources.shared_dir import SharedDir
from shim.resources.sizing import Sizing
from shim.sandbox.container_resources import ContainerResources
from shim.sandbox.host_files import read_dns, resolv_conf
from shim.sandbox.running import RunningVm
from shim.sandbox.settings import SandboxSettings
from shim.spec.guest_spec import GUEST_SHM
from shim.spec.limits import Size
from shim.state.bundle import OWN
from shim.state.trace import Trace

if TYPE_CHECKING:
    from hypervisors.base import Restoring
    from shim.resources.guest_swap import GuestSwap
    from shim.resources.network.dan import DanNetwork

__all__ = ["VirtSandbox"]

#: Seconds for a guest to show that it can let go of devices.
_PULSE = 2.0

_log = structlog.get_logger("sandbox")


class VirtSandbox(RunningVm):
    """See the module's docstring."""

    def __init__(
        self,
        settings: SandboxSettings,
        hypervisor: Hypervisor,
        *,
        undo: UndoLog,
        tasks: asyncio.TaskGroup,
        trace: Trace,
        on_oom: Callable[[str], None],
    ) -> None:
        super().__init__(
            settings.sandbox_id,
            hypervisor,
            deadlines=settings.deadlines,
            health=settings.health,
            state_dir=settings.state_dir,
            tasks=tasks,
            trace=trace,
            on_oom=on_oom,
        )
        self.settings = settings
        #: Awaited when all of it runs.
        self.on_up: Callable[[], Awaitable[None]] | None = None
        self._devices = DeviceManager(settings.disks.driver)
        self._undo = undo
        self._swap: GuestSwap | None = None
        self._network: PodNetwork | DanNetwork = PodNetwork(
            settings.network, hypervisor, self._devices, undo, trace
        )
        self._cgroup = HostCgroup(settings.cgroup, undo) if settings.cgroup is not None else None
        self._emulated = False
        self._doubtful = False
        self._sizing = Sizing(
            settings.bounds,
            hypervisor,
            lambda: self.agent,
            lambda work: self._watch(work, "shrink"),
            self._make_room,
        )
        self._files: ContainerFiles
        shares = [device for device in settings.devices if isinstance(device, ShareFsConfig)]
        if shares:
            self._files = SharedFiles(SharedDir(settings.share_path, undo, roots_apart=len(shares) > 1))
        elif settings.hosted:
            from shim.resources.pulled_files import PulledFiles

            self._files = PulledFiles(lambda: self.agent)
        else:
            from shim.resources.block_files import BlockFiles  # not on the usual start path

            self._files = BlockFiles(
                settings.key, self._devices, hypervisor, undo, lambda: self.agent, style=settings.disks
            )
        self._containers = ContainerResources(
            settings,
            hypervisor,
            self._devices,
            files=self._files,
            sizing=self._sizing,
            undo=undo,
            trace=trace,
            agent=lambda: self.agent,
            rescan=self._rescan,
            spawn=lambda work: self._watch(work, "watched volumes"),
        )
        self._vmm_pid = 0
        self._resolv_confs: dict[str, str] = {}  # container -> on the host
        self._resolves = False
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._ready.add_done_callback(_retrieve)
        self._boot: asyncio.Task[None] | None = None
        self._stop_lock = asyncio.Lock()

    # --- shim.protocols.Sandbox

    @property
    def vmm_pid(self) -> int:
        """The VMM's pid on the host."""
        return self._vmm_pid

    @property
    def hypervisor(self) -> Hypervisor:
        """What runs the VM; for looking, not for changing."""
        return self._hypervisor

    @property
    def writing(self) -> set[str]:
        """The containers with disks that they may write."""
        return self._containers.writing

    @property
    def size(self) -> Size:
        """The VM's vCPUs and bytes of memory, as they are now."""
        return self._sizing.size

    @property
    def template_failed(self) -> bool:
        """Whether it was the template that the start did not get over."""
        return self._doubtful and not self.stopped

    async def check(self, timeout: float) -> None:
        """Raise KataError unless VMM and agent answer now, each within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._hypervisor.check()
        except TimeoutError:
            raise HypervisorError(f"the VMM did not answer within {timeout:g} s", phase="vm") from None
        await self.agent.check(timeout)

    @property
    def direct_stdio(self) -> bool:
        """Whether stdio goes over vsock connections of its own."""
        return self.settings.direct_stdio

    async def start(self) -> None:
        """Boot to a ready agent. Raises KataError with phase, cause, evidence and hint."""
        if self.stopped:
            raise GuestError("the sandbox has been stopped", phase="boot", code="FAILED_PRECONDITION")
        if self._boot is None:
            self._boot = self._tasks.create_task(self._start_once(), name=f"boot {self.id}")
        await asyncio.shield(self._ready)

    async def prepare_container(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], rootfs: Sequence[RootfsMount]
    ) -> GuestContainer:
        """See `shim.sandbox.container_resources.ContainerResources.prepare`."""
        before = self.size.vcpus
        self._resolv_confs[container_id] = resolv_conf(spec)
        made = await self._containers.prepare(container_id, bundle, spec, rootfs)
        if self.size.vcpus > before:
            self._watch(self._follow(), "cgroup")
        return made

    async def container_starting(self, container_id: str) -> None:
        """See `shim.protocols.Sandbox.container_starting`."""
        await self._rescan()
        if self.direct_stdio and not self._resolves and not self._localhost_shared:
            await self._resolve(self._resolv_confs.get(container_id, ""))

    async def container_started(self, container_id: str) -> None:
        """Run the poststart hooks; with the first one the pod's localhost becomes the guest's, too, and the
        network is followed."""
        if self.direct_stdio:
            self._share_localhost(self._vmm_pid)
        self._network.follow(lambda: self._agent if self._loss.lives else None)
        await self._containers.started(container_id)

    async def release_container(self, container_id: str) -> None:
        """Undo `prepare_container`. Idempotent."""
        self._resolv_confs.pop(container_id, None)
        alive = await self._answers() if self._containers.plugged(container_id) else self._loss.lives
        await self._containers.release(container_id, alive=alive)

    async def resize(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """See `shim.protocols.Sandbox.resize` and `shim.resources.sizing`."""
        before = self.size.vcpus
        await self._sizing.fit(container_id, resources, strict=True)
        if self.size.vcpus > before:
            self._watch(self._follow(), "cgroup")

    @property
    def is_pod(self) -> bool:
        """Whether its own container is a pod's sandbox container."""
        return self.settings.container_type == OWN

    async def host_usage(self) -> HostUsage:
        """Of the VMM and its daemons, by the hypervisor's own account."""
        metrics = await self._hypervisor.get_hypervisor_metrics()
        cpu, memory = metrics.get("cpu_seconds_total", 0.0), metrics.get("resident_bytes", 0.0)
        return HostUsage(int(cpu * 1e9), int(memory))

    async def stop(self) -> None:
        """End the VM, and release everything. Never raises but for cancellation."""
        async with self._stop_lock:
            if self.stopped and self._boot is None:
                return
            self._loss.asked = True
            with self._trace.phase("vmm.stop"):
                await self._tear_down()
            self._boot = None
            self._trace.flush()

    # --- the phases

    async def _start_once(self) -> None:
        try:
            async with asyncio.timeout(self.settings.deadlines.boot + self.settings.deadlines.request):
                await self._start_phases()
        except asyncio.CancelledError:
            self._fail(GuestError("the sandbox was stopped while it booted", phase="boot", code="CANCELLED"))
            raise
        except KataError as error:
            self._fail(error)
        except TimeoutError:
            self._fail(
                GuestError("the sandbox did not start in time", phase="boot", code="DEADLINE_EXCEEDED")
            )
        except OSError as error:  # of what no one expected to fail: no descriptors, no room, a broken disk
            self._fail(HostError(str(error), phase="boot"))
        except MemoryError:
            self._fail(HostError("no memory is left for the shim", phase="boot"))
        except Exception as error:  # noqa: BLE001  (whatever it is, whoever waits must hear of it)
            _log.exception("sandbox start failed")
            self._fail(BugError(f"{type(error).__name__}: {error}", phase="boot"))
        else:
            if not self._ready.done():
                self._ready.set_result(None)
        self._trace.flush()

    def _fail(self, error: KataError) -> None:
        error.with_context(phase="boot", details=self._hypervisor.diagnostics())
        _log.error("sandbox start failed", error=str(error), owner=error.owner)
        if not self._ready.done():
            self._ready.set_exception(error)

    async def _start_phases(self) -> None:
        settings, hypervisor = self.settings, self._hypervisor
        if self._cgroup is not None:
            with self._trace.phase("cgroup"):
                await self._cgroup.open()
        with self._trace.phase("share"):
            await self._files.set_up()
        if settings.network.dan:
            await self._attach_directly(settings.network.dan)
        with self._trace.phase("vmm.start"):
            if settings.hosted:
                await cast("Hosted", hypervisor).for_pod(settings.annotations)
            await hypervisor.prepare_vm(self.id, await self._network.open())
            for device in settings.devices:
                await self._devices.try_add_device(device, hypervisor)
            await self._containers.plug_first()
            if settings.template:
                self._doubtful = True
                # Its cards come when it runs: the template has none.
                await cast("Restoring", hypervisor).restore_vm(settings.template, settings.deadlines.boot)
            else:
                await self._network.plug()
                await hypervisor.start_vm(settings.deadlines.boot)
        self._vmm_pid = await hypervisor.get_vmm_master_tid()
        self._watch(self._loss.watch_vm(), "vm")
        self._watch(self._follow(), "cgroup")
        self._channel = await hypervisor.get_agent_socket()
        await self._network.join()
        with self._trace.phase("vmm.boot"):
            await self._channel.wait_ready(settings.deadlines.boot)
        with self._trace.phase("agent.connect"):
            agent = await self._connect(settings.agent_port)
        if settings.template:
            from shim.sandbox.clone import make_own

            with self._trace.phase("agent.make_own"):
                await make_own(agent)
            self._doubtful = False
        with self._trace.phase("agent.create_sandbox"):
            await agent.create_sandbox(
                sandbox_id=self.id,
                hostname=settings.hostname,
                dns=settings.dns,
                storages=[*self._files.sandbox_storages(), _shm_storage(settings.shm_size)],
                guest_hook_path=settings.guest_hook_path,
                kernel_modules=[*settings.disks.modules(), *map(_module, settings.kernel_modules)],
            )
        if settings.template:
            await self._rescan()
        else:
            await self._network.configure(agent)
        if settings.swap is not None:
            from shim.resources.guest_swap import GuestSwap  # not on the usual start path

            self._swap = GuestSwap(settings.swap, settings.key, self._undo)
            with self._trace.phase("swap"):
                await self._swap.start(self._devices, hypervisor, agent)
        self._watch_guest()
        await self._make_room(self._sizing.share)
        if self.on_up is not None:
            await self.on_up()

    async def _follow(self) -> None:
        """Whatever of the VM is not charged to the pod yet."""
        if self._cgroup is None:
            return
        try:
            vcpus = (await self._hypervisor.get_thread_ids()).vcpus.values()
            self._emulated = (await self._hypervisor.save_state()).accelerator == "tcg"
            await self._cgroup.follow(await self._hypervisor.get_pids(), vcpus)
        except KataError as error:
            _log.debug("not charged to the pod's cgroup: the VM is gone", error=str(error))

    async def _make_room(self, size: Size) -> None:
        """The VM is to have this size: its cgroup must not stand in the way."""
        if self._cgroup is not None:
            await self._cgroup.limit(size, emulated=self._emulated)

    async def _attach_directly(self, path: str) -> None:
        """If there is this file, the network is what it says, and not what is in the pod's namespace."""
        there: bool = await look(lambda: os.path.exists(path))
        if not there:
            return
        from shim.resources.network.dan import DanNetwork, read

        dan = await look(read, path)
        if dan is not None:
            settings = self.settings.network
            self._network = DanNetwork(dan, settings, self._hypervisor, self._devices, self._trace)

    async def _rescan(self) -> None:
        await self._network.rescan(self.agent)

    async def _resolve(self, source: str) -> None:
        """If its resolv.conf names servers of the namespace's loopback, as Docker's does, the guest asks us.
        Read now: whoever makes the network writes it between Create and Start. Only with the first container:
        afterwards it may be our own relay that answers at 127.0.0.1."""
        lines = await look(read_dns, source) if source else ()
        if not any(line.startswith("nameserver") and "127." in line for line in lines):
            return
        from shim.resources.network.resolver import loopback_servers, set_up

        with self._trace.phase("agent.resolve"):
            work = await set_up(self._vmm_pid, loopback_servers(lines), self.agent, self.open_stream)
        if work is not None:
            self._resolves = True
            self._watch(work, "resolver")

    async def _answers(self) -> bool:
        """Whether the guest can let go of something now: it is asked, unless it is known that it cannot."""
        if not self._loss.lives or self.unresponsive or self._agent is None:
            return False
        try:
            await self._agent.check(_PULSE)
        except KataError as error:
            self.doubt(f"it did not answer within {_PULSE:g} s: {error.cause}")
            return False
        return True

    async def _tear_down(self) -> None:
        if self._boot is not None and not self._boot.done():
            self._boot.cancel()
            await asyncio.wait([self._boot])
        await self._step("stop serving volumes", self._containers.end_management())
        await self._end_vm(self._containers.writing)
        self._devices.close()
        if self._swap is not None:
            await self._step("remove its swap", self._swap.close())
        for error in [
            *await self._containers.close(),
            *await self._network.close(),
            *await self._files.tear_down(),
            *(await self._cgroup.close() if self._cgroup is not None else []),
        ]:
            _log.error("not released", error=str(error))


def _retrieve(future: asyncio.Future[None]) -> None:
    """Nobody may be waiting any more when start fails; that is no reason for asyncio to complain."""
    with contextlib.suppress(asyncio.CancelledError):
        future.exception()


def _module(line: str) -> agent_pb2.KernelModule:
    name, *parameters = line.split()
    return agent_pb2.KernelModule(name=name, parameters=parameters)


def _shm_storage(size: int) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        options=["noexec", "nosuid", "nodev", "mode=1777", f"size={size}"],
        mount_point=GUEST_SHM,
    )
