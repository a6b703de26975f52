"""The runtime handler: from the configuration and a container's spec to a sandbox that can be started.

What: `VirtContainer` decides, once per shim, which configuration holds and what the sandbox is made
of, and builds hypervisor, devices and sandbox from it (`new_instance`). `build_service` is what the
daemon calls to get the Task service on top of it.
Why here: this is the one place that knows all parts by name; everything else meets through protocols.
Invariants: everything that can be refused (configuration, spec) is refused before anything is
acquired; one shim has one sandbox, and a new one only after the last was stopped.
Source: the mission's "VirtContainer::init" and "new_instance" (shared/mission/multi-vmm-support.md).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import CallerError, KataError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from devices.threads import acquire, look
from devices.vsock import STREAM_PORT
from hypervisors.config import HostedSection
from hypervisors.registry import get_plugin, register_built_in
from proto import task_v2_pb2, task_v3_pb2
from shim.api.task_service import TaskService
from shim.config import Config, load_config
from shim.config.options import config_path
from shim.factory.cold import Cold
from shim.protocols import DaemonContext, Deadlines
from shim.resources.direct_volumes import check as check_direct
from shim.resources.disks import disk_style
from shim.resources.host_cgroup import cgroup_settings
from shim.resources.network.settings import network_settings
from shim.resources.sizing import sized, spec_wants
from shim.resources.vfio_settings import vfio_settings, wants
from shim.sandbox.cold_devices import cold_devices, key, swap, with_agent_params
from shim.sandbox.health import HealthSettings
from shim.sandbox.host_files import HostFiles, read_host_files
from shim.sandbox.sandbox import VirtSandbox
from shim.sandbox.settings import SandboxSettings
from shim.spec import oci_fields
from shim.spec.documents import load_spec
from shim.spec.guest_devices import check_devices, host_devices
from shim.spec.guest_spec import own_shm, plan_volumes
from shim.spec.pod_role import container_type
from shim.state import logs
from shim.state.bundle import OWN, SINGLE
from shim.state.procfs import start_time
from shim.state.trace import Trace
from shim.tasks.container_manager import ContainerManager
from ttrpc import Server

if TYPE_CHECKING:
    from shim.factory.template_class import TemplateClass
    from shim.recovery import Keeper
    from shim.resources.vfio_devices import Wanted
    from shim.sandbox.pod_config import PodDefaults
    from shim.sandbox.pod_sandbox import PodSandbox
    from shim.sandbox.recovered import RecoveredSandbox
    from shim.spec.guest_devices import HostDevice
    from shim.spec.guest_spec import Volume

__all__ = ["Service", "VirtContainer", "build_service"]

_log = structlog.get_logger("runtime")

STREAMING_SERVICE = "containerd.services.streaming.v1.Streaming"
SANDBOX_SERVICE = "containerd.runtime.sandbox.v1.Sandbox"


class VirtContainer:
    """The handler of one shim. `tasks` is where its sandbox's tasks live."""

    def __init__(self, context: DaemonContext, tasks: asyncio.TaskGroup) -> None:
        self._context = context
        self._tasks = tasks
        self._sandbox: VirtSandbox | None = None
        self._recovered: RecoveredSandbox | None = None
        #: What writes down how things stand, once the configuration wants that.
        self.keeper: Keeper | None = None
        self._config: Config | None = None
        self._making = asyncio.Lock()
        self.trace = Trace(
            context.sandbox_id,
            context.state_dir,
            name=context.key,
            namespace=context.namespace,
            containerd=context.containerd,
        )
        self.trace.mark("daemon", start_time(os.getpid()) / os.sysconf("SC_CLK_TCK"), time.monotonic())
        self.manager: ContainerManager | None = None
        #: The sandbox if it was made by the Sandbox API.
        self.pod: PodSandbox | None = None

    @staticmethod
    def init() -> None:
        """Register the hypervisors that come with the shim (the mission's `VirtContainer::init`)."""
        register_built_in()

    async def load_spec(self, bundle: str) -> dict[str, Any]:
        """See `shim.tasks.container_manager.Runtime`."""
        spec, strange = await look(load_spec, bundle)
        if strange:
            _log.info("not passed to the guest", bundle=bundle, keys=strange)
        return spec

    async def sandbox_for(
        self,
        container_id: str,
        bundle: str,  # noqa: ARG002  (shim.tasks.container_manager.Runtime; a bundle decides nothing here)
        spec: Mapping[str, Any],
        options: AnyMessage,
    ) -> VirtSandbox:
        """The shim's sandbox, made (not started) for the first container. Raises ConfigError, CallerError."""
        if self._recovered is not None:
            await self._recovered.prepare_container(container_id, "", {}, ())  # refuses
        async with self._making:  # two first containers, or one and a CreateSandbox, make one sandbox
            if self.pod is not None:
                sandbox = self.pod.admit(container_id)
                await look(self._check, spec)
                return sandbox
            if self._sandbox is None or self._sandbox.stopped:
                self._sandbox = await self._make(container_id, spec, options)
            else:
                await look(self._check, spec)
            return self._sandbox

    async def make_pod(
        self, spec: Mapping[str, Any], options: AnyMessage, defaults: PodDefaults
    ) -> PodSandbox:
        """The shim's sandbox by the Sandbox API (not started). Raises ConfigError, CallerError."""
        from shim.sandbox.pod_sandbox import PodSandbox

        assert self.manager is not None
        async with self._making:
            if self._recovered is not None:
                await self._recovered.prepare_container(self._context.sandbox_id, "", {}, ())  # refuses
            if self._sandbox is not None and not self._sandbox.stopped:
                raise CallerError("this shim has containers without a sandbox", code="FAILED_PRECONDITION")
            self._sandbox = await self._make(self._context.sandbox_id, spec, options, defaults)
            self.pod = PodSandbox(self._sandbox, self.manager, self._tasks)
            return self.pod

    async def _make(
        self, name: str, spec: Mapping[str, Any], options: AnyMessage, pod: PodDefaults | None = None
    ) -> VirtSandbox:
        context = self._context
        with self.trace.phase("config", id=name):
            # A sandbox without a task of its own (Sandbox API) has its options from `start` alone.
            config = await look(
                load_config,
                options_path=config_path(options) or context.config_path or None,
                env=os.environ,
                runtime_class=context.runtime_class,
                annotations=spec.get("annotations") or {},
            )
        logs.set_level(config.runtime.log_level, debug=context.debug or config.runtime.enable_debug)
        if config.runtime.on_shim_death == "keep":
            if pod is None:
                await self._keep(config)
            else:
                _log.warning("ends with its shim: on_shim_death = keep is not for the Sandbox API")
        for idle in config.inactive:
            if not idle.harmless:
                _log.warning("configuration key without effect", key=str(idle))
        self._config = config
        await look(self._check, spec)
        await self._check_disks(spec)
        passed = await self._passed(config, spec)
        files = await look(read_host_files, spec)
        if config.factory.enable_template:
            try:
                return await self._begin_with_template(config, spec, files, pod, passed)
            except Cold as why:
                _log.warning("the VM boots", no_template=str(why))
        return self.new_instance(config, spec, files, pod, passed)

    async def _begin_with_template(
        self,
        config: Config,
        spec: Mapping[str, Any],
        files: HostFiles,
        pod: PodDefaults | None,
        passed: Wanted | None,
    ) -> VirtSandbox:
        """The sandbox, which runs by then: one whose VM cannot begin so must be another one. Raises Cold."""
        from shim.factory import factory

        if pod is not None:
            raise Cold("the sandbox was made by the Sandbox API, which starts it later")
        if passed is not None:
            raise Cold("it starts with devices of VFIO")
        if reason := factory.why_cold(config, spec, pod=container_type(spec) != SINGLE):
            raise Cold(reason)
        wanted, path = await factory.obtain(config, self._context.undo, self.trace)
        sandbox = self._sandbox = self.new_instance(config, spec, files, template=(wanted, path))
        try:
            await sandbox.start()
        except KataError as error:
            failed = sandbox.template_failed
            await sandbox.stop()
            if not failed:
                raise
            await factory.reject(config, wanted, str(error))
            raise Cold(f"its VM could not begin with the template: {error}") from error
        except BaseException:
            await sandbox.stop()
            raise
        return sandbox

    async def _keep(self, config: Config) -> None:
        """Have the VM outlive us, and the next shim know how things stand. Raises ConfigError."""
        from shim.recovery import Keeper, check

        assert self.manager is not None
        check(config.hypervisor_name)
        if self.keeper is None:
            self.keeper = Keeper(self._context, self.manager)
        await self.keeper.prepare()

    async def take_over(self) -> None:
        """See `shim.protocols.ShimService.take_over`."""
        from shim.recovery import Keeper, recover

        assert self.manager is not None
        assert self._context.takeover is not None
        logs.set_level(self._context.takeover.saved.daemon.log_level, debug=self._context.debug)
        self.keeper = Keeper(self._context, self.manager)
        self._recovered = await recover(
            self._context, self.manager, self.keeper, tasks=self._tasks, trace=self.trace
        )

    def _check(self, spec: Mapping[str, Any]) -> None:
        """Refuse what cannot be served, before anything is done for the container. Blocks."""
        assert self._config is not None  # loaded by `_make`
        section = self._config.hypervisor
        oci_fields.check(spec, guest_selinux=not key(section, "disable_guest_selinux"))
        check_devices(spec)
        if isinstance(section, HostedSection):
            from shim.spec.guest_image import pulled_image

            pulled_image(spec)
        if spec.get("hooks"):
            from shim.hooks.hook_process import read_hooks

            read_hooks(spec)

    async def _check_disks(self, spec: Mapping[str, Any]) -> None:
        """Refuse disks that the first container cannot have, before its VM is started. Those of a running
        VM are checked when they are plugged: some of them it may have itself."""
        assert self._config is not None  # loaded by `_make`
        if container_type(spec) == OWN:
            return
        wanted = await look(host_devices, spec)
        volumes = plan_volumes(spec, self._context.id)
        if isinstance(self._config.hypervisor, HostedSection):
            await self._refuse_disks(wanted, volumes)
        if wanted:
            from shim.resources.container_devices import check

            await look(check, wanted, disk_style(self._config.hypervisor).store)
        if volumes:
            await look(check_direct, volumes)

    async def _refuse_disks(self, wanted: Sequence[HostDevice], volumes: Sequence[Volume]) -> None:
        """Raise UnsupportedByHypervisor for what a VM on another machine cannot have plugged."""
        assert self._config is not None  # loaded by `_make`
        from shim.resources.direct_volumes import find as find_direct

        named = [device.path for device in wanted]
        named += [volume.source for volume in (await look(find_direct, volumes)).values()]
        if not named:
            return
        name = self._config.hypervisor_name
        try:
            get_plugin(name).capabilities.require(name, Kind.BLK, Op.COLD)
        except UnsupportedByHypervisor as error:
            error.cause = f"{', '.join(named)}: {error.cause}"
            raise error.with_context(
                phase="devices", hint="leave it out, or run the pod under a VMM of this host"
            ) from None

    async def _passed(self, config: Config, spec: Mapping[str, Any]) -> Wanted | None:
        """The devices of VFIO that the VM starts with. Refuses what the first container cannot have, before
        its VM is started; of a running one it is refused when they are plugged."""
        vfio = vfio_settings(config.runtime, config.hypervisor)
        if not await wants(spec, vfio):
            return None
        if vfio.cold == vfio.hot == "no-port":  # a VMM without says so itself
            able = get_plugin(config.hypervisor_name).capabilities
            able.require(config.hypervisor_name, Kind.VFIO, Op.COLD)
        from shim.resources.vfio_devices import find

        found = await look(find, spec, vfio)
        return found if vfio.cold != "no-port" else None

    def new_instance(
        self,
        config: Config,
        spec: Mapping[str, Any],
        files: HostFiles,
        pod: PodDefaults | None = None,
        passed: Wanted | None = None,
        *,
        template: tuple[TemplateClass, str] | None = None,
    ) -> VirtSandbox:
        """Hypervisor, devices and sandbox, none of which runs or holds anything yet. `files`: what it
        takes from the first container's mounts; `passed`: devices of VFIO to start with; `template`: to begin
        with, and its directory."""
        context = self._context
        agent = config.agent
        dns, shm_size = files
        direct_stdio = config.runtime.use_passfd_io and template is None
        section, bounds = sized(
            with_agent_params(config, STREAM_PORT if direct_stdio else 0),
            {} if template else spec,
            static=config.runtime.static_sandbox_resource_mgmt,
            pod=template is not None or container_type(spec) != SINGLE,
        )
        plugin = get_plugin(config.hypervisor_name)
        hypervisor = plugin.create(
            section, sandbox_id=context.sandbox_id, state_dir=context.state_dir, undo=context.undo
        )
        hosted = isinstance(section, HostedSection)
        settings = SandboxSettings(
            sandbox_id=context.sandbox_id,
            key=context.key,
            alias=context.alias,
            state_dir=context.state_dir,
            container_type=container_type(spec),
            network=network_settings(config.runtime, section, spec, context.sandbox_id),
            hostname=spec.get("hostname") or os.uname().nodename,
            dns=dns,
            shm_size=shm_size,
            shm_source=own_shm(spec) if container_type(spec) == OWN else "",
            share_path=context.share_dir,
            devices=template[0].devices
            if template
            else cold_devices(
                config, section, context.share_dir, rng=plugin.capabilities.can(Kind.RNG, Op.COLD)
            ),
            template=template[1] if template else "",
            deadlines=Deadlines(
                boot=max(agent.boot_deadline, section.remote_hypervisor_timeout if hosted else 0),
                request=agent.request_deadline,
                kill=agent.kill_timeout,
            ),
            health=HealthSettings(
                agent.health_check_interval,
                agent.health_check_request_timeout_ms / 1000,
                ends=agent.health_check_action == "end",
            ),
            bounds=bounds,
            agent_port=agent.server_port,
            direct_stdio=direct_stdio,
            kernel_modules=agent.kernel_modules,
            disable_guest_seccomp=config.runtime.disable_guest_seccomp,
            pod=pod,
            disks=disk_style(section),
            vfio=vfio_settings(config.runtime, section),
            passed=passed,
            swap=swap(section),
            first_spec=None if container_type(spec) == OWN else spec,
            hosted=hosted,
            annotations=spec.get("annotations") or {} if hosted else {},
            host_mounts=context.host_mounts,
            cgroup=cgroup_settings(
                spec,
                context.alias,
                only=config.runtime.sandbox_cgroup_only,
                limited=spec_wants(spec, pod=container_type(spec) != "single_container"),
                keep_shim=context.placed,
            ),
        )
        _log.info(
            "sandbox",
            hypervisor=config.hypervisor_name,
            config=config.path,
            by_annotation=list(config.annotations),
            type=settings.container_type,
        )
        sandbox = VirtSandbox(
            settings,
            hypervisor,
            undo=context.undo,
            tasks=self._tasks,
            trace=self.trace,
            on_oom=self._oom,
        )
        if self.keeper is not None:
            self.keeper.keep(sandbox, hypervisor, config, section)
        return sandbox

    def _oom(self, container_id: str) -> None:
        if self.manager is not None:
            self.manager.report_oom(container_id)

    async def close(self) -> None:
        """Stop the sandbox if there is one, and put the trace away."""
        if self.pod is not None:
            await self.pod.stop(0)
        for sandbox in (self._sandbox, self._recovered):
            if sandbox is not None:
                await sandbox.stop()
        await acquire(self.trace.close)


