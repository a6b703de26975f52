"""One VM: a QEMU that gets everything by its arguments and inherited sockets.

Only what a sandbox needs: a disk, the agent's vsock, the shared directory, a console. Its monitor is
asked one question, when it starts. Nothing can be plugged, paused or resized: `capabilities` says so, and
these calls raise.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from typing import TYPE_CHECKING, Any, NoReturn

from devices.child import Child, process_start_time, process_stat, thread_ids
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
from devices.undo import UndoLog
from devices.vsock import AgentChannel, HybridVsock, KernelVsock, reserve_cid
from devices.vsock_daemon import VsockDaemon
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
from hypervisors.qemu.kvm import choose_accelerator

if TYPE_CHECKING:
    from kata_tinyvmm.plugin import TinyConfig

__all__ = ["DEVICES", "TinyVm"]

VHOST_VSOCK = "/dev/vhost-vsock"
_FIXED = "tiny takes everything before the start"
DEVICES = {
    kind: Support(cold=YES, hot=_FIXED, unplug=_FIXED, resize=_FIXED)
    for kind in (Kind.BLK, Kind.VSOCK, Kind.SHARE_FS, Kind.RNG, Kind.CONSOLE, Kind.VCPU)
}
_THREADS = re.compile(rb"CPU #(\d+): thread_id=(\d+)")
_MAX_ANSWER = 64 << 10  # bytes
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
        self._vsock: VsockDaemon | None = None
        self._vhost_fd = -1
        self._share_fs: Virtiofsd | None = None
        self._console: Console | None = None
        self._channel: HybridVsock | KernelVsock | None = None
        self._qemu: Child | None = None
        self._monitor: socket.socket | None = None
        self._threads: dict[int, int] = {}
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
        """Remember what it is as arguments, and start its daemon. Returns "": these have no fixed place."""
        op = Op.COLD if self._ended is None else Op.HOT
        (await self.capabilities()).require("tiny", device.kind, op)
        if device.id in self._argv:
            raise BugError(f"there is a device {device.id} already")
        argv: list[str] = []
        match device:
            case BlockConfig():
                node = {"driver": "raw", "node-name": f"node-{device.id}", "read-only": device.read_only}
                file = {"driver": "file", "filename": device.path, "read-only": device.read_only}
                argv = ["-blockdev", json.dumps({**node, "file": file})]
                argv += ["-device", f"virtio-blk-pci,id={device.id},drive=node-{device.id}"]
                self._disks[device.id] = Bind(path=device.path, writable=not device.read_only)
            case VsockConfig():
                argv = await self._add_vsock(device)
            case ShareFsConfig():
                self._share_fs = await Virtiofsd.start(device, self._state_dir, self._undo)
                fd = self._share_fs.connection.fileno()
                argv = self._socket(fd, device.id, f"vhost-user-fs-pci,tag={device.tag}")
            case RngConfig():
                source = {"qom-type": "rng-random", "id": "src", "filename": device.source}
                argv = ["-object", json.dumps(source), "-device", "virtio-rng-pci,rng=src"]
            case ConsoleConfig():
                self._console = Console()
                self._fds.append(self._console.guest_end)
                argv = ["-chardev", f"socket,id=console,fd={self._console.guest_end}"]
                argv += ["-serial", "chardev:console"]
            case _:
                raise BugError(f"{device.kind.value} is among the capabilities, but not here")
        self._argv[device.id] = argv
        return ""

    async def start_vm(self, timeout: float) -> None:
        """Start QEMU; it runs when its monitor tells its vCPUs' threads."""
        if not self._accelerator or self._ended is not None:
            raise BugError("start_vm needs prepare_vm before it, and once")
        loop = asyncio.get_running_loop()
        self._ended, self._starting = loop.create_future(), loop.create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._start()
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
        """Disks, and before the start only."""
        if self._ended is not None or "-blockdev" not in self._argv.get(device_id, ()):
            self._cannot(f"taking {device_id} away")
        del self._argv[device_id], self._disks[device_id]

    async def update_device(self, device: DeviceConfig) -> None:
        """Unsupported."""
        self._cannot(f"an update of {device.id}")

    # --- knowledge

    async def get_agent_socket(self) -> AgentChannel:
        """See the protocol."""
        if self._channel is None:
            raise BugError("this VM has no vsock device")
        return self._channel

    async def disconnect(self) -> None:
        """There is no control connection that anything needs."""

    async def hypervisor_config(self) -> TinyConfig:
        """See the protocol."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """As QEMU told them when it started."""
        self._process()
        return VcpuThreadIds(self._threads)

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
        """Without a control connection: does it live?"""
        self._process()

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
        """See the protocol."""
        pids = await self.get_pids()
        pages = sum(int(process_stat(pid)[21]) for pid in pids)
        return {"processes": float(len(pids)), "resident_bytes": float(pages * os.sysconf("SC_PAGE_SIZE"))}

    def diagnostics(self) -> dict[str, str]:
        """What everybody said last."""
        said = {"vmm stderr": self._qemu.stderr_tail() if self._qemu else ""}
        said["virtiofsd stderr"] = self._share_fs.stderr_tail() if self._share_fs else ""
        said["vsock stderr"] = self._vsock.child.stderr_tail() if self._vsock else ""
        said["guest console"] = self._console.tail() if self._console else ""
        return {name: text for name, text in said.items() if text}

    # --- how it is done

    def _arguments(self, monitor_fd: int) -> list[str]:
        section, channel = self._section, self._channel
        vcpus = max(1, -int(-section.default_vcpus // 1))  # a fraction is rounded up
        kernel = (
            "reboot=t panic=-1 no_timer_check swiotlb=noforce console=ttyS0 root=/dev/vda rootfstype=ext4 ro"
        )
        kernel += "" if section.enable_debug else " quiet"
        # The guest's agent calls this port of ours when it listens, so nobody has to poll it.
        kernel += f" agent.home_vport={channel.home_port}" if channel and channel.home_port else ""
        # Shared, because virtiofsd and the vsock daemon map the guest's memory.
        memory = f"memory-backend-memfd,id=mem,size={section.default_memory}M,share=on"
        argv = ["-name", f"tiny-{self._sandbox_id},debug-threads=on", "-nodefaults", "-no-user-config"]
        argv += [
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            f"q35,accel={self._accelerator},memory-backend=mem",
        ]
        argv += ["-cpu", section.cpu_model, "-smp", str(vcpus), "-m", f"{section.default_memory}M"]
        argv += ["-object", memory, "-kernel", section.kernel]
        argv += ["-initrd", section.initrd] if section.initrd else []
        argv += ["-append", f"{kernel} {section.kernel_params}".strip()]
        return [
            *argv,
            "-chardev",
            f"socket,id=mon,fd={monitor_fd}",
            "-mon",
            "chardev=mon",
            *(word for words in self._argv.values() for word in words),
        ]

    async def _start(self) -> None:
        assert self._ended is not None
        if self._vsock is not None:
            with await self._vsock.connect() as connection:
                self._argv["vsock"] = self._socket(connection.fileno(), "vsock", "vhost-user-vsock-pci")
                monitor = await self._spawn()
        else:
            monitor = await self._spawn()
        asking = asyncio.create_task(_ask_threads(monitor))
        waits: set[asyncio.Future[Any]] = {asking, self._ended}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.done() and not asking.result():  # it closed the monitor: about to die
                await asyncio.wait({self._ended})
        finally:
            asking.cancel()
            await asyncio.wait({asking})
        if self._ended.done():
            raise self._gone(self._ended.result())
        # QEMU is the first process of a pid namespace, and tells its numbers there.
        known = thread_ids(self._qemu.pid) if self._qemu is not None else {}
        self._threads = {vcpu: known[thread] for vcpu, thread in asking.result().items()}

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
        reason = "the VM was stopped" if self._stopping else f"{first.name} {first.describe()}"
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

    async def _add_vsock(self, device: VsockConfig) -> list[str]:
        """The kernel's where there is one, else a daemon's, whose socket comes in `_start`."""
        if os.path.exists(VHOST_VSOCK):
            self._vhost_fd, cid = reserve_cid(VHOST_VSOCK)
            self._channel = KernelVsock(cid, home_call=device.home_call, diagnostics=self.diagnostics)
            self._fds.append(self._vhost_fd)
            return ["-device", f"vhost-vsock-pci,vhostfd={self._vhost_fd},guest-cid={cid}"]
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

    def _cannot(self, what: str) -> NoReturn:
        raise UnsupportedByHypervisor("tiny", what)


async def _ask_threads(monitor: socket.socket) -> dict[int, int]:
    """vCPU -> thread, which QEMU answers when the machine is made; {} if it closes the monitor."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(monitor, b"info cpus\n")
    said = bytearray()
    while not (found := _THREADS.findall(said)) or not said.endswith(b"(qemu) "):
        try:
            data = await loop.sock_recv(monitor, 4096)
        except ConnectionError:
            return {}
        if not data or len(said) > _MAX_ANSWER:
            return {}
        said += data
    return {int(cpu): int(thread) for cpu, thread in found}
