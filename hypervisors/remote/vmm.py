"""One VM of somebody else: `RemoteVm` implements `hypervisors.base.Hypervisor` by asking a service for it.

What: CreateVM and StartVM at the start, StopVM at the end, Version in between; the agent is reached through
the socket that CreateVM answers with.
Invariants:
- The VM's name is the state directory's, which no other sandbox of this host has: who stops it stops no
  other's.
- What might exist is stopped: from before CreateVM is sent the undo log has it, and a start that failed, or
  was given up, is followed by StopVM, but never before CreateVM has been answered: the service would not know
  the VM yet. One that CreateVM was refused for never existed.
- `stop_vm` returns within a second, whether the service has answered or not; `cleanup` waits longer, and
  leaves the entry in the undo log if there was no answer: `delete` asks once more.
- There is no process: the VM's pid is the shim's, as in Kata. Nobody tells us of the VM's death but the end
  of the agent's connection, or its silence.
Source: Kata Containers 4.1.0, runtime-rs' remote hypervisor, for what is told; cloud-api-adaptor's needs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping

import structlog

from devices.config import DeviceConfig, VsockConfig
from devices.errors import BugError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from devices.undo import Entry, UndoLog
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
from hypervisors.remote.abilities import MOST, NO_PAUSE
from hypervisors.remote.channel import MAX_PATH, ProxySocket
from hypervisors.remote.config import RemoteConfig
from hypervisors.remote.service import RefusedError, Service

__all__ = ["STOP_SECONDS", "UNDO_KIND", "RemoteVm"]

UNDO_KIND = "remote-vm"
_AT_ONCE = 0.9  # seconds of `stop_vm`
STOP_SECONDS = 30
"""For the service to end a VM."""
_CHECK = 5.0
_POD = {  # what is told: what containerd's CRI calls it, what CRI-O does
    "io.kubernetes.cri.sandbox-name": "io.kubernetes.cri-o.KubeName",
    "io.kubernetes.cri.sandbox-namespace": "io.kubernetes.cri-o.Namespace",
}
_SIZE = "io.katacontainers.config.hypervisor."

_log = structlog.get_logger("vmm")


class RemoteVm:
    """See the module's docstring."""

    name = "remote"

    def __init__(self, section: RemoteConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        self._section = section
        self._sandbox_id = sandbox_id
        self._vm = os.path.basename(state_dir)
        self._undo = undo
        self._service = Service(section.remote_hypervisor_socket)
        self._annotations: Mapping[str, str] = {}
        self._netns = ""
        self._channel: ProxySocket | None = None
        self._entry: Entry | None = None
        self._prepared = False
        self._asked = False  # to stop
        self._starting: asyncio.Task[None] | None = None
        self._creating: asyncio.Task[str] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()

    # --- the VM's life

    async def for_pod(self, annotations: Mapping[str, str]) -> None:
        """See `Hosted.for_pod`."""
        self._annotations = annotations

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002
        """See `Hypervisor.prepare_vm`. Nothing is asked of the service yet."""
        if id != self._sandbox_id:
            raise BugError(f"this VM was created for {self._sandbox_id}, not for {id}")
        self._netns = netns or ""
        self._prepared = True

    async def start_vm(self, timeout: float) -> None:
        """See `Hypervisor.start_vm`: within the section's time, however short `timeout` is."""
        if not self._prepared or self._channel is None or self._starting is not None:
            raise BugError("start_vm needs prepare_vm and a vsock device before it, and once")
        limit = max(timeout, self._section.remote_hypervisor_timeout)
        self._starting = asyncio.create_task(self._start(self._channel, limit), name="start the remote VM")
        try:
            await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            self._starting.cancel()
            await asyncio.wait({self._starting})
            if not self._asked:
                raise
            raise HypervisorError("the VM was stopped while it started", code="ABORTED") from None
        except KataError as error:
            raise error.with_context(phase="boot") from None
        _log.info("a remote VM runs", vm=self._vm, agent=self._channel.path)

    async def _start(self, channel: ProxySocket, limit: float) -> None:
        began = time.monotonic()
        self._entry = self._undo.record(UNDO_KIND, socket=self._service.path, vm=self._vm)
        work = self._service.create(self._vm, self._told(), self._netns, limit)
        self._creating = asyncio.create_task(work, name="create the remote VM")
        try:
            channel.path = _checked(await asyncio.shield(self._creating))
            await self._service.start(self._vm, max(1.0, limit - (time.monotonic() - began)))
        except BaseException:
            self._begin_stop()
            raise

    def _told(self) -> dict[str, str]:
        section, own = self._section, self._annotations
        told = {key: own.get(key) or own.get(other, "") for key, other in _POD.items()}
        if not all(told.values()):  # cloud-api-adaptor refuses a VM without
            told |= {key: value or self._sandbox_id for key, value in told.items()}
        size = {
            "machine_type": section.machine_type,
            "default_vcpus": str(-int(-section.default_vcpus // 1)),
            "default_memory": str(section.default_memory),
            "image": section.image,
            "cc_init_data": section.initdata,
            "default_gpus": str(section.default_gpus),
            "default_gpu_model": section.default_gpu_model,
        }
        return told | {_SIZE + key: value for key, value in size.items()}

    async def stop_vm(self) -> None:
        """See `Hypervisor.stop_vm`."""
        self._asked = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
        stopping = self._begin_stop()
        if self._channel is not None:
            self._channel.fail(lambda: HypervisorError("the VM was stopped"))
        if stopping is not None:
            await asyncio.wait({stopping}, timeout=_AT_ONCE)
        if not self._ended.done():
            self._ended.set_result(VmExit(0, "the VM was stopped", expected=True))

    def _begin_stop(self) -> asyncio.Task[None] | None:
        if self._stopping is None and self._entry is not None:
            self._stopping = asyncio.create_task(self._stop(self._entry), name="stop the remote VM")
        return self._stopping

    async def _stop(self, entry: Entry) -> None:
        assert self._creating is not None
        await asyncio.wait({self._creating}, timeout=STOP_SECONDS)
        answered = self._creating.done()
        if not answered:
            self._creating.cancel()
        elif isinstance(self._creating.exception(), RefusedError):
            self._forget(entry)
            return
        try:
            await self._service.stop(self._vm, STOP_SECONDS)
        except RefusedError as error:
            if not answered:
                raise  # it may be made yet
            # Nothing more can be done about it; most often it is gone.
            _log.warning("the VM's end was refused", vm=self._vm, error=str(error))
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._undo.forget(entry)
        self._entry = None

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`. Raises HypervisorError if the VM may be there still."""
        await self.stop_vm()
        if self._stopping is not None:
            await asyncio.wait({self._stopping})
            self._stopping.result()

    async def wait_vm(self) -> VmExit:
        """See `Hypervisor.wait_vm`."""
        if self._starting is None:
            raise BugError("wait_vm needs start_vm before it")
        return await asyncio.shield(self._ended)

    async def pause_vm(self) -> None:
        """It cannot."""
        raise UnsupportedByHypervisor(self.name, f"pausing a VM: {NO_PAUSE}")

    async def save_vm(self, path: str) -> None:  # noqa: ARG002
        """It cannot."""
        raise UnsupportedByHypervisor(self.name, f"saving a VM: {NO_PAUSE}")

    async def resume_vm(self) -> None:
        """It cannot."""
        raise UnsupportedByHypervisor(self.name, f"resuming a VM: {NO_PAUSE}")

    # --- sizing and devices

    async def resize_vcpu(self, count: int) -> int:  # noqa: ARG002
        """It cannot."""
        MOST.require(self.name, Kind.VCPU, Op.HOT)
        raise BugError("it can, and does not")  # pragma: no cover

    async def resize_memory(self, mib: int) -> int:  # noqa: ARG002
        """It cannot."""
        MOST.require(self.name, Kind.DIMM, Op.HOT)
        raise BugError("it can, and does not")  # pragma: no cover

    async def add_device(self, device: DeviceConfig) -> str:
        """The way to the agent, and nothing else."""
        MOST.require(self.name, device.kind, Op.COLD if self._starting is None else Op.HOT)
        assert isinstance(device, VsockConfig)
        if device.home_call:
            raise UnsupportedByHypervisor(
                self.name, "home_call: the guest cannot reach this host"
            ).with_context(hint="home_call = false in [agent.kata], or no such key")
        self._channel = ProxySocket()
        return ""

    async def remove_device(self, device_id: str) -> None:
        """It cannot."""
        raise UnsupportedByHypervisor(self.name, f"unplugging {device_id}: nothing was plugged")

    async def update_device(self, device: DeviceConfig) -> None:
        """It cannot."""
        MOST.require(self.name, device.kind, Op.RESIZE)

    # --- knowledge

    async def get_agent_socket(self) -> ProxySocket:
        """See `Hypervisor.get_agent_socket`."""
        if self._channel is None:
            raise BugError("this VM has no vsock device")
        return self._channel

    async def disconnect(self) -> None:
        """There is no connection that stays."""

    async def hypervisor_config(self) -> RemoteConfig:
        """See `Hypervisor.hypervisor_config`."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """None of this host's."""
        return VcpuThreadIds()

    async def get_pids(self) -> list[int]:
        """None of this host's."""
        return []

    async def get_vmm_master_tid(self) -> int:
        """The shim's own: a task has a pid, and nothing else here stands for it."""
        return os.getpid()

    async def get_ns_path(self) -> str:
        """The shim's own."""
        return f"/proc/{os.getpid()}/ns/net"

    async def check(self) -> None:
        """Whether the service answers; it is not asked about the VM, of which it would know nothing."""
        await self._service.version(_CHECK)

    async def get_jailer_root(self) -> str:
        """The host's."""
        return ""

    async def save_state(self) -> HypervisorState:
        """See `Hypervisor.save_state`."""
        sockets = {"hypervisor": self._service.path}
        if self._channel is not None and self._channel.path:
            sockets["agent"] = self._channel.path
        return HypervisorState(
            hypervisor=self.name,
            sandbox_id=self._sandbox_id,
            netns=self._netns,
            sockets=sockets,
            unfit="VMs on another machine are not taken over",
        )

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        return MOST

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """It uses nothing of this host."""
        return {}

    def diagnostics(self) -> dict[str, str]:
        """The service's words are in its errors; nobody sees the guest's console here."""
        return {}


def _checked(path: str) -> str:
    """The agent's socket, as the service named it. Raises HypervisorError."""
    if not path:
        raise HypervisorError("the hypervisor service has made a VM, and named no socket of its agent")
    if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > MAX_PATH:
        raise HypervisorError(
            f"the hypervisor service names {path[:200]!r} as the agent's socket: no absolute path of at most"
            f" {MAX_PATH} bytes"
        )
    return path
