"""One sandbox: a VM, the agent in it, the directory they share, and the order in which these begin and end.

What: `VirtSandbox` implements `shim.protocols.Sandbox`. `start` goes through the phases share, vmm,
boot, agent; `stop` releases all of them in reverse.
Why one class: the phases depend on each other, and an error in any of them must be told with what
the VMM and the guest's console said last, and must leave nothing behind.
Invariants:
- `start` runs once, in the sandbox's own task; callers wait for it and may go away.
- `died` resolves within moments of the VMM's death, whoever waits for what.
- After `stop` nothing of the sandbox is left on the host; `stop` may be called at any time, also
  while `start` is under way, and any number of times.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

import ttrpc
from devices.config import DeviceConfig, ShareFsConfig
from devices.errors import BugError, GuestError, HypervisorError, KataError
from devices.holdings import Holdings
from devices.kinds import Kind, Op
from devices.manager import DeviceManager
from devices.undo import UndoLog
from devices.vsock import AgentChannel
from hypervisors.base import Capabilities, Hypervisor
from proto import agent_pb2, oci_pb2
from shim.agent_client import GuestAgent
from shim.bundle import state_dir
from shim.guest_devices import HostDevice, host_devices
from shim.guest_spec import GUEST_SHM, MEMBER, OWN, guest_spec, plan_volumes, wants_sandbox_pidns
from shim.limits import Size
from shim.oci import spec_from_json
from shim.protocols import Deadlines, GuestContainer, HostUsage, RootfsMount
from shim.resources.container_files import ContainerFiles, SharedFiles
from shim.resources.direct_volumes import DirectVolumes
from shim.resources.direct_volumes import find as find_direct
from shim.resources.direct_volumes import rewrite as rewrite_direct
from shim.resources.disks import DiskStyle
from shim.resources.network.pod import PodNetwork
from shim.resources.network.settings import NetworkSettings
from shim.resources.shared_dir import SharedDir
from shim.resources.sizing import Bounds, Sizing, spec_limits
from shim.resources.vfio_settings import VfioSettings, wants
from shim.trace import Trace

if TYPE_CHECKING:
    from shim.hooks import HostHooks
    from shim.management import Management
    from shim.pod_config import PodDefaults
    from shim.resources.guest_swap import GuestSwap, SwapSettings
    from shim.resources.network.dan import DanNetwork
    from shim.resources.vfio_devices import VfioDevices, Wanted

__all__ = ["SandboxSettings", "VirtSandbox"]

_log = structlog.get_logger("sandbox")

_DISK_DRIVERS = frozenset({"blk", "mmioblk", "scsi", "nvdimm"})  # the agent's words


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """What a sandbox is made of, decided before anything is done.

    `network`: see `shim.resources.network`. `shm_size` is in bytes.
    `bounds`: the sizes that its VM can have.
    `direct_stdio`: the agent takes stdio on connections of its own (ours does, a stock one does not).
    `first_spec`: the OCI spec of its single container, None for a pod's. `disks`: how its containers' disks
    are served; `swap`: the guest's. `vfio`: how devices of VFIO are passed on; `passed`: those that the VM
    starts with. `pod`: what each container gets that does not bring it, for sandboxes of the Sandbox API.
    """

    sandbox_id: str
    container_type: str
    network: NetworkSettings
    hostname: str
    dns: Sequence[str]
    shm_size: int
    share_path: str
    devices: Sequence[DeviceConfig]
    deadlines: Deadlines
    bounds: Bounds
    agent_port: int = 1024
    direct_stdio: bool = True
    guest_hook_path: str = ""
    disable_guest_seccomp: bool = False
    pod: PodDefaults | None = None
    disks: DiskStyle = field(default_factory=DiskStyle)
    vfio: VfioSettings = field(default_factory=VfioSettings)
    passed: Wanted | None = None
    swap: SwapSettings | None = None
    first_spec: Mapping[str, Any] | None = None
    host_mounts: int | None = None  # see `shim.context`


class VirtSandbox:
    """See the module's docstring. `tasks` is the TaskGroup that the sandbox's own tasks live in."""

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
        self.settings = settings
        self._hypervisor = hypervisor
        self._devices = DeviceManager(settings.disks.driver)
        self._tasks = tasks
        self._trace = trace
        self._on_oom = on_oom
        self._undo = undo
        self._hooks: dict[str, HostHooks] = {}
        self._holdings = Holdings(self._devices, hypervisor)
        self._swap: GuestSwap | None = None
        self._management: Management | None = None  # from the first direct volume on
        self._direct = DirectVolumes(
            self._devices, self._holdings, undo, sandbox_id=settings.sandbox_id, style=settings.disks
        )
        self._network: PodNetwork | DanNetwork = PodNetwork(
            settings.network, hypervisor, self._devices, undo, trace
        )
        self._sizing = Sizing(
            settings.bounds, hypervisor, lambda: self.agent, lambda work: self._watch(work, "shrink")
        )
        self._files: ContainerFiles
        if any(isinstance(device, ShareFsConfig) for device in settings.devices):
            self._files = SharedFiles(SharedDir(settings.share_path, undo))
        else:
            from shim.resources.block_files import BlockFiles  # not on the usual start path

            self._files = BlockFiles(
                settings.sandbox_id, self._devices, hypervisor, undo, lambda: self.agent, style=settings.disks
            )
        self._vfio: VfioDevices | None = None  # once a container wants such a device
        self._writing: set[str] = set()  # containers with disks of their own
        self._agent: GuestAgent | None = None
        self._channel: AgentChannel | None = None
        self._vmm_pid = 0
        loop = asyncio.get_running_loop()
        self._died: asyncio.Future[str] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._ready.add_done_callback(_retrieve)
        self._boot: asyncio.Task[None] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stop_lock = asyncio.Lock()
        self._stopped = False

    # --- shim.protocols.Sandbox

    @property
    def id(self) -> str:
        """The sandbox's id: the container's own, or the pod's."""
        return self.settings.sandbox_id

    @property
    def agent(self) -> GuestAgent:
        """The agent's client; only after `start`."""
        if self._agent is None:
            raise GuestError("the sandbox is not running", phase="agent", code="FAILED_PRECONDITION")
        return self._agent

    @property
    def vmm_pid(self) -> int:
        """The VMM's pid on the host."""
        return self._vmm_pid

    @property
    def hypervisor(self) -> Hypervisor:
        """What runs the VM; for looking, not for changing."""
        return self._hypervisor

    @property
    def size(self) -> Size:
        """The VM's vCPUs and bytes of memory, as they are now."""
        return self._sizing.size

    async def check(self, timeout: float) -> None:
        """Raise KataError unless VMM and agent answer now, each within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._hypervisor.check()
        except TimeoutError:
            raise HypervisorError(f"the VMM did not answer within {timeout:g} s", phase="vm") from None
        await self.agent.check(timeout)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called: this object serves no longer."""
        return self._stopped

    @property
    def died(self) -> asyncio.Future[str]:
        """Resolves to the reason when the VM is gone without our asking."""
        return self._died

    @property
    def direct_stdio(self) -> bool:
        """Whether stdio goes over vsock connections of its own."""
        return self.settings.direct_stdio

    async def start(self) -> None:
        """Boot to a ready agent. Raises KataError with phase, cause, evidence and hint."""
        if self._stopped:
            raise GuestError("the sandbox has been stopped", phase="boot", code="FAILED_PRECONDITION")
        if self._boot is None:
            self._boot = self._tasks.create_task(self._start_once(), name=f"boot {self.id}")
        await asyncio.shield(self._ready)

    async def prepare_container(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], rootfs: Sequence[RootfsMount]
    ) -> GuestContainer:
        """Mount the container's root file system and volumes into the share; translate its spec."""
        if self.settings.pod is not None:
            from shim.pod_config import complete

            spec = complete(spec, self.settings.pod)
        kind = self.settings.container_type if container_id == self.id else MEMBER
        volumes = [] if kind == OWN else plan_volumes(spec, container_id)
        direct = await asyncio.to_thread(find_direct, volumes) if volumes else {}
        volumes = [volume for volume in volumes if volume.index not in direct]
        disks = [] if kind == OWN else host_devices(spec)
        passed = await self._find_passed(spec) if kind != OWN else None
        root_path = os.path.join(bundle, str((spec.get("root") or {}).get("path") or "rootfs"))
        volumes = await self._files.name(volumes)
        document, left_out = guest_spec(
            spec,
            container_id=container_id,
            bundle=bundle,
            container_type=kind,
            volumes=volumes,
            disable_seccomp=self.settings.disable_guest_seccomp,
            keep_cpuset=self.settings.direct_stdio,
            devices=disks,
        )
        rewrite_direct(document, direct)
        if passed is not None:
            from shim.resources.vfio_devices import rewrite as rewrite_passed

            rewrite_passed(document, passed, self.settings.vfio)
            left_out += passed.left_out
        message, rest = spec_from_json(document)
        left_out += rest.dropped
        if left_out:
            _log.info("not passed to the guest", container=container_id, keys=left_out[:50])
        await self._sizing.fit(container_id, spec_limits(spec))
        storages: list[agent_pb2.Storage] = []
        # Our agent has a pause of its own; another one needs the image's.
        if kind != OWN or not self.settings.direct_stdio:
            with self._trace.phase("rootfs", id=container_id):
                storages = await self._files.add(container_id, rootfs, root_path, volumes)
        if direct:
            with self._trace.phase("volumes", id=container_id):
                storages += await self._direct.add(container_id, direct)
            await self._manage()
        devices = await self._add_devices(container_id, disks, passed) if disks or passed else []
        if any(storage.driver in _DISK_DRIVERS and "ro" not in storage.options for storage in storages):
            self._writing.add(container_id)
        await self._run_hooks(container_id, bundle, spec)
        return GuestContainer(
            spec=message,
            storages=storages,
            devices=devices,
            sandbox_pidns=wants_sandbox_pidns(spec),
            beyond=rest.beyond,
        )

    async def _manage(self) -> None:
        """From the first direct volume on it can be asked about and resized from outside."""
        if self._management is None:
            from shim.management import Management  # not on the usual start path

            self._management = Management(self._direct, self._hypervisor, lambda: self.agent)
            await self._management.start(state_dir(self.id), self._undo)

    async def _add_devices(
        self, container_id: str, disks: Sequence[HostDevice], passed: Wanted | None
    ) -> list[agent_pb2.Device]:
        """Plug the host's devices that the container is to have."""
        devices: list[agent_pb2.Device] = []
        with self._trace.phase("devices", id=container_id):
            if disks:
                from shim.resources.container_devices import ContainerDevices  # not on the usual start path

                plugged = ContainerDevices(self._devices, self._holdings, self.settings.disks)
                devices += await plugged.add(container_id, disks)
            if passed is not None:
                devices += await self._vfio_devices().add(container_id, passed)
        return devices

    async def _find_passed(self, spec: Mapping[str, Any]) -> Wanted | None:
        if not wants(spec, self.settings.vfio):
            return None
        from shim.resources.vfio_devices import find

        return await asyncio.to_thread(find, spec, self.settings.vfio)

    def _vfio_devices(self) -> VfioDevices:
        if self._vfio is None:
            from shim.resources.vfio_devices import VfioDevices

            self._vfio = VfioDevices(
                self.settings.vfio, self._devices, self._holdings, self._hypervisor, self._undo
            )
        return self._vfio

    async def _run_hooks(self, container_id: str, bundle: str, spec: Mapping[str, Any]) -> None:
        if not spec.get("hooks"):
            return
        from shim.hooks import HostHooks

        hooks = HostHooks(
            container_id,
            bundle,
            spec,
            pid=self._vmm_pid,
            undo=self._undo,
            mounts=self.settings.host_mounts,
        )
        self._hooks[container_id] = hooks
        with self._trace.phase("hooks", id=container_id):
            await hooks.before_create()
        await self._network.rescan(self.agent)

    async def container_starting(self, container_id: str) -> None:  # noqa: ARG002  (all of a pod share it)
        """See `shim.protocols.Sandbox.container_starting`."""
        await self._network.rescan(self.agent)

    async def container_started(self, container_id: str) -> None:
        """Run the poststart hooks."""
        if container_id in self._hooks:
            await self._hooks[container_id].after_start()

    async def release_container(self, container_id: str) -> None:
        """Unmount what `prepare_container` mounted, let the VM shrink, run the poststop hooks. Idempotent."""
        if not self._stopped and not self._died.done():
            await self._sizing.forget(container_id)
            for error in await self._holdings.release(container_id):
                _log.error("not unplugged", container=container_id, error=str(error))
            for error in await self._vfio.release(container_id) if self._vfio else ():
                _log.error("not given back", container=container_id, error=str(error))
        await self._direct.remove(container_id)
        self._writing.discard(container_id)
        for error in await self._files.remove(container_id):
            _log.error("not released", container=container_id, error=str(error))
        hooks = self._hooks.pop(container_id, None)
        if hooks is not None:
            await hooks.after_delete()

    async def resize(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """See `shim.protocols.Sandbox.resize` and `shim.resources.sizing`."""
        await self._sizing.fit(container_id, resources, strict=True)

    @property
    def is_pod(self) -> bool:
        """Whether its own container is a pod's sandbox container."""
        return self.settings.container_type == OWN

    async def host_usage(self) -> HostUsage:
        """Of the VMM and its daemons, by the hypervisor's own account."""
        metrics = await self._hypervisor.get_hypervisor_metrics()
        cpu, memory = metrics.get("cpu_seconds_total", 0.0), metrics.get("resident_bytes", 0.0)
        return HostUsage(int(cpu * 1e9), int(memory))

    async def open_stream(self) -> tuple[socket.socket, int]:
        """A connection for one stdio stream, and the number that names it to the agent."""
        if self._channel is None:
            raise GuestError("the sandbox is not running", phase="stdio", code="FAILED_PRECONDITION")
        return await self._channel.open_stream(self.settings.deadlines.request)

    async def stop(self) -> None:
        """End the VM, the guest unasked, and release everything. Never raises but for cancellation."""
        async with self._stop_lock:
            if self._stopped and self._boot is None:
                return
            self._stopped = True
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
        with self._trace.phase("share"):
            await self._files.set_up()
        if settings.network.dan:
            await self._attach_directly(settings.network.dan)
        with self._trace.phase("vmm.start"):
            await hypervisor.prepare_vm(self.id, await self._network.open())
            for device in settings.devices:
                await self._devices.try_add_device(device, hypervisor)
            if settings.passed is not None:
                await self._vfio_devices().add_cold(settings.passed)
            await self._plug_first(await hypervisor.capabilities())
            await self._network.plug()
            await hypervisor.start_vm(settings.deadlines.boot)
        self._vmm_pid = await hypervisor.get_vmm_master_tid()
        self._watch(self._watch_vm(), "vm")
        self._channel = await hypervisor.get_agent_socket()
        await self._network.join()
        with self._trace.phase("vmm.boot"):
            await self._channel.wait_ready(settings.deadlines.boot)
        with self._trace.phase("agent.connect"):
            sock, _ = await self._channel.connect(settings.agent_port, settings.deadlines.request)
            self._agent = GuestAgent(ttrpc.Client(sock), settings.deadlines, self._trace)
        with self._trace.phase("agent.create_sandbox"):
            await self._agent.create_sandbox(
                sandbox_id=self.id,
                hostname=settings.hostname,
                dns=settings.dns,
                storages=[*self._files.sandbox_storages(), _shm_storage(settings.shm_size)],
                guest_hook_path=settings.guest_hook_path,
                kernel_modules=settings.disks.modules(),
            )
        await self._network.configure(self._agent)
        if settings.swap is not None:
            from shim.resources.guest_swap import GuestSwap  # not on the usual start path

            self._swap = GuestSwap(settings.swap, self.id, self._undo)
            with self._trace.phase("swap"):
                await self._swap.start(self._devices, hypervisor, self._agent)
        self._watch(self._watch_oom(self._agent), "oom")

    async def _plug_first(self, able: Capabilities) -> None:
        """Of a VMM that plugs disks at the start only: those that the first container will ask for."""
        spec = self.settings.first_spec
        if able.can(Kind.BLK, Op.HOT) or not able.can(Kind.BLK, Op.COLD) or spec is None:
            return
        from shim.resources.container_devices import ContainerDevices

        devices = ContainerDevices(self._devices, self._holdings, self.settings.disks)
        disks = [await devices.disk(device) for device in host_devices(spec)]
        direct = await asyncio.to_thread(find_direct, plan_volumes(spec, self.id))
        disks += [await self._direct.disk(volume) for volume in direct.values()]
        for disk in disks:
            await self._devices.try_add_device(disk, self._hypervisor)

    async def _attach_directly(self, path: str) -> None:
        """If there is this file, the network is what it says, and not what is in the pod's namespace."""
        there: bool = await asyncio.to_thread(lambda: os.path.exists(path))
        if not there:
            return
        from shim.resources.network.dan import DanNetwork, read

        dan = await asyncio.to_thread(read, path)
        if dan is not None:
            settings = self.settings.network
            self._network = DanNetwork(dan, settings, self._hypervisor, self._devices, self._trace)

    def _shrink(self, work: Any) -> None:
        self._watch(work, "shrink")

    def _watch(self, work: Any, name: str) -> None:
        self._watchers = [watcher for watcher in self._watchers if not watcher.done()]
        self._watchers.append(self._tasks.create_task(work, name=f"{name} {self.id}"))

    async def _watch_vm(self) -> None:
        ended = await self._hypervisor.wait_vm()
        if ended.expected or self._died.done():
            return
        details = {
            "vmm stderr": ended.stderr_tail,
            "guest console": ended.console_tail,
            **self._hypervisor.diagnostics(),  # its daemons' words, too
        }
        reason = str(HypervisorError(ended.reason, phase="vm", details=details))
        _log.error("the VM is gone", reason=reason, code=ended.code)
        self._died.set_result(reason)
        if self._agent is not None:
            await self._agent.close()

    async def _watch_oom(self, agent: GuestAgent) -> None:
        while True:
            try:
                container_id = await agent.get_oom_event()
            except KataError as error:
                _log.debug("no more OOM events", error=str(error))
                return
            self._on_oom(container_id)

    async def _tear_down(self) -> None:
        if self._boot is not None and not self._boot.done():
            self._boot.cancel()
            await asyncio.wait([self._boot])
        if self._management is not None:
            await self._step("stop serving volumes", self._management.close())
        if self._agent is not None and not self._died.done():
            # What the guest has written to disks is in its memory still: they are unmounted there.
            for container_id in self._writing:
                await self._step("unmount its disks", self._agent.remove_container(container_id))
        self._writing.clear()
        # The VM first: whoever waits for a container's exit waits for this.
        await self._step("stop the VM", self._hypervisor.stop_vm())
        if self._agent is not None:
            await self._step("close the agent's connection", self._agent.close())
        for watcher in self._watchers:
            watcher.cancel()
        if self._watchers:
            await asyncio.wait(self._watchers)
        self._watchers.clear()
        await self._step("clean up after the VMM", self._hypervisor.cleanup())
        self._devices.close()
        await self._step("forget its volumes", self._direct.remove())
        if self._swap is not None:
            await self._step("remove its swap", self._swap.close())
        passed = await self._vfio.close() if self._vfio else []
        for error in [*passed, *await self._network.close(), *await self._files.tear_down()]:
            _log.error("not released", error=str(error))

    async def _step(self, what: str, work: Any) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  (stopping goes on past every error)
            _log.error("stopping the sandbox: step failed", step=what, error=str(error))


def _retrieve(future: asyncio.Future[None]) -> None:
    """Nobody may be waiting any more when start fails; that is no reason for asyncio to complain."""
    with contextlib.suppress(asyncio.CancelledError):
        future.exception()


def _shm_storage(size: int) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        options=["noexec", "nosuid", "nodev", "mode=1777", f"size={size}"],
        mount_point=GUEST_SHM,
    )
