"""Kata's agent as coroutines: one method per RPC the shim sends, each with its deadline.

What: `GuestAgent` wraps a ttrpc client that is connected to port 1024 of the guest.
Why: everything above speaks of containers and processes, not of frames; and what the agent answers
is the guest's word: its error texts are cut, its codes are mapped to the few a caller may see.
An answer is bounded, and taken apart in `shim.sandbox.answers`.
Invariants: a call ends at its deadline at the latest, except the four that wait for the guest by
nature (wait_process, write_stdin, read_stdout, read_stderr), which end when the connection does.
Source: Kata's agent.proto; deadlines from [agent.kata].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

import ttrpc
from devices.errors import CallerError, GuestError, KataError
from devices.plain import plain
from proto import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2
from shim.protocols import Deadlines, GuestContainer, GuestProcess
from shim.sandbox import answers
from shim.spec.oci_fields import BEYOND
from shim.state.trace import Trace

__all__ = ["FEATURE_BEYOND", "FEATURE_LOOPBACK", "METADATA_BEYOND", "GuestAgent"]

#: The agent takes OCI fields that Kata's messages have no place for as JSON in this metadata of a call.
FEATURE_BEYOND = METADATA_BEYOND = "kata-shim-oci"
#: It takes what Kata's messages do not say of addresses, routes and rules, in the same metadata.
FEATURE_NETWORK = "kata-shim-network"
#: It has the service of proto/loopback.proto.
FEATURE_LOOPBACK = "kata-shim-loopback"
_NOTHING: Mapping[str, Any] = {}

_log = structlog.get_logger("agent")

_AGENT = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

#: Codes of the agent that speak about the request and may reach containerd as they are.
_CALLER_CODES = frozenset(
    {"NOT_FOUND", "ALREADY_EXISTS", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNIMPLEMENTED"}
)
_MAX_TEXT = 2048
#: Bytes of all that a stock agent counts.
_MAX_METRICS = 1 << 20
_AVAILABLE = r'item="(?:MemAvailable|mem_available)"\} ([0-9]{1,15})\b'  # ours; the stock agent's
#: Seconds. Who asks has two for his own answer (containerd's State and Pids), and can do without ours.
_PROCESSES_DEADLINE = 1.0


def _bounded(text: str) -> str:
    """The guest's text, plain and short: it ends in logs and in a user's terminal."""
    shown = plain(text[: 2 * _MAX_TEXT])
    return shown if len(shown) <= _MAX_TEXT else shown[: _MAX_TEXT - 3] + "..."


class GuestAgent:
    """The agent of one guest. Implements `shim.protocols.AgentClient`."""

    def __init__(self, client: ttrpc.Client, deadlines: Deadlines, trace: Trace) -> None:
        self._client = client
        self._deadlines = deadlines
        self._trace = trace
        self._features: frozenset[str] | None = None

    async def close(self) -> None:
        """Drop the connection; calls under way end with GuestError."""
        await self._client.close()

    async def lost(self) -> None:
        """Return when the connection is gone, from whichever side."""
        await self._client.closed

    async def _call(
        self,
        name: str,
        request: Any,
        *,
        timeout: float | None = 0.0,
        service: Any = _AGENT,
        beyond: Mapping[str, Any] = _NOTHING,
        limit: int = answers.LIMIT,
    ) -> Any:
        deadline = self._deadlines.request if timeout == 0.0 else timeout
        metadata = {METADATA_BEYOND: [json.dumps(beyond)]} if beyond else None
        try:
            return await self._client.call(
                service.methods_by_name[name],
                request,
                timeout=deadline,
                metadata=metadata,
                max_response=limit,
            )
        except ttrpc.RpcError as error:
            raise self._translated(name, error, deadline) from error
        except (ttrpc.ConnectionClosed, ConnectionError, ttrpc.RemoteProtocolError) as error:
            raise GuestError(
                f"the connection to the agent ended during {name}",
                phase="agent",
                code="UNAVAILABLE",
                hint="see the guest console in the shim's log",
            ) from error

    @staticmethod
    def _translated(name: str, error: ttrpc.RpcError, deadline: float | None) -> KataError:
        code = error.code.name
        if code == "DEADLINE_EXCEEDED":
            within = "in the time that it had" if deadline is None else f"within {deadline:g} s"
            return GuestError(
                f"the agent did not answer {name} {within}",
                phase="agent",
                code=code,
                hint="raise create_container_timeout in [agent.kata] if the host is slow",
            )
        text = _bounded(error.message)
        if code in _CALLER_CODES:
            return CallerError(text, phase=name, code=code)
        return GuestError(text, phase=name, code=code)

    async def _has(self, feature: str) -> bool:
        if self._features is None:
            answer = await self._call("GetGuestDetails", agent_pb2.GuestDetailsRequest())
            self._features = frozenset(answer.agent_details.extra_features)
        return feature in self._features

    async def _call_beyond(self, name: str, request: Any, beyond: Mapping[str, Any]) -> Any:
        """With fields of OCI that a stock agent would not see: they are refused, not lost."""
        if beyond and not await self._has(FEATURE_BEYOND):
            raise CallerError(
                f"the guest's agent has no place for {', '.join(_leaves(beyond))}",
                phase="agent",
                hint="leave it out, or use the guest image of this project",
                code="UNIMPLEMENTED",
            )
        return await self._call(name, request, beyond=beyond)

    async def check(self, timeout: float) -> None:
        """Health.Check; raises GuestError unless the agent says SERVING."""
        answer = await self._call("Check", health_pb2.CheckRequest(), timeout=timeout, service=_HEALTH)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise GuestError("the agent says it does not serve", phase="agent", code="UNAVAILABLE")

    async def create_sandbox(
        self,
        *,
        sandbox_id: str,
        hostname: str,
        dns: Sequence[str],
        storages: Sequence[agent_pb2.Storage],
        guest_hook_path: str = "",
        kernel_modules: Sequence[agent_pb2.KernelModule] = (),
    ) -> None:
        """CreateSandbox: the guest's side of the pod; the agent wipes /run/kata-containers here."""
        request = agent_pb2.CreateSandboxRequest(
            hostname=hostname,
            dns=dns,
            storages=storages,
            sandbox_id=sandbox_id,
            guest_hook_path=guest_hook_path,
            kernel_modules=kernel_modules,
        )
        await self._call("CreateSandbox", request)

    async def create_container(
        self, container_id: str, guest: GuestContainer, *, ports: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        """CreateContainer: the process exists afterwards, stopped. `ports`: stdin, stdout, stderr."""
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id,
            storages=guest.storages,
            devices=guest.devices,
            OCI=guest.spec,
            sandbox_pidns=guest.sandbox_pidns,
        )
        _set_ports(request, ports)
        with self._trace.phase("agent.create_container", id=container_id):
            try:
                await self._call_beyond("CreateContainer", request, guest.beyond)
            except KataError as error:
                for path in sorted(
                    guest.words, key=len, reverse=True
                ):  # the longest first: one begins another
                    error.cause = error.cause.replace(path, guest.words[path])
                raise

    async def start_container(self, container_id: str) -> None:
        """StartContainer."""
        with self._trace.phase("agent.start_container", id=container_id):
            await self._call("StartContainer", agent_pb2.StartContainerRequest(container_id=container_id))

    async def remove_container(self, container_id: str) -> None:
        """RemoveContainer; the guest must be done within the stop deadline."""
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        await self._call("RemoveContainer", request, timeout=self._deadlines.stop)

    async def exec_process(
        self,
        container_id: str,
        exec_id: str,
        process: oci_pb2.Process,
        *,
        ports: tuple[int, int, int] = (0, 0, 0),
        beyond: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """ExecProcess: the process runs afterwards."""
        request = agent_pb2.ExecProcessRequest(container_id=container_id, exec_id=exec_id, process=process)
        _set_ports(request, ports)
        with self._trace.phase("agent.exec_process", id=f"{container_id}/{exec_id}"):
            await self._call_beyond("ExecProcess", request, beyond)

    async def signal_process(self, container_id: str, exec_id: str, signal: int) -> None:
        """SignalProcess; an empty exec id means every process of the container, its own id the init."""
        request = agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        await self._call("SignalProcess", request)

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        """WaitProcess: 0..255, signals as 128+n. No deadline: it ends with the process or the VM."""
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        answer = await self._call("WaitProcess", request, timeout=None)
        return int(answer.status) & 0xFF

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int:
        """WriteStdin: how many bytes the guest took. No deadline: the reader in the guest decides."""
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        answer = await self._call("WriteStdin", request, timeout=None)
        return min(int(answer.len), len(data))

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        """CloseStdin."""
        await self._call(
            "CloseStdin", agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id)
        )

    async def read_stdout(self, container_id: str, exec_id: str, size: int) -> bytes:
        """ReadStdout: at most `size` bytes; empty means the end. No deadline."""
        return await self._read("ReadStdout", container_id, exec_id, size)

    async def read_stderr(self, container_id: str, exec_id: str, size: int) -> bytes:
        """ReadStderr: at most `size` bytes; empty means the end. No deadline."""
        return await self._read("ReadStderr", container_id, exec_id, size)

    async def _read(self, name: str, container_id: str, exec_id: str, size: int) -> bytes:
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=size)
        answer = await self._call(name, request, timeout=None)
        data: bytes = answer.data
        if len(data) > size:
            raise GuestError(
                f"the agent answered {name} with {len(data)} bytes where {size} were asked", phase="stdio"
            )
        return data

    async def tty_win_resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        """TtyWinResize."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._call("TtyWinResize", request, timeout=self._deadlines.stop)

    async def reattach(self, container_id: str, exec_id: str, ports: tuple[int, int, int]) -> None:
        """Reattach of our agent: connections in place of those that ended with an earlier shim."""
        from proto import recovery_pb2  # hardly any shim asks

        request = recovery_pb2.ReattachRequest(container_id=container_id, exec_id=exec_id)
        _set_ports(request, ports)
        service = recovery_pb2.DESCRIPTOR.services_by_name["Recovery"]
        await self._call("Reattach", request, service=service)

    async def pause_container(self, container_id: str) -> None:
        """PauseContainer: the guest's freezer; the VM goes on."""
        await self._call("PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id))

    async def resume_container(self, container_id: str) -> None:
        """ResumeContainer."""
        await self._call("ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id))

    async def stats_container(self, container_id: str) -> agent_pb2.StatsContainerResponse:
        """StatsContainer: the cgroup's figures in the guest."""
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        answer = await self._call("StatsContainer", request, timeout=self._deadlines.stop)
        return answers.check_stats(answer)

    async def list_processes(self, container_id: str) -> list[GuestProcess]:
        """GetDiagnosticData of our agent: a container's processes. A stock agent answers UNIMPLEMENTED."""
        request = agent_pb2.GetDiagnosticDataRequest(log_type="processes", container_id=container_id)
        answer = await self._call("GetDiagnosticData", request, timeout=_PROCESSES_DEADLINE)
        return answers.processes(answer.data)

    async def update_container(
        self,
        container_id: str,
        resources: oci_pb2.LinuxResources,
        *,
        beyond: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """UpdateContainer: new cgroup limits in the guest."""
        request = agent_pb2.UpdateContainerRequest(container_id=container_id, resources=resources)
        await self._call_beyond("UpdateContainer", request, beyond)

    async def online_cpu_mem(self, vcpus: int) -> None:
        """OnlineCPUMem: `vcpus` in all, and whatever memory is there; returns when they are in use."""
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=vcpus)
        with self._trace.phase("agent.online"):
            await self._call("OnlineCPUMem", request)

    async def memory_block_size(self) -> int:
        """GetGuestDetails: bytes in which the guest's kernel takes memory."""
        answer = await self._call("GetGuestDetails", agent_pb2.GuestDetailsRequest(mem_block_size=True))
        return int(answer.mem_block_size_bytes)

    async def memory_available(self) -> int:
        """GetMetrics: bytes that the guest's kernel could hand out, its caches included. Raises GuestError
        when the agent does not say."""
        answer = await self._call("GetMetrics", agent_pb2.GetMetricsRequest(), limit=_MAX_METRICS)
        found = re.search(_AVAILABLE, answer.metrics)
        if found is None:
            raise GuestError("the agent's metrics do not say how much memory is available", phase="sizing")
        return int(found[1])

    async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
        """CopyFile: one piece of a file, a directory or a link below the guest's share."""
        await self._call("CopyFile", request)

    async def copy_again(self, storages: Sequence[agent_pb2.Storage]) -> None:
        """UpdateEphemeralMounts: bring copies of watched volumes up to date. For our agent: a stock one does
        so by itself, and refuses the driver here."""
        request = agent_pb2.UpdateEphemeralMountsRequest(storages=storages)
        await self._call("UpdateEphemeralMounts", request)

    async def volume_stats(self, path: str) -> csi_pb2.VolumeStatsResponse:
        """GetVolumeStats: how full what the guest has mounted there is."""
        request = agent_pb2.VolumeStatsRequest(volume_guest_path=path)
        return answers.check_volume(await self._call("GetVolumeStats", request))

    async def resize_volume(self, path: str, size: int) -> None:
        """ResizeVolume: the file system mounted there grows to its disk, which has `size` bytes. A stock
        agent answers UNIMPLEMENTED."""
        await self._call("ResizeVolume", agent_pb2.ResizeVolumeRequest(volume_guest_path=path, size=size))

    async def add_swap(self, pci_path: str) -> None:
        """AddSwap: the guest swaps to the disk at this path, "02/05"."""
        request = agent_pb2.AddSwapRequest(PCIPath=[int(slot, 16) for slot in pci_path.split("/")])
        await self._call("AddSwap", request)

    async def get_oom_event(self) -> str:
        """GetOOMEvent: the container in which the guest's kernel killed for memory. No deadline."""
        answer = await self._call("GetOOMEvent", agent_pb2.GetOOMEventRequest(), timeout=None)
        return str(answer.container_id)

    async def update_interface(
        self, interface: types_pb2.Interface, beyond: Mapping[str, Any] = _NOTHING
    ) -> None:
        """UpdateInterface: found by its hardware address in the guest. `beyond`: what of its addresses the
        message does not say, for an agent that takes it."""
        request = agent_pb2.UpdateInterfaceRequest(interface=interface)
        await self._call("UpdateInterface", request, beyond=await self._of_network(interface.name, beyond))

    async def update_routes(
        self, routes: Sequence[types_pb2.Route], beyond: Mapping[str, Any] = _NOTHING
    ) -> None:
        """UpdateRoutes. `beyond`: all routes and rules in full, for an agent that takes them."""
        request = agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=routes))
        await self._call("UpdateRoutes", request, beyond=await self._of_network("routes", beyond))

    async def _of_network(self, what: str, beyond: Mapping[str, Any]) -> Mapping[str, Any]:
        if not beyond or await self._has(FEATURE_NETWORK):
            return beyond
        _log.warning("the guest's agent cannot be told all of the pod's network", of=what)
        return _NOTHING

    async def add_arp_neighbors(self, neighbors: Sequence[types_pb2.ARPNeighbor]) -> None:
        """AddARPNeighbors."""
        request = agent_pb2.AddARPNeighborsRequest(neighbors=agent_pb2.ARPNeighbors(ARPNeighbors=neighbors))
        await self._call("AddARPNeighbors", request)

    async def has_loopback(self) -> bool:
        """Whether it can do the next three."""
        return await self._has(FEATURE_LOOPBACK)

    async def listening(
        self, known: tuple[frozenset[int], frozenset[int]], wait: float
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Listening of our agent: the ports at the guest's 127.0.0.1 and ::1, once they are others than
        `known`, or after `wait` seconds."""
        from proto import loopback_pb2  # asked once a container runs

        ports = loopback_pb2.LoopbackPorts(v4=sorted(known[0]), v6=sorted(known[1]))
        request = loopback_pb2.ListeningRequest(known=ports, wait_ms=int(wait * 1000))
        service = loopback_pb2.DESCRIPTOR.services_by_name["Loopback"]
        timeout = wait + self._deadlines.request
        found = (await self._call("Listening", request, service=service, timeout=timeout)).ports
        return frozenset(found.v4), frozenset(found.v6)

    async def dial(self, port: int, v6: bool, stream: int) -> None:
        """Dial of our agent: join the stream of this number with a connection to the guest's loopback."""
        from proto import loopback_pb2

        request = loopback_pb2.DialRequest(port=port, v6=v6, stream=stream)
        service = loopback_pb2.DESCRIPTOR.services_by_name["Loopback"]
        await self._call("Dial", request, service=service)

    async def resolve(self, addresses: Sequence[str], stream: int) -> None:
        """Resolve of our agent: what the guest asks port 53 of these addresses comes by the stream."""
        from proto import loopback_pb2

        request = loopback_pb2.ResolveRequest(addresses=addresses, stream=stream)
        service = loopback_pb2.DESCRIPTOR.services_by_name["Loopback"]
        await self._call("Resolve", request, service=service)

    async def reseed_random_dev(self, data: bytes) -> None:
        """ReseedRandomDev: the guest's random generator goes on with these bytes, at once."""
        await self._call("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=data))

    async def set_guest_date_time(self, seconds: int, microseconds: int) -> None:
        """SetGuestDateTime: after a pause or a restore the guest's clock is late."""
        await self._call(
            "SetGuestDateTime", agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=microseconds)
        )


def _set_ports(request: Any, ports: tuple[int, int, int]) -> None:
    """Port 0 means that the stream goes by calls; stock agents know the fields as optional."""
    for name, port in zip(("stdin_port", "stdout_port", "stderr_port"), ports, strict=True):
        if port:
            setattr(request, name, port)


def _leaves(document: Mapping[str, Any], place: str = "") -> list[str]:
    """The places of all values in it, such as `linux.resources.unified`."""
    found: list[str] = []
    for key, value in document.items():
        where = f"{place}{key}"
        deeper = isinstance(value, Mapping) and where not in BEYOND
        found += _leaves(value, f"{where}.") if deeper else [where]
    return found
