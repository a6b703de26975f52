"""VMs under QEMU without a containerd: what tests of devices and sizes plug into.

What: `booting` gives a function that boots a VM of 256 MB and one vCPU with its agent; the fixture `boot` of
these tests is it. `make_disk`, `read_disk` and `mounted`: a disk with a file system, as seen by both sides.
Invariants: nothing is left of any of its VMs, in the undo log, on disk, or as processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from devices.config import (
    BlockConfig,
    BlockFormat,
    ConsoleConfig,
    DeviceConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.manager import AgentDevice, DeviceManager
from devices.undo import MemoryUndo
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.vmm import Qemu
from proto import agent_pb2 as agent
from testing.guest import PROJECT, guest_files
from tests.e2e.guests import STREAM_PORT, Guest, fill_share, sandbox_request
from ttrpc import Client

__all__ = ["BOOT", "Boot", "Calls", "booting", "make_disk", "mounted", "read_disk"]

# Seconds; a boot takes about three when the machine is idle, and ten in the bench host.
BOOT = 240.0 if os.environ.get("KATA_BENCH_HOST") else 60.0
E2FS = {**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"}

Boot = Callable[..., Awaitable[tuple[Qemu, Guest, DeviceManager]]]


class Calls:
    """The VM's ports, for `Guest`."""

    def __init__(self, vm: Qemu) -> None:
        self._vm = vm

    async def connect(self, port: int) -> tuple[socket.socket, int]:
        return await (await self._vm.get_agent_socket()).connect(port, 20)


@contextlib.asynccontextmanager
async def booting(tmp_path: Path) -> AsyncIterator[Boot]:
    """A VM of 256 MB and one vCPU with its agent; keywords change the section, `also` are further devices to
    start with, `modules` the guest's kernel's. Nothing is left of it."""
    state, share = tmp_path / "state", tmp_path / "share"
    for path in (state, share):
        path.mkdir(mode=0o700)
    fill_share(share)
    vsock = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
    files = {key: str(path) for key, path in guest_files().items()}
    base = HypervisorConfig(
        **files,  # type: ignore[arg-type]
        default_memory=256,
        hotplug_timeout=BOOT,
        vsock_daemon=str(vsock) if vsock.exists() else "",
        kernel_params=f"agent.stream_port={STREAM_PORT}",
    )
    undo = MemoryUndo()
    vms: list[Qemu] = []
    clients: list[Client] = []
    guests: list[Guest] = []

    async def _boot(
        also: Sequence[DeviceConfig] = (), modules: Sequence[str] = (), **changes: object
    ) -> tuple[Qemu, Guest, DeviceManager]:
        section = plugin.adjust_config(dataclasses.replace(base, **changes))  # type: ignore[arg-type]
        vm = plugin.create(section, sandbox_id="e2e", state_dir=str(state), undo=undo)
        vms.append(vm)
        await vm.prepare_vm("e2e", None)
        devices: list[DeviceConfig] = [
            BlockConfig(id="image", path=section.image, read_only=True),
            VsockConfig(daemon=section.vsock_daemon),
            ShareFsConfig(source=str(share)),
            RngConfig(),
            ConsoleConfig(),
            *also,
        ]
        manager = DeviceManager()
        for device in devices:
            await manager.try_add_device(device, vm)
        await vm.start_vm(BOOT)
        await (await vm.get_agent_socket()).wait_ready(BOOT)
        sock, _ = await Calls(vm).connect(1024)
        clients.append(Client(sock))
        guests.append(Guest(Calls(vm), clients[-1]))
        request = sandbox_request()
        for module in modules:
            request.kernel_modules.add(name=module)
        await guests[-1].agent.create_sandbox(request)
        return vm, guests[-1], manager

    yield _boot
    for guest in guests:
        guest.close()
    for client in clients:
        await client.close()
    for vm in vms:
        await vm.cleanup()
    assert undo.entries == []
    assert os.listdir(state) == []


def make_disk(path: Path, *, qcow2: bool = False) -> BlockConfig:
    """8 MB of ext4 with one file."""
    content = path.parent / f"{path.name}.d"
    content.mkdir()
    (content / "hello").write_text(f"from {path.name}\n")
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", content, path, "8M"], check=True, env=E2FS, capture_output=True
    )
    if not qcow2:
        return BlockConfig(id=path.name, path=str(path))
    converted = path.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, converted], check=True)
    return BlockConfig(id=path.name, path=str(converted), format=BlockFormat.QCOW2, read_only=True)


def read_disk(path: Path, name: str) -> bytes:
    """A file of an ext4 image, read without the guest."""
    done = subprocess.run(["debugfs", "-R", f"cat {name}", path], check=True, env=E2FS, capture_output=True)
    return done.stdout


def mounted(device: AgentDevice, name: str, *, read_only: bool) -> agent.Storage:
    return agent.Storage(
        driver="blk",
        source=device.id,
        fstype="ext4",
        options=["ro"] if read_only else [],
        mount_point=f"/run/kata-containers/sandbox/storage/{name}",
    )
