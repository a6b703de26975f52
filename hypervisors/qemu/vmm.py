"""One VM under QEMU: `Qemu` implements `hypervisors.base.Hypervisor`.

What: its start, its daemons (vsock, virtiofsd), its control connection; its death is `death`'s matter.
Why one class: the mission's trait is one, and the parts are started and released in one order.
Invariants:
- Daemons are started by `add_device`, so they get ready while the rest is prepared; their sockets are
  connected before QEMU starts and are inherited by it: QEMU finds nothing to wait for.
- What a method acquired is released by `cleanup`, whatever failed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from typing import Any

import structlog

from devices.child import Child, process_start_time, process_stat
from devices.config import (
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.console import Console
from devices.errors import BugError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.rendezvous import connect_now, listen
from devices.share_fs import Virtiofsd, is_noise
from devices.undo import UndoLog
from devices.vsock import AgentChannel, HybridVsock, KernelVsock, reserve_cid
from devices.vsock_daemon import VsockDaemon
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.cmdline import Placed, Plan, arguments
from hypervisors.qemu.death import GATHER, Death
from hypervisors.qemu.kvm import Choice, choose_accelerator
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.qmp import QmpClient, QmpEvent

__all__ = ["VHOST_VSOCK", "Qemu"]

VHOST_VSOCK = "/dev/vhost-vsock"
_NAME = "qemu"
_QUIT_TIMEOUT = 0.3  # seconds that a running QEMU gets to flush its images
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_FIRST_SLOT, _LAST_SLOT = 0x1, 0x1E  # on pcie.0; 0 is the host bridge, 1f the ISA bridge

_log = structlog.get_logger("qemu")


class Qemu:
    """See the module's docstring and `hypervisors.base.Hypervisor`."""

    def __init__(self, section: HypervisorConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        if not _ID.fullmatch(sandbox_id):
            raise BugError(f"{sandbox_id!r} is no sandbox id")
        self._section = section
        self._sandbox_id = sandbox_id
        self._state_dir = state_dir
        self._undo = undo
        self._netns: str | None = None
        self._choice: Choice | None = None
        self._parts = Parts()
        self._slots = iter(range(_FIRST_SLOT, _LAST_SLOT + 1))
        self._death: Death | None = None  # from `start_vm` on

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`. Chooses the accelerator."""
        if id != self._sandbox_id:
            raise BugError(f"this VM was created for {self._sandbox_id}, not for {id}")
        self._netns = netns
        self._choice = choose_accelerator(self._section.accelerator)
        _log.info("accelerator", name=self._choice.accelerator.value, reason=self._choice.reason)

    async def start_vm(self, timeout: float) -> None:
        """See `Hypervisor.start_vm`."""
        if self._choice is None or self._death is not None:
            raise BugError("start_vm needs prepare_vm before it, and once")
        parts = self._parts
        self._death = Death(self._section, parts)
        try:
            async with asyncio.timeout(timeout):
                await self._spawn(timeout)
        except TimeoutError:
            await self.stop_vm()
            raise self._with_evidence(
                HypervisorError(f"QEMU did not start within {timeout:g} s", code="DEADLINE_EXCEEDED")
            ) from None
        except KataError as error:
            await self.stop_vm()
            raise self._with_evidence(error) from None
        except BaseException:
            await self.stop_vm()
            raise
        assert parts.process is not None
        _log.info("QEMU runs", pid=parts.process.pid, daemons=[child.pid for child in parts.daemons])

    async def wait_vm(self) -> VmExit:
        """See `Hypervisor.wait_vm`."""
        if self._death is None:
            raise BugError("wait_vm needs start_vm before it")
        return await asyncio.shield(self._death.ended)

    async def stop_vm(self) -> None:
        """See `Hypervisor.stop_vm`: `quit` with a short deadline, then SIGKILL."""
        parts = self._parts
        if self._death is not None:
            self._death.stopping = True
        if parts.qmp is not None and parts.process is not None and parts.process.alive:
            with contextlib.suppress(KataError):
                await parts.qmp.execute("quit", timeout=_QUIT_TIMEOUT)
            with contextlib.suppress(TimeoutError):
                await parts.process.wait(_QUIT_TIMEOUT)
        if parts.process is not None:
            await parts.process.kill()
        if self._death is not None:
            await self._death.told()

    async def pause_vm(self) -> None:
        """See `Hypervisor.pause_vm`."""
        await self._qmp().execute("stop")

    async def resume_vm(self) -> None:
        """See `Hypervisor.resume_vm`."""
        await self._qmp().execute("cont")

    async def save_vm(self, path: str) -> None:
        """Not yet: templates need a VM without vhost-user devices."""
        raise UnsupportedByHypervisor(_NAME, f"saving a VM (to {path})")

    # --- sizing

    async def resize_vcpu(self, count: int) -> int:
        """Not yet."""
        raise UnsupportedByHypervisor(_NAME, f"changing the number of vCPUs of a running VM (to {count})")

    async def resize_memory(self, mib: int) -> int:
        """Not yet."""
        raise UnsupportedByHypervisor(_NAME, f"changing the memory of a running VM (to {mib} MiB)")

    # --- devices

    async def add_device(self, device: DeviceConfig) -> str:
        """See `Hypervisor.add_device`. Before `start_vm` only; starts the device's daemon."""
        if self._death is not None:
            raise UnsupportedByHypervisor(_NAME, f"hot-plug of {type(device).__name__}")
        if any(placed.device.id == device.id for placed in self._parts.placed):
            raise BugError(f"there is a device {device.id} already")
        slot = 0 if isinstance(device, ConsoleConfig) else next(self._slots, 0)
        if slot == 0 and not isinstance(device, ConsoleConfig):
            raise HypervisorError(f"no free PCI slot for {device.id}: a VM has {_LAST_SLOT}")
        match device:
            case ShareFsConfig():
                await self._add_share_fs(device, slot)
            case VsockConfig():
                await self._add_vsock(device, slot)
            case ConsoleConfig():
                self._parts.console = Console(self._log_console if self._section.enable_debug else None)
                self._parts.placed.append(Placed(device=device, fd=self._parts.console.guest_end))
            case _:
                self._parts.placed.append(Placed(device=device, slot=slot))
        return f"{slot:02x}" if slot else ""

    async def remove_device(self, device_id: str) -> None:
        """Before `start_vm` only, and only what has no daemon."""
        placed = next((one for one in self._parts.placed if one.device.id == device_id), None)
        if self._death is not None or placed is None or placed.fd >= 0:
            raise UnsupportedByHypervisor(_NAME, f"removing device {device_id}")
        self._parts.placed.remove(placed)

    async def update_device(self, device: DeviceConfig) -> None:
        """Nothing here can be changed while it is plugged."""
        raise UnsupportedByHypervisor(_NAME, f"changing device {device.id}")

    # --- knowledge

    async def get_agent_socket(self) -> AgentChannel:
        """See `Hypervisor.get_agent_socket`."""
        if self._parts.channel is None:
            raise BugError("this VM has no vsock device")
        return self._parts.channel

    async def disconnect(self) -> None:
        """See `Hypervisor.disconnect`."""
        if self._parts.qmp is not None:
            await self._parts.qmp.close()
            self._parts.qmp = None

    async def hypervisor_config(self) -> HypervisorConfig:
        """See `Hypervisor.hypervisor_config`."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """See `Hypervisor.get_thread_ids`."""
        cpus = await self._qmp().execute("query-cpus-fast")
        try:
            return VcpuThreadIds({int(cpu["cpu-index"]): int(cpu["thread-id"]) for cpu in cpus})
        except (KeyError, TypeError, ValueError) as error:
            raise HypervisorError(f"QEMU's answer to query-cpus-fast makes no sense: {error!r}") from error

    async def get_pids(self) -> list[int]:
        """See `Hypervisor.get_pids`."""
        children = [self._parts.process, *self._parts.daemons]
        return [child.pid for child in children if child is not None and child.alive]

    async def get_vmm_master_tid(self) -> int:
        """See `Hypervisor.get_vmm_master_tid`."""
        return self._process().pid

    async def get_ns_path(self) -> str:
        """See `Hypervisor.get_ns_path`."""
        return f"/proc/{self._process().pid}/ns/net"

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`."""
        await self.stop_vm()
        parts = self._parts
        await parts.end_daemons()
        if parts.channel is not None:
            await parts.channel.close()
        if parts.qmp is not None:
            await parts.qmp.close()
        if parts.console is not None:
            parts.console.close()
        if parts.vhost_fd >= 0:
            os.close(parts.vhost_fd)
            parts.vhost_fd = -1
        with contextlib.suppress(OSError):
            os.unlink(f"{self._state_dir}/qmp.sock")

    async def check(self) -> None:
        """See `Hypervisor.check`."""
        status = await self._qmp().execute("query-status")
        if not isinstance(status, dict) or status.get("status") not in ("running", "paused"):
            raise HypervisorError(f"the VM does not run: {status!r:.100}")

    async def get_jailer_root(self) -> str:
        """QEMU sees the host's root."""
        return ""

    async def save_state(self) -> HypervisorState:
        """See `Hypervisor.save_state`."""
        process = self._process()
        with contextlib.suppress(ProcessLookupError):
            return HypervisorState(
                hypervisor=_NAME,
                sandbox_id=self._sandbox_id,
                pid=process.pid,
                start=process_start_time(process.pid),
                accelerator=self._choice.accelerator.value if self._choice else "",
                netns=self._netns or "",
                sockets={"qmp": f"{self._state_dir}/qmp.sock"},
            )
        raise HypervisorError("the VM does not run")

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        return Capabilities(
            block_device=True,
            network_device=True,
            fs_sharing=self._section.shared_fs != "none",
            hybrid_vsock=not os.path.exists(VHOST_VSOCK),
            pause=True,
        )

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """CPU seconds and resident bytes of QEMU and its daemons, from /proc."""
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        metrics = {"cpu_seconds_total": 0.0, "resident_bytes": 0.0, "processes": 0.0}
        for pid in await self.get_pids():
            with contextlib.suppress(ProcessLookupError):
                fields = process_stat(pid)
                metrics["cpu_seconds_total"] += (int(fields[11]) + int(fields[12])) / tick
                metrics["resident_bytes"] += int(fields[21]) * page
                metrics["processes"] += 1
        return metrics

    def diagnostics(self) -> dict[str, str]:
        """See `Hypervisor.diagnostics`."""
        return self._parts.diagnostics()

    # --- how it is done

    async def _add_share_fs(self, device: ShareFsConfig, slot: int) -> None:
        daemon = await Virtiofsd.start(device, self._state_dir, self._undo, self._log_output("virtiofsd"))
        self._parts.share_fs = daemon
        self._parts.daemons.append(daemon.child)
        self._parts.placed.append(Placed(device=device, slot=slot, fd=daemon.connection.fileno()))

    async def _add_vsock(self, device: VsockConfig, slot: int) -> None:
        parts = self._parts
        if os.path.exists(VHOST_VSOCK):
            parts.vhost_fd, cid = reserve_cid(VHOST_VSOCK)
            parts.channel = KernelVsock(cid, home_call=device.home_call, diagnostics=self.diagnostics)
            parts.placed.append(Placed(device=device, slot=slot, fd=parts.vhost_fd, cid=cid))
            return
        _log.info("no kernel vsock", device=VHOST_VSOCK, instead="vhost-device-vsock")
        parts.vsock = await VsockDaemon.start(
            device, self._state_dir, self._undo, self._log_output("vhost-device-vsock")
        )
        parts.daemons.append(parts.vsock.child)
        parts.channel = HybridVsock(
            parts.vsock.path, home_call=device.home_call, diagnostics=self.diagnostics
        )
        parts.placed.append(Placed(device=device, slot=slot))  # its descriptor comes in `_spawn`

    async def _spawn(self, timeout: float) -> None:
        """QEMU up to an answering QMP. Raises KataError, TimeoutError."""
        assert self._choice is not None
        parts = self._parts
        inherited: list[socket.socket] = []
        qmp_path = f"{self._state_dir}/qmp.sock"
        control: socket.socket | None = None
        try:
            listener = listen(qmp_path)
            inherited.append(listener)
            # Its backlog takes us before QEMU exists: one that dies at once cannot refuse us any more.
            control = connect_now(qmp_path)
            control.setblocking(False)
            placed = parts.placed
            if parts.vsock is not None:
                vsock = await parts.vsock.connect()
                inherited.append(vsock)
                placed = [
                    Placed(device=one.device, slot=one.slot, fd=vsock.fileno())
                    if isinstance(one.device, VsockConfig)
                    else one
                    for one in placed
                ]
            if parts.share_fs is not None:
                inherited.append(parts.share_fs.connection)
            plan = Plan(
                sandbox_id=self._sandbox_id,
                section=self._section,
                accelerator=self._choice.accelerator,
                vcpus=max(1, -int(-self._section.default_vcpus // 1)),
                qmp_fd=listener.fileno(),
                devices=placed,
                home_port=parts.channel.home_port if parts.channel else 0,
            )
            fds = [listener.fileno(), *(one.fd for one in placed if one.fd >= 0)]
            for one in placed:
                if isinstance(one.device, NetworkConfig):
                    fds += [*one.device.tap_fds, *one.device.vhost_fds]
            parts.process = await Child.spawn(
                [self._section.path, *arguments(plan)],
                name=_NAME,
                undo=self._undo,
                netns=self._netns,
                pass_fds=fds,
                on_output=self._log_output(_NAME),
            )
        except BaseException:
            if control is not None:
                control.close()
            raise
        finally:
            for sock in inherited:
                sock.close()
        if parts.console is not None:
            parts.console.handed_over()
        assert self._death is not None
        self._death.begin(f"watch {self._sandbox_id}")
        await self._open_control(control, timeout)

    async def _open_control(self, control: socket.socket, timeout: float) -> None:
        """QMP, or the reason why not: whoever dies first ends the wait."""
        assert self._death is not None
        ended = self._death.ended
        connecting = asyncio.create_task(QmpClient.connect(control, timeout=timeout, on_event=self._on_event))
        waits: set[asyncio.Future[Any]] = {connecting, ended}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not connecting.done():
                connecting.cancel()
                await asyncio.wait({connecting})
        if connecting.cancelled() or connecting.exception() is not None:
            # The control socket usually breaks a moment before the death is noticed: prefer the cause.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER):
                    await asyncio.shield(ended)
        if ended.done():
            if not connecting.cancelled() and connecting.exception() is None:
                await connecting.result().close()
            raise self._death.error(ended.result())
        self._parts.qmp = connecting.result()

    def _on_event(self, event: QmpEvent) -> None:
        _log.debug("QMP event", event_name=str(event["event"])[:50], data=repr(event.get("data"))[:200])
        if self._death is not None:
            self._death.see(event)

    def _with_evidence(self, error: KataError) -> KataError:
        return error.with_context(phase="boot", details=self.diagnostics())

    def _log_output(self, name: str) -> Any:
        def log(data: bytes) -> None:
            for line in data.decode("utf-8", "replace").splitlines():
                if line.strip():
                    level = _log.debug if is_noise(line) else _log.warning
                    level("stderr", source=name, line=line[:500])

        return log

    def _log_console(self, data: bytes) -> None:
        for line in data.decode("utf-8", "replace").splitlines():
            if line.strip():
                _log.debug("console", line=line[:500])

    def _process(self) -> Child:
        if self._parts.process is None:
            raise HypervisorError("the VM was not started", code="FAILED_PRECONDITION")
        return self._parts.process

    def _qmp(self) -> QmpClient:
        if self._parts.qmp is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return self._parts.qmp
