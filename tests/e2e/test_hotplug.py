"""A running VM grows, takes disks and gives them back, and its guest uses all of it."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from devices.config import BlockConfig, ConsoleConfig, DeviceConfig, RngConfig, ShareFsConfig, VsockConfig
from devices.errors import HypervisorError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.vmm import Qemu
from proto import agent_pb2 as agent
from testing.guest import PROJECT, guest_files
from tests.e2e.guests import STREAM_PORT, Guest, fill_share, make_spec, read_some, sandbox_request
from ttrpc import Client

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]

BOOT = 60.0  # seconds; about three when the machine is idle
FILE = 4 << 20  # bytes of the file that is read while memory comes

Boot = Callable[..., Awaitable[tuple[Qemu, Guest]]]


class Calls:
    """The VM's ports, for `Guest`."""

    def __init__(self, vm: Qemu) -> None:
        self._vm = vm

    async def connect(self, port: int) -> tuple[socket.socket, int]:
        return await (await self._vm.get_agent_socket()).connect(port, 20)


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    """A VM of 256 MB and one vCPU with its agent; keywords change the section. Nothing is left of it."""
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

    async def _boot(**changes: object) -> tuple[Qemu, Guest]:
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
        ]
        for device in devices:
            await vm.add_device(device)
        await vm.start_vm(BOOT)
        await (await vm.get_agent_socket()).wait_ready(BOOT)
        sock, _ = await Calls(vm).connect(1024)
        clients.append(Client(sock))
        guests.append(Guest(Calls(vm), clients[-1]))
        await guests[-1].agent.create_sandbox(sandbox_request())
        return vm, guests[-1]

    yield _boot
    for guest in guests:
        guest.close()
    for client in clients:
        await client.close()
    for vm in vms:
        await vm.cleanup()
    assert undo.entries == []
    assert os.listdir(state) == []


async def memory_total(guest: Guest) -> int:
    """MiB that the guest's kernel has."""
    code, out, _ = await guest.run("grep", "MemTotal", "/proc/meminfo")
    assert code == 0
    return int(out.split()[1]) >> 10


async def cpus(guest: Guest) -> int:
    code, out, _ = await guest.run("grep", "-c", "^processor", "/proc/cpuinfo")
    assert code == 0
    return int(out)


async def online(guest: Guest, vcpus: int) -> None:
    await guest.agent.online_cpu_mem(agent.OnlineCPUMemRequest(wait=True, nb_cpus=vcpus))


async def test_vcpus_and_memory_grow_while_files_are_read(boot: Boot, tmp_path: Path) -> None:
    """The daemons map the new memory: the guest reads its shared file into it."""
    vm, guest = await boot(default_maxvcpus=2, default_maxmemory=4096)
    able = await vm.capabilities()
    assert able.vcpu_hotplug
    assert able.memory_hotplug
    assert not able.memory_hot_unplug
    (tmp_path / "share/passthrough/busybox/rootfs/data/big").write_bytes(os.urandom(FILE))
    before = await memory_total(guest)
    reader = await guest.start(
        make_spec("sh", "-c", "trap 'exit 7' TERM; echo on; while :; do cat /data/big >/dev/null; done")
    )

    assert reader.stdout is not None
    assert await read_some(reader.stdout) == b"on\n"
    assert await vm.resize_vcpu(2) == 2
    for size in (512, 1024, 1152):
        assert await vm.resize_memory(size) == size
        await online(guest, 2)
    await guest.signal(reader, 15)
    assert await reader.wait() == 7
    reader.close()
    assert await cpus(guest) == 2
    assert abs(await memory_total(guest) - before - 896) < 20
    # More than it had: the pages of /tmp and of the file's cache lie in what came.
    fill = "dd if=/dev/zero of=/tmp/x bs=1M count=300 2>/dev/null; stat -c %s /tmp/x; cat /data/big | wc -c"
    spec = make_spec("sh", "-c", fill)
    spec.Mounts.add(destination="/tmp", type="tmpfs", source="tmpfs", options=["size=900m"])
    code, out, _ = await guest.run(spec=spec)
    assert (code, out.split()) == (0, [b"%d" % (300 << 20), b"%d" % FILE])
    with pytest.raises(HypervisorError, match="this VM can have 4096"):
        await vm.resize_memory(8192)
    with pytest.raises(HypervisorError, match="this VM can have 2"):
        await vm.resize_vcpu(3)
    with pytest.raises(UnsupportedByHypervisor):
        await vm.resize_memory(512)