class Service:
    """What the daemon runs: implements `shim.protocols.ShimService`."""

    def __init__(self, context: DaemonContext) -> None:
        self._closing = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._runner = asyncio.create_task(self._run(), name="runtime")
        VirtContainer.init()
        self._handler = VirtContainer(context, self._tasks)
        self._manager = ContainerManager(
            self._handler, context.events, namespace=context.namespace, undo=context.undo
        )
        self._handler.manager = self._manager
        self._task = TaskService(self._manager, context.shutdown)
        self._context = context

    async def _run(self) -> None:
        """Hold the TaskGroup open: whatever runs for a sandbox runs inside, and ends before this does."""
        async with self._tasks:
            await self._closing.wait()

    def register(self, server: Server) -> None:
        """Register the Task service under both names (it answers each in its own package's messages),
        and the Sandbox and the Streaming service, which are loaded when they are called."""
        for module in (task_v2_pb2, task_v3_pb2):
            server.register(module.DESCRIPTOR.services_by_name["Task"], self._task)
        server.register_later(SANDBOX_SERVICE, lambda: self._register_sandbox(server))
        server.register_later(STREAMING_SERVICE, lambda: _register_streaming(server))

    def _register_sandbox(self, server: Server) -> None:
        from proto import sandbox_v1_pb2
        from shim.api.sandbox_service import SandboxService

        context = self._context
        service = SandboxService(
            self._handler,
            self._manager,
            sandbox_id=context.sandbox_id,
            bundle=context.bundle,
            files=os.path.join(context.state_dir, "pod"),
            shutdown=context.shutdown,
        )
        server.register(sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"], service)

    @property
    def idle(self) -> bool:
        """Whether no container exists or is being created, and no sandbox without one."""
        return self._manager.idle

    async def take_over(self) -> None:
        """See `shim.protocols.ShimService.take_over`."""
        await self._handler.take_over()

    async def close(self) -> None:
        """Stop containers and VM. Idempotent."""
        if self._closing.is_set():
            await asyncio.wait([self._runner])
            return
        await self._manager.close()
        await self._handler.close()
        self._closing.set()
        try:
            await self._runner
        except BaseExceptionGroup as group:
            _log.error(
                "a task of the sandbox failed", error=str(group), errors=[str(e) for e in group.exceptions]
            )


def _register_streaming(server: Server) -> None:
    from proto import streaming_pb2
    from shim.stdio.stream import StreamingService

    server.register(streaming_pb2.DESCRIPTOR.services_by_name["Streaming"], StreamingService())


def build_service(context: DaemonContext) -> Service:
    """The Task service of this daemon; call it on the running loop."""
    return Service(context)
