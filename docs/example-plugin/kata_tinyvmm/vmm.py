"""One VM: a QEMU that begins with what its arguments and inherited sockets say; disks come and go later.

Only what a sandbox needs: disks, the agent's vsock, the shared directory, a console. Nothing else can be
plugged, and nothing paused or resized: `capabilities` says so, and these calls raise. QEMU's control
connection is the shim's own client for it (`hypervisors.qemu.qmp`); yours has one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, NoReturn

from devices.addresses import PciTopology
from devices.child import Child, process_memory, process_start_time, process_stat, thread_ids
from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.confine import Bind, Confinement, View
from devices.console import Console
from devices.errors import BugError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.kinds import YES, Kind, Op, Support
from devices.share_fs import Virtiofsd
from devices.threads import look
from devices.undo import UndoLog
from devices.vsock import AgentChannel, HybridVsock, KernelVsock, reserve_cid
from devices.vsock_daemon import VsockDaemon
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
from hypervisors.qemu.kvm import choose_accelerator
from hypervisors.qemu.qmp import QmpClient, QmpEvent
from kata_tinyvmm.arguments import machine, node, root_port
from kata_tinyvmm.plugged import Plugged

if TYPE_CHECKING:
    from kata_tinyvmm.plugin import TinyConfig

__all__ = ["DEVICES", "TinyVm"]

VHOST_VSOCK = "/dev/vhost-vsock"
_FIXED = "tiny takes all but disks before the start"
DEVICES = {
    kind: Support(cold=YES, hot=_FIXED, unplug=_FIXED, resize=_FIXED)
    for kind in (Kind.VSOCK, Kind.SHARE_FS, Kind.RNG, Kind.CONSOLE, Kind.VCPU)
} | {Kind.BLK: Support(cold=YES, hot=YES, unplug=YES, resize=YES)}
_PORTS = 8  # disks that can be plugged while it runs
_GATHER = 0.25  # seconds in which QEMU follows a daemon into death, or the other way round


class TinyVm:
    """See `hypervisors.base.Hypervisor`, which says what each method promises."""

    def __init__(self, section: TinyConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        self._section = section
        self._sandbox_id = sandbox_id
        self._state_dir = state_dir
        self._undo = undo
        self._netns: str | None = None
        self._accelerator = ""
        self._argv: dict[str, list[str]] = {}  # of each device, by its id
        self._fds: list[int] = []  # that QEMU inherits
        self._disks: dict[str, Bind] = {}  # files that QEMU opens itself, likewise
        self._topology = PciTopology()
        self._topology.add_root_ports(_PORTS)
        self._plugged = Plugged(self._topology, self._control)
        self._vsock: VsockDaemon | None = None
        self._vsock_device = ""
        self._vhost_fd = -1
        self._share_fs: Virtiofsd | None = None
        self._console: Console | None = None
        self._channel: HybridVsock | KernelVsock | None = None
        self._qemu: Child | None = None
        self._monitor: socket.socket | None = None
        self._qmp: QmpClient | None = None
        self._guests_end = ""  # what QEMU said of it
        self._ended: asyncio.Future[VmExit] | None = None
        self._starting: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """KVM where it is of use, else TCG."""
        if id != self._sandbox_id:
            raise BugError(f"this VM was created for {self._sandbox_id}, not for {id}")
        self._netns = netns
        self._accelerator = choose_accelerator("auto").accelerator.value

    async def add_device(self, device: DeviceConfig) -> str:
        """Before the start: what it is as arguments, and its daemon. Later: a disk, into a port. Returns the
        slots of its place, which are chosen here, so that the guest finds it there."""
        hot = self._ended is not None
        (await self.capabilities()).require("tiny", device.kind, Op.HOT if hot else Op.COLD)
        if device.id in self._argv or device.id in self._plugged.ids:
            raise BugError(f"there is a device {device.id} already")
        if hot:
            assert isinstance(device, BlockConfig)  # by its capabilities
            return await self._plugged.add(device)
        if isinstance(device, ConsoleConfig):  # on no bus
            self._console = Console()
            self._fds.append(self._console.guest_end)
            chardev = f"socket,id=console,fd={self._console.guest_end}"
            self._argv[device.id] = ["-chardev", chardev, "-serial", "chardev:console"]
            return ""
        place = self._topology.allocate(device.id)
        try:
            self._argv[device.id] = await self._words(device, f"bus={place.bus},addr={place.slot:#x}")
        except BaseException:
            self._topology.release(device.id)
            raise
        return place.guest_path

    async def _words(self, device: DeviceConfig, at: str) -> list[str]:
        """The arguments for a device at this place of the bus."""
        match device:
            case BlockConfig():
                self._disks[device.id] = Bind(path=device.path, writable=not device.read_only)
                argv = ["-blockdev", json.dumps(node(device, device.path))]
                return [*argv, "-device", f"virtio-blk-pci,id={device.id},drive=node-{device.id},{at}"]
            case VsockConfig():
                return await self._add_vsock(device, at)
            case ShareFsConfig():
                self._share_fs = await Virtiofsd.start(device, self._state_dir, self._undo)
                fd = self._share_fs.connection.fileno()
                return self._socket(fd, device.id, f"vhost-user-fs-pci,tag={device.tag},{at}")
            case RngConfig():
                source = {"qom-type": "rng-random", "id": "src", "filename": device.source}
                return ["-object", json.dumps(source), "-device", f"virtio-rng-pci,rng=src,{at}"]
        raise BugError(f"{device.kind.value} is among the capabilities, but not here")

    async def start_vm(self, timeout: float) -> None:
        """Start QEMU; it runs when its monitor tells its vCPUs' threads."""
        if not self._accelerator or self._ended is not None:
            raise BugError("start_vm needs prepare_vm before it, and once")
        loop = asyncio.get_running_loop()
        self._ended, self._starting = loop.create_future(), loop.create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._start(timeout)
        except BaseException as error:
            stopped, self._stopping = self._stopping, True
            await self._end()
            if stopped and isinstance(error, KataError):
                raise HypervisorError("the VM was stopped while it started", phase="boot") from error
            if isinstance(error, TimeoutError):
                late = f"QEMU did not start within {timeout:g} s"
                raise HypervisorError(
                    late, phase="boot", code="DEADLINE_EXCEEDED", details=self.diagnostics()
                ) from None
            raise
        finally:
            self._starting.set_result(None)

    async def stop_vm(self) -> None:
        """SIGKILL; a start that is under way gives up. Idempotent."""
        self._stopping = True
        await self._end()
        if self._starting is not None and not self._starting.done():
            await asyncio.wait({self._starting})
            await self._end()

    async def wait_vm(self) -> VmExit:
        """See the protocol."""
        if self._ended is None:
            raise BugError("wait_vm needs start_vm before it")
        return await asyncio.shield(self._ended)

    async def cleanup(self) -> None:
        """Everything that was acquired. Idempotent."""
        await self.stop_vm()
        if self._channel is not None:
            await self._channel.close()
        if self._console is not None:
            self._console.close()
        await self.disconnect()
        if self._monitor is not None:
            self._monitor.close()
        if self._vhost_fd >= 0:
            os.close(self._vhost_fd)
            self._vhost_fd = -1

    # --- what it cannot

    async def pause_vm(self) -> None:
        """Unsupported."""
        self._cannot("pausing")

    async def resume_vm(self) -> None:
        """Unsupported."""
        self._cannot("resuming")

    async def save_vm(self, path: str) -> None:
        """Unsupported."""
        self._cannot(f"saving a VM to {path}")

    async def resize_vcpu(self, count: int) -> int:
        """Unsupported."""
        self._cannot(f"a change to {count} vCPUs")

    async def resize_memory(self, mib: int) -> int:
        """Unsupported."""
        self._cannot(f"a change to {mib} MiB")

    async def remove_device(self, device_id: str) -> None:
        """Disks: before the start each, later what was plugged since."""
        if self._ended is None and device_id in self._disks:
            del self._argv[device_id], self._disks[device_id]
            self._topology.release(device_id)
            return
        if device_id not in self._plugged.ids:
            self._cannot(f"taking {device_id} away")
        await self._plugged.remove(device_id)

    async def update_device(self, device: DeviceConfig) -> None:
        """A disk has the size now that its file has."""
        if not isinstance(device, BlockConfig) or device.id not in {*self._disks, *self._plugged.ids}:
            self._cannot(f"an update of {device.id}")
        size = device.size or (await look(os.stat, device.path)).st_size
        await self._control().execute("block_resize", {"node-name": f"node-{device.id}", "size": size})

    # --- knowledge

    async def get_agent_socket(self) -> AgentChannel:
        """See the protocol."""
        if self._channel is None:
            raise BugError("this VM has no vsock device")
        return self._channel

    async def disconnect(self) -> None:
        """See the protocol."""
        if self._qmp is not None:
            await self._qmp.close()
            self._qmp = None

    async def hypervisor_config(self) -> TinyConfig:
        """See the protocol."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """QEMU is the first process of a pid namespace, and tells the numbers that they have there."""
        cpus = await self._control().execute("query-cpus-fast")
        known = await look(thread_ids, self._process().pid)
        return VcpuThreadIds({int(cpu["cpu-index"]): known[int(cpu["thread-id"])] for cpu in cpus})

    async def get_pids(self) -> list[int]:
        """QEMU, then its daemons."""
        children = [self._qemu, *self._daemons()]
        return [child.pid for child in children if child is not None and child.alive]

    async def get_vmm_master_tid(self) -> int:
        """See the protocol."""
        return self._process().pid

    async def get_ns_path(self) -> str:
        """See the protocol."""
        return f"/proc/{self._process().pid}/ns/net"

    async def check(self) -> None:
        """A process that lives is not enough: QEMU has to say so."""
        status = await self._control().execute("query-status")
        if status.get("status") != "running":
            raise HypervisorError(f"the VM does not run: {status!r:.100}")

    async def get_jailer_root(self) -> str:
        """QEMU sees the host's root."""
        return ""

    async def save_state(self) -> HypervisorState:
        """See the protocol."""
        pid = self._process().pid
        return HypervisorState(
            hypervisor="tiny",
            sandbox_id=self._sandbox_id,
            pid=pid,
            start=process_start_time(pid),
            accelerator=self._accelerator,
            netns=self._netns or "",
        )

    async def capabilities(self) -> Capabilities:
        """See the protocol."""
        devices = dict(DEVICES)
        if self._section.shared_fs == "none":
            del devices[Kind.SHARE_FS]
        return Capabilities(devices=devices, hybrid_vsock=not os.path.exists(VHOST_VSOCK))

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """From /proc. The guest's memory, which its daemons map too, counts once, with QEMU."""
        cpu = resident = 0.0
        for index, pid in enumerate(await self.get_pids()):
            with contextlib.suppress(ProcessLookupError):
                own, shared = process_memory(pid)
                resident += own if index else own + shared
                cpu += sum(map(int, process_stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")
        return {"cpu_seconds_total": cpu, "resident_bytes": resident}

    def diagnostics(self) -> dict[str, str]:
        """What everybody said last."""
        said = {"vmm stderr": self._qemu.stderr_tail() if self._qemu else ""}
        said["virtiofsd stderr"] = self._share_fs.stderr_tail() if self._share_fs else ""
        said["vsock stderr"] = self._vsock.child.stderr_tail() if self._vsock else ""
        said["guest console"] = self._console.tail() if self._console else ""
        return {name: text for name, text in said.items() if text}

    # --- how it is done

    def _arguments(self, monitor_fd: int) -> list[str]:
        home_port = self._channel.home_port if self._channel is not None else 0
        return [
            *machine(self._section, self._sandbox_id, self._accelerator, home_port),
            *("-chardev", f"socket,id=mon,fd={monitor_fd}", "-mon", "chardev=mon,mode=control"),
            *(word for port in self._topology.ports for word in ("-device", root_port(port))),
            *(word for words in self._argv.values() for word in words),
        ]

    async def _start(self, timeout: float) -> None:
        assert self._ended is not None
        if self._vsock is not None:
            with await self._vsock.connect() as connection:
                self._argv["vsock"] = self._socket(connection.fileno(), "vsock", self._vsock_device)
                monitor = await self._spawn()
        else:
            monitor = await self._spawn()
        try:
            self._qmp = await QmpClient.connect(monitor, timeout=timeout, on_event=self._see)
            await self.get_thread_ids()  # the machine is made, and its vCPUs run
        except HypervisorError:
            await asyncio.wait({self._ended}, timeout=_GATHER)
            if self._ended.done():  # it ended, so it has said why
                raise self._gone(self._ended.result()) from None
            raise

    async def _spawn(self) -> socket.socket:
        """QEMU with all it inherits; our end of its monitor."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._monitor = ours
        with theirs:
            self._qemu = await Child.spawn(
                [self._section.path, *self._arguments(theirs.fileno())],
                name="qemu",
                undo=self._undo,
                confinement=self._confinement(),
                pass_fds=[theirs.fileno(), *self._fds],
            )
        if self._console is not None:
            self._console.handed_over()
        if self._share_fs is not None:
            self._share_fs.connection.close()  # QEMU has its copy, whose end virtiofsd shall notice
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self._sandbox_id}")
        if self._stopping:
            raise HypervisorError("the VM was stopped while it started", phase="boot")
        return ours

    def _confinement(self) -> Confinement:
        """What QEMU may: see the files that its arguments name, and the pod's network. Nothing else is said,
        so the rest is as strict as can be (`devices.confine`)."""
        files = (self._section.kernel, self._section.initrd, "/sys/devices/system")
        binds = (*(Bind(path=path) for path in files if path), *self._disks.values())
        nodes = (*(["/dev/kvm"] if self._accelerator == "kvm" else []), self._section.entropy_source)
        return Confinement(network=self._netns, view=View(binds=binds, nodes=nodes))

    async def _end(self) -> None:
        """Kill what runs, and see that the end is told."""
        if self._qemu is not None:
            await self._qemu.kill()
        if self._watcher is not None:
            await asyncio.wait({self._watcher})
            return
        await self._end_daemons()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(VmExit(-9, "QEMU was never started", expected=True))

    async def _watch(self) -> None:
        """Whoever of QEMU and its daemons dies first takes the others along; then it is told, once."""
        assert self._qemu is not None
        assert self._ended is not None
        exits: set[asyncio.Future[int]] = {child.exited for child in (self._qemu, *self._daemons())}
        await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
        if not self._stopping:
            await asyncio.wait({self._qemu.exited}, timeout=_GATHER)
        first = next((each for each in self._daemons() if not each.alive and self._qemu.alive), self._qemu)
        await self._qemu.kill()
        if self._console is not None:
            self._console.drain()
        await self._end_daemons()
        reason = "the VM was stopped" if self._stopping else self._reason(first)
        said = self.diagnostics()
        ended = VmExit(
            code=self._qemu.exited.result(),
            reason=reason,
            stderr_tail=said.get("vmm stderr", ""),
            console_tail=said.get("guest console", ""),
            expected=self._stopping,
        )
        if not self._ended.done():
            self._ended.set_result(ended)
        if self._channel is not None:
            self._channel.fail(lambda: self._gone(ended))

    def _reason(self, first: Child) -> str:
        """A guest's own end, or who died first."""
        if self._console is not None and (panic := self._console.panic()):
            return f"the guest kernel panicked: {panic}"
        return self._guests_end or f"{first.name} {first.describe()}"

    def _see(self, event: QmpEvent) -> None:
        data = event.get("data")
        if event["event"] == "SHUTDOWN" and isinstance(data, dict) and data.get("guest"):
            self._guests_end = f"the guest ended the VM ({str(data.get('reason'))[:50]})"

    async def _add_vsock(self, device: VsockConfig, at: str) -> list[str]:
        """The kernel's where there is one, else a daemon's, whose socket comes in `_start`."""
        if os.path.exists(VHOST_VSOCK):
            self._vhost_fd, cid = reserve_cid(VHOST_VSOCK)
            self._channel = KernelVsock(cid, home_call=device.home_call, diagnostics=self.diagnostics)
            self._fds.append(self._vhost_fd)
            return ["-device", f"vhost-vsock-pci,vhostfd={self._vhost_fd},guest-cid={cid},{at}"]
        self._vsock_device = f"vhost-user-vsock-pci,{at}"
        self._vsock = await VsockDaemon.start(device, self._state_dir, self._undo)
        self._channel = HybridVsock(
            self._vsock.path, home_call=device.home_call, diagnostics=self.diagnostics
        )
        return []

    def _socket(self, fd: int, name: str, device: str) -> list[str]:
        """A vhost-user device behind the connected socket `fd`."""
        self._fds.append(fd)
        chardev = f"char-{name}"
        return ["-chardev", f"socket,id={chardev},fd={fd}", "-device", f"{device},chardev={chardev}"]

    def _daemons(self) -> list[Child]:
        found = [self._vsock.child] if self._vsock else []
        return found + ([self._share_fs.child] if self._share_fs else [])

    async def _end_daemons(self) -> None:
        if self._vsock is not None:
            await self._vsock.stop()
        if self._share_fs is not None:
            await self._share_fs.stop()

    def _gone(self, ended: VmExit) -> HypervisorError:
        hint = "see QEMU's message; check the keys of [hypervisor.tiny]"
        what = f"the VM is gone: {ended.reason}"
        return HypervisorError(what, phase="boot", hint=hint, details=self.diagnostics())

    def _process(self) -> Child:
        if self._qemu is None or not self._qemu.alive:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return self._qemu

    def _control(self) -> QmpClient:
        if self._qmp is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return self._qmp

    def _cannot(self, what: str) -> NoReturn:
        raise UnsupportedByHypervisor("tiny", what)
