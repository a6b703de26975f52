"""One VM: a QEMU that gets everything by its arguments and inherited sockets.

Only what a sandbox needs: a disk, the agent's vsock, the shared directory, a console. No control
connection, so nothing can be plugged, paused or resized: `capabilities` says so, and these calls raise.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import TYPE_CHECKING, Any, NoReturn

from devices.child import Child, process_start_time
from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.console import Console
from devices.errors import HypervisorError, UnsupportedByHypervisor
from devices.share_fs import Virtiofsd
from devices.undo import UndoLog
from devices.vsock import AgentChannel, HybridVsock, KernelVsock, reserve_cid
from devices.vsock_daemon import VsockDaemon
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
from hypervisors.qemu.kvm import choose_accelerator

if TYPE_CHECKING:
    from kata_tinyvmm.plugin import TinyConfig

__all__ = ["TinyVm"]

VHOST_VSOCK = "/dev/vhost-vsock"
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
        self._argv: list[str] = []  # of the devices
        self._fds: list[int] = []  # that QEMU inherits
        self._ids: set[str] = set()
        self._vsock: VsockDaemon | None = None
        self._vhost_fd = -1
        self._share_fs: Virtiofsd | None = None
        self._console: Console | None = None
        self._channel: HybridVsock | KernelVsock | None = None
        self._qemu: Child | None = None
        self._monitor: socket.socket | None = None
        self._ended: asyncio.Future[VmExit] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """KVM where it is of use, else TCG."""
        if id != self._sandbox_id:
            raise HypervisorError(f"this VM was created for {self._sandbox_id}, not for {id}")
        self._netns = netns
        self._accelerator = choose_accelerator("auto").accelerator.value

    async def add_device(self, device: DeviceConfig) -> str:
        """Remember what it is as arguments, and start its daemon. Returns "": these have no fixed place."""
        if self._ended is not None:
            raise UnsupportedByHypervisor("tiny", "hot-plug of devices")
        if device.id in self._ids:
            raise HypervisorError(f"there is a device {device.id} already")
        match device:
            case BlockConfig():
                node = {"driver": "raw", "node-name": f"node-{device.id}", "read-only": device.read_only}
                file = {"driver": "file", "filename": device.path, "read-only": device.read_only}
                self._argv += ["-blockdev", json.dumps({**node, "file": file})]
                self._argv += ["-device", f"virtio-blk-pci,id={device.id},drive=node-{device.id}"]
            case VsockConfig():
                await self._add_vsock(device)
            case ShareFsConfig():
                self._share_fs = await Virtiofsd.start(device, self._state_dir, self._undo)
                fd = self._share_fs.connection.fileno()
                self._socket(fd, device.id, f"vhost-user-fs-pci,tag={device.tag}")
            case RngConfig():
                source = {"qom-type": "rng-random", "id": "src", "filename": device.source}
                self._argv += ["-object", json.dumps(source), "-device", "virtio-rng-pci,rng=src"]
            case ConsoleConfig():
                self._console = Console()
                self._fds.append(self._console.guest_end)
                self._argv += ["-chardev", f"socket,id=console,fd={self._console.guest_end}"]
                self._argv += ["-serial", "chardev:console"]
            case _:
                raise UnsupportedByHypervisor("tiny", f"a {type(device).__name__}")
        self._ids.add(device.id)
        return ""

    async def start_vm(self, timeout: float) -> None:
        """Start QEMU; it has begun when its monitor greets."""
        if not self._accelerator or self._ended is not None:
            raise HypervisorError("start_vm needs prepare_vm before it, and once", code="FAILED_PRECONDITION")
        self._ended = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._start()
        except BaseException as error:
            await self.stop_vm()
            if isinstance(error, TimeoutError):
                raise HypervisorError(
                    f"QEMU did not start within {timeout:g} s", phase="boot", details=self.diagnostics()
                ) from None
            raise

    async def stop_vm(self) -> None:
        """SIGKILL. The watcher does the rest. Idempotent."""
        self._stopping = True
        if self._qemu is not None:
            await self._qemu.kill()
        if self._watcher is not None:
            await asyncio.wait({self._watcher})
        else:
            await self._end_daemons()
            if self._ended is not None and not self._ended.done():
                self._ended.set_result(VmExit(-9, "QEMU was never started", expected=True))

    async def wait_vm(self) -> VmExit:
        """See the protocol."""
        if self._ended is None:
            raise HypervisorError("the VM was not started", code="FAILED_PRECONDITION")
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
        """Unsupported."""
        self._cannot(f"hot-unplug of {device_id}")

    async def update_device(self, device: DeviceConfig) -> None:
        """Unsupported."""
        self._cannot(f"an update of {device.id}")

    # --- knowledge

    async def get_agent_socket(self) -> AgentChannel:
        """See the protocol."""
        if self._channel is None:
            raise HypervisorError("this VM has no vsock device", code="FAILED_PRECONDITION")
        return self._channel

    async def disconnect(self) -> None:
        """There is no control connection that anything needs."""

    async def hypervisor_config(self) -> TinyConfig:
        """See the protocol."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """QEMU's threads have names because of debug-threads=on."""
        return VcpuThreadIds(_vcpu_threads(self._process().pid))

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
        if self._ended is None or self._ended.done() or not self._process().alive:
            raise HypervisorError("the VM does not run")

    async def get_jailer_root(self) -> str:
        """QEMU sees the host's root."""
        return ""

    async def save_state(self) -> HypervisorState:
        """See the protocol."""
        pid = self._process().pid
        return HypervisorState(
            hypervisor="tiny", sandbox_id=self._sandbox_id, pid=pid, start=process_start_time(pid)
        )

    async def capabilities(self) -> Capabilities:
        """See the protocol."""
        return Capabilities(
            block_device=True,
            fs_sharing=self._section.shared_fs != "none",
            hybrid_vsock=not os.path.exists(VHOST_VSOCK),
        )

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """See the protocol."""
        return {"processes": float(len(await self.get_pids()))}

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
        kernel = "reboot=t panic=-1 swiotlb=noforce console=ttyS0 root=/dev/vda rootfstype=ext4 ro"
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
        return [*argv, "-chardev", f"socket,id=mon,fd={monitor_fd}", "-mon", "chardev=mon", *self._argv]

    async def _start(self) -> None:
        assert self._ended is not None
        if self._vsock is not None:
            with await self._vsock.connect() as connection:
                self._socket(connection.fileno(), "vsock", "vhost-user-vsock-pci")
                greeting = await self._spawn()
        else:
            greeting = await self._spawn()
        waits: set[asyncio.Future[Any]] = {greeting, self._ended}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.done() and not greeting.result():  # closed: it is about to die
                await asyncio.wait({self._ended})
        finally:
            greeting.cancel()
            await asyncio.wait({greeting})
        if self._ended.done():
            raise self._gone(self._ended.result())

    async def _spawn(self) -> asyncio.Task[bytes]:
        """QEMU with all it inherits; the first byte of its monitor."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._monitor = ours
        with theirs:
            self._qemu = await Child.spawn(
                [self._section.path, *self._arguments(theirs.fileno())],
                name="qemu",
                undo=self._undo,
                netns=self._netns,
                pass_fds=[theirs.fileno(), *self._fds],
            )
        if self._console is not None:
            self._console.handed_over()
        if self._share_fs is not None:
            self._share_fs.connection.close()  # QEMU has its copy, whose end virtiofsd shall notice
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self._sandbox_id}")
        return asyncio.create_task(asyncio.get_running_loop().sock_recv(ours, 1))

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
        self._ended.set_result(ended)
        if self._channel is not None:
            self._channel.fail(lambda: self._gone(ended))

    async def _add_vsock(self, device: VsockConfig) -> None:
        if os.path.exists(VHOST_VSOCK):
            self._vhost_fd, cid = reserve_cid(VHOST_VSOCK)
            self._channel = KernelVsock(cid, home_call=device.home_call, diagnostics=self.diagnostics)
            self._fds.append(self._vhost_fd)
            self._argv += ["-device", f"vhost-vsock-pci,vhostfd={self._vhost_fd},guest-cid={cid}"]
            return
        self._vsock = await VsockDaemon.start(device, self._state_dir, self._undo)
        self._channel = HybridVsock(
            self._vsock.path, home_call=device.home_call, diagnostics=self.diagnostics
        )

    def _socket(self, fd: int, name: str, device: str) -> None:
        """A vhost-user device behind the connected socket `fd`."""
        self._fds.append(fd)
        self._argv += [
            "-chardev",
            f"socket,id=char-{name},fd={fd}",
            "-device",
            f"{device},chardev=char-{name}",
        ]

    def _daemons(self) -> list[Child]:
        found = [self._vsock.child] if self._vsock else []
        return found + ([self._share_fs.child] if self._share_fs else [])

    async def _end_daemons(self) -> None:
        if self._vsock is not None:
            await self._vsock.stop()
        if self._share_fs is not None:
            await self._share_fs.stop()

    def _gone(self, ended: VmExit) -> HypervisorError:
        return HypervisorError(f"the VM is gone: {ended.reason}", phase="boot", details=self.diagnostics())

    def _process(self) -> Child:
        if self._qemu is None:
            raise HypervisorError("the VM was not started", code="FAILED_PRECONDITION")
        return self._qemu

    def _cannot(self, what: str) -> NoReturn:
        raise UnsupportedByHypervisor("tiny", what)


def _vcpu_threads(pid: int) -> dict[int, int]:
    """vCPU -> thread, from the names "CPU 0/TCG"."""
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{tid}/comm", encoding="ascii", errors="replace") as comm:
            name = comm.read()
        if name.startswith("CPU "):
            found[int(name[4:].partition("/")[0])] = int(tid)
    return found
