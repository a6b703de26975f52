"""The agent's RPCs: Kata's `grpc.AgentService` and `grpc.Health`, each a few lines over the sandbox.

What: `AgentService` maps requests to the modules that do the work; `agent.serve` has them called.
Why imports inside methods: the agent answers its first call sooner when it has loaded less; what the
next calls need is loaded in the pauses after the first (`_preload`).
Invariants: a call that changes something runs to its end even if its caller leaves; what the agent
cannot do answers UNIMPLEMENTED and says what.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from google.protobuf.empty_pb2 import Empty

from agent.vsock import Listener
from proto import agent_pb2, health_pb2
from ttrpc import CallContext, Code, RpcError

if TYPE_CHECKING:
    from agent.container import Container
    from agent.oom import OomWatcher
    from agent.process import Process
    from agent.reaper import Reaper
    from agent.sandbox import Sandbox
    from agent.stdio.streams import StreamListener
    from proto import csi_pb2, types_pb2

__all__ = ["MAY_BE_CANCELLED", "VERSION", "AgentService", "HealthService"]

VERSION = "0.1.0"
PROTOCOL_VERSION = "0.0.1"  # what Kata's agents report as grpc_version

MAY_BE_CANCELLED = ("WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent")

# In the order in which a pod's first calls need them.
_PRELOAD = (
    "socket",
    "agent.sandbox",
    "json",
    "shutil",
    "agent.storage.storages",
    "concurrent.futures.thread",
)


class _HasContainerId(Protocol):
    """Requests about a container."""

    container_id: str


class _HasExecId(_HasContainerId, Protocol):
    """Requests about a process."""

    exec_id: str


def _unimplemented(what: str) -> RpcError:
    return RpcError(Code.UNIMPLEMENTED, f"{what} is not implemented by this agent")


class HealthService:
    """grpc.Health."""

    async def check(self, _: CallContext, __: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
        """Answering at all is the proof."""
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def version(self, _: CallContext, __: health_pb2.CheckRequest) -> health_pb2.VersionCheckResponse:
        """Both versions."""
        return health_pb2.VersionCheckResponse(grpc_version=PROTOCOL_VERSION, agent_version=VERSION)


class AgentService:
    """grpc.AgentService. The methods' names follow the RPCs'; the messages are in proto/agent.proto."""

    def __init__(self, stream_fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream_fd = stream_fd
        self._sandbox: Sandbox | None = None
        self._reaper: Reaper | None = None
        self._oom: OomWatcher | None = None
        self.stopped = asyncio.Event()

    # --- the parts, made on first use ---------------------------------------------------------

    @property
    def reaper(self) -> Reaper:
        """Reaping begins with the first use, which `serve` makes soon after it listens."""
        if self._reaper is None:
            from agent.reaper import Reaper

            self._reaper = Reaper(self._loop)
            self._reaper.start()
        return self._reaper

    @property
    def sandbox(self) -> Sandbox:
        """The VM's one sandbox."""
        if self._sandbox is None:
            from agent.sandbox import Sandbox
            from agent.stdio.streams import StreamListener

            listener: StreamListener | None = None
            if self._stream_fd >= 0:
                listener = StreamListener(self._loop, Listener(fileno=self._stream_fd))
            self._sandbox = Sandbox(self.reaper, listener)
        return self._sandbox

    @property
    def oom(self) -> OomWatcher:
        """Watches all containers."""
        if self._oom is None:
            from agent.oom import OomWatcher

            self._oom = OomWatcher(self._loop)
        return self._oom

    def preload(self) -> None:
        """Import what the first calls need, one module per turn of the loop."""
        self._preload_next(0)

    def _preload_next(self, index: int) -> None:
        if index >= len(_PRELOAD):
            _ = self.sandbox
            return
        import_module(_PRELOAD[index])
        self._loop.call_soon(self._preload_next, index + 1)

    def _container(self, request: _HasContainerId) -> Container:
        return self.sandbox.container(request.container_id)

    def _process(self, request: _HasExecId) -> Process:
        return self._container(request).process(request.exec_id)

    # --- sandbox ------------------------------------------------------------------------------

    async def create_sandbox(self, _: CallContext, request: agent_pb2.CreateSandboxRequest) -> Empty:
        """See Sandbox.create."""
        await self.sandbox.create(request)
        return Empty()

    async def destroy_sandbox(self, _: CallContext, __: agent_pb2.DestroySandboxRequest) -> Empty:
        """Kill everything; the agent ends, and with it the VM."""
        await self.sandbox.destroy()
        self._loop.call_later(0.1, self.stopped.set)
        return Empty()

    async def update_ephemeral_mounts(
        self, _: CallContext, request: agent_pb2.UpdateEphemeralMountsRequest
    ) -> Empty:
        """Remount tmpfs storages with new options; copy again what the host has changed."""
        await self.sandbox.storages.update(request.storages)
        return Empty()

    async def remove_stale_virtiofs_share_mounts(
        self, _: CallContext, __: agent_pb2.RemoveStaleVirtiofsShareMountsRequest
    ) -> Empty:
        """Nothing to do: this agent makes no mounts of its own inside the share."""
        return Empty()

    # --- containers ---------------------------------------------------------------------------

    async def create_container(self, ctx: CallContext, request: agent_pb2.CreateContainerRequest) -> Empty:
        """See Sandbox.create_container."""
        from agent.fit import beyond

        await self.sandbox.create_container(request, beyond(ctx.metadata))
        # Before it starts: a kill that comes first would be counted, but not seen as new.
        self.oom.watch(request.container_id, self.sandbox.container(request.container_id).cgroup)
        return Empty()

    async def start_container(self, _: CallContext, request: agent_pb2.StartContainerRequest) -> Empty:
        """See Container.start."""
        container = self._container(request)
        async with container.lock:
            await container.start()
        self.sandbox.on_start()
        return Empty()

    async def remove_container(self, _: CallContext, request: agent_pb2.RemoveContainerRequest) -> Empty:
        """See Sandbox.remove_container."""
        await self.sandbox.remove_container(request.container_id, float(request.timeout))
        self.oom.forget(request.container_id)
        return Empty()

    async def update_container(self, ctx: CallContext, request: agent_pb2.UpdateContainerRequest) -> Empty:
        """See Container.update."""
        from agent.fit import beyond

        container = self._container(request)
        async with container.lock:
            await container.update(request.resources, beyond(ctx.metadata))
        return Empty()

    async def pause_container(self, _: CallContext, request: agent_pb2.PauseContainerRequest) -> Empty:
        """Freeze the cgroup."""
        await self._container(request).freeze(True)
        return Empty()

    async def resume_container(self, _: CallContext, request: agent_pb2.ResumeContainerRequest) -> Empty:
        """Thaw the cgroup."""
        await self._container(request).freeze(False)
        return Empty()

    async def stats_container(
        self, _: CallContext, request: agent_pb2.StatsContainerRequest
    ) -> agent_pb2.StatsContainerResponse:
        """The cgroup's counters."""
        from agent.stats import container_stats

        return container_stats(self._container(request).cgroup)

    # --- processes ----------------------------------------------------------------------------

    async def exec_process(self, ctx: CallContext, request: agent_pb2.ExecProcessRequest) -> Empty:
        """See Container.exec."""
        from agent.fit import beyond
        from agent.sandbox import check_id

        ports = (request.stdin_port, request.stdout_port, request.stderr_port)
        name = check_id(request.exec_id, "exec")
        await self._container(request).exec(name, request.process, ports, beyond(ctx.metadata))
        self.sandbox.on_start()
        return Empty()

    async def signal_process(self, _: CallContext, request: agent_pb2.SignalProcessRequest) -> Empty:
        """See Container.signal."""
        await self._container(request).signal(request.exec_id, request.signal)
        return Empty()

    async def wait_process(
        self, _: CallContext, request: agent_pb2.WaitProcessRequest
    ) -> agent_pb2.WaitProcessResponse:
        """The exit code, when there is one, and after the news of what was killed for memory."""
        process = self._process(request)
        status = await process.wait()
        await self.oom.told(request.container_id)
        process.stdio.let_go()
        return agent_pb2.WaitProcessResponse(status=status)

    async def write_stdin(
        self, _: CallContext, request: agent_pb2.WriteStreamRequest
    ) -> agent_pb2.WriteStreamResponse:
        """All of the data, or an error."""
        written = await self._process(request).stdio.write(request.data)
        return agent_pb2.WriteStreamResponse(len=written)

    async def close_stdin(self, _: CallContext, request: agent_pb2.CloseStdinRequest) -> Empty:
        """EOF for the process."""
        self._process(request).stdio.close_stdin()
        return Empty()

    async def read_stdout(
        self, _: CallContext, request: agent_pb2.ReadStreamRequest
    ) -> agent_pb2.ReadStreamResponse:
        """Some bytes; none means the end."""
        return agent_pb2.ReadStreamResponse(data=await self._process(request).stdio.read(1, request.len))

    async def read_stderr(
        self, _: CallContext, request: agent_pb2.ReadStreamRequest
    ) -> agent_pb2.ReadStreamResponse:
        """Some bytes; none means the end."""
        return agent_pb2.ReadStreamResponse(data=await self._process(request).stdio.read(2, request.len))

    async def tty_win_resize(self, _: CallContext, request: agent_pb2.TtyWinResizeRequest) -> Empty:
        """The terminal's size in characters."""
        self._process(request).stdio.resize(request.row, request.column)
        return Empty()

    # --- events -------------------------------------------------------------------------------

    async def get_oom_event(self, _: CallContext, __: agent_pb2.GetOOMEventRequest) -> agent_pb2.OOMEvent:
        """Waits until the kernel kills something for memory."""
        return agent_pb2.OOMEvent(container_id=await self.oom.next())

    # --- the guest ----------------------------------------------------------------------------

    async def get_guest_details(
        self, _: CallContext, request: agent_pb2.GuestDetailsRequest
    ) -> agent_pb2.GuestDetailsResponse:
        """What this guest and agent can do."""
        from agent.guest import details

        return details(request, VERSION)

    async def online_cpu_mem(self, _: CallContext, request: agent_pb2.OnlineCPUMemRequest) -> Empty:
        """Bring hot-plugged vCPUs and memory into use."""
        from agent.guest import online

        await online(request)
        return Empty()

    async def mem_hotplug_by_probe(
        self, _: CallContext, request: agent_pb2.MemHotplugByProbeRequest
    ) -> Empty:
        """Tell the kernel of memory at these addresses (architectures without ACPI)."""
        from agent.guest import probe_memory

        probe_memory(request.memHotplugProbeAddr)
        return Empty()

    async def reseed_random_dev(self, _: CallContext, request: agent_pb2.ReseedRandomDevRequest) -> Empty:
        """Mix the host's bytes into the kernel's generator."""
        from agent.guest import reseed

        reseed(request.data)
        return Empty()

    async def set_guest_date_time(self, _: CallContext, request: agent_pb2.SetGuestDateTimeRequest) -> Empty:
        """Set the wall clock."""
        from agent.guest import set_clock

        set_clock(request.Sec, request.Usec)
        return Empty()

    async def copy_file(self, _: CallContext, request: agent_pb2.CopyFileRequest) -> Empty:
        """Write a part of a file below the shared directory."""
        from agent.storage.copyfile import copy_file

        copy_file(request)
        return Empty()

    async def get_metrics(self, _: CallContext, __: agent_pb2.GetMetricsRequest) -> agent_pb2.Metrics:
        """Prometheus text."""
        from agent.guest import metrics

        return agent_pb2.Metrics(metrics=metrics(len(self.sandbox.containers)))

    async def get_diagnostic_data(
        self, _: CallContext, request: agent_pb2.GetDiagnosticDataRequest
    ) -> agent_pb2.GetDiagnosticDataResponse:
        """The container's termination message, as in Kata's agent; or its processes, which is ours."""
        container = self._container(request)
        if request.log_type == "termination_log":
            from agent.guest import termination_log

            return agent_pb2.GetDiagnosticDataResponse(data=termination_log(container))
        if request.log_type == "processes":
            from agent.stats import process_list

            return agent_pb2.GetDiagnosticDataResponse(data=process_list(container))
        raise _unimplemented(f"diagnostic data {request.log_type[:60]!r}")

    async def get_volume_stats(
        self, _: CallContext, request: agent_pb2.VolumeStatsRequest
    ) -> csi_pb2.VolumeStatsResponse:
        """Bytes and inodes of a mounted volume."""
        from agent.stats import volume_stats

        return volume_stats(request.volume_guest_path)

    async def resize_volume(self, _: CallContext, request: agent_pb2.ResizeVolumeRequest) -> Empty:
        """Grow a volume's file system to its disk's size (Kata's agent does not)."""
        from agent.storage.volumes import resize_volume

        await resize_volume(request.volume_guest_path, request.size)
        return Empty()

    async def add_swap(self, _: CallContext, request: agent_pb2.AddSwapRequest) -> Empty:
        """Swap to the disk at this PCI path."""
        from agent.storage.volumes import add_swap, pci_path

        await add_swap(pci_path(request.PCIPath))
        return Empty()

    async def add_swap_path(self, _: CallContext, request: agent_pb2.AddSwapPathRequest) -> Empty:
        """Swap to the disk of this name."""
        from agent.storage.volumes import add_swap

        await add_swap(request.path)
        return Empty()

    # --- network ------------------------------------------------------------------------------

    async def update_interface(
        self, ctx: CallContext, request: agent_pb2.UpdateInterfaceRequest
    ) -> types_pb2.Interface:
        """Name, address and raise a link, once it is there."""
        from agent.fit import beyond
        from agent.network.interfaces import update_interface

        if request.interface.devicePath:
            from agent.storage.blockdev import wait_for_link

            await wait_for_link(request.interface.devicePath)
        elif request.interface.hwAddr:
            from agent.storage.blockdev import wait_for_address

            await wait_for_address(request.interface.hwAddr)
        update_interface(request.interface, beyond(ctx.metadata))
        return request.interface

    async def list_interfaces(
        self, _: CallContext, __: agent_pb2.ListInterfacesRequest
    ) -> agent_pb2.Interfaces:
        """All links with their addresses."""
        from agent.network.interfaces import list_interfaces

        return agent_pb2.Interfaces(Interfaces=list_interfaces())

    async def update_routes(
        self, ctx: CallContext, request: agent_pb2.UpdateRoutesRequest
    ) -> agent_pb2.Routes:
        """Replace what the host has set of the guest's routes by these."""
        from agent.fit import beyond
        from agent.network.routes import list_routes, update_routes

        update_routes(request.routes.Routes, beyond(ctx.metadata))
        return agent_pb2.Routes(Routes=list_routes())

    async def list_routes(self, _: CallContext, __: agent_pb2.ListRoutesRequest) -> agent_pb2.Routes:
        """The main table."""
        from agent.network.routes import list_routes

        return agent_pb2.Routes(Routes=list_routes())

    async def add_arp_neighbors(self, _: CallContext, request: agent_pb2.AddARPNeighborsRequest) -> Empty:
        """Static neighbours."""
        from agent.network.interfaces import add_neighbors

        add_neighbors(request.neighbors.ARPNeighbors)
        return Empty()

    # --- what this agent does not do ----------------------------------------------------------

    async def get_ip_tables(self, _: CallContext, __: object) -> Empty:
        """There is no iptables in our image."""
        raise _unimplemented("GetIPTables (the image has no iptables)")

    async def set_ip_tables(self, _: CallContext, __: object) -> Empty:
        """There is no iptables in our image."""
        raise _unimplemented("SetIPTables (the image has no iptables)")

    async def set_policy(self, _: CallContext, __: object) -> Empty:
        """This agent has no policy engine, and must not pretend to have one."""
        raise _unimplemented("SetPolicy (this agent enforces no policy)")

    async def mem_agent_memcg_set(self, _: CallContext, __: object) -> Empty:
        """Kata's memory agent."""
        raise _unimplemented("MemAgentMemcgSet")

    async def mem_agent_compact_set(self, _: CallContext, __: object) -> Empty:
        """Kata's memory agent."""
        raise _unimplemented("MemAgentCompactSet")
