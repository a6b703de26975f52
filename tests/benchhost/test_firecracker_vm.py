"""What Firecracker's driver promises beyond a container's life: pause, snapshots, disks, limits, a jail."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import ttrpc
from devices.config import BlockConfig, ConsoleConfig, DeviceConfig, NetworkConfig, RngConfig, VsockConfig
from devices.errors import HostError, HypervisorError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.plugin import plugin
from hypervisors.firecracker.vmm import Firecracker
from proto import agent_pb2
from tests.benchhost.conftest import PATIENCE
from tests.benchhost.firecrackers import section as keys

_MAC = "02:00:00:00:00:17"
_AGENT = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> FirecrackerConfig:
    wanted = keys(tmp_path_factory.mktemp("firecracker"), jailed=True)
    chosen = plugin.adjust_config(FirecrackerConfig(**wanted, enable_debug=True))  # type: ignore[arg-type]
    plugin.validate_config(chosen)
    return chosen


@pytest.fixture
def tap() -> Iterator[str]:
    """A network namespace with a tap that user 1234 may use; its path."""
    for command in (
        "ip netns add fcpod",
        "ip -n fcpod tuntap add tap0 mode tap user 1234",
        "ip -n fcpod link set tap0 up",
    ):
        subprocess.run(command.split(), check=True, timeout=30)
    yield "/run/netns/fcpod"
    subprocess.run(["ip", "netns", "del", "fcpod"], check=True, timeout=30)


@asynccontextmanager
async def _vm(
    section: FirecrackerConfig, name: str, *cards: NetworkConfig, netns: str | None = None
) -> AsyncIterator[Firecracker]:
    """A running VM; afterwards nothing of it is left."""
    state = Path("/run/kata-shim") / name
    state.mkdir(parents=True)
    undo = MemoryUndo()
    vm = plugin.create(section, sandbox_id=name, state_dir=str(state), undo=undo)
    try:
        await vm.prepare_vm(name, netns)
        disk = BlockConfig(id="image", path=section.image, read_only=True)
        devices: list[DeviceConfig] = [disk, VsockConfig(), RngConfig(), ConsoleConfig(), *cards]
        for device in devices:
            await vm.add_device(device)
        await vm.start_vm(60)
        await (await vm.get_agent_socket()).wait_ready(PATIENCE)
        yield vm
    finally:
        await vm.stop_vm()
        await vm.cleanup()
        await vm.cleanup()
        left = sorted(os.listdir(state))
        shutil.rmtree(state)
    assert left == []
    assert undo.entries == []
    assert not Path("/run/kata-shim/firecracker").exists()
    assert not Path("/sys/fs/cgroup/firecracker", name).exists()


async def _interfaces(vm: Firecracker) -> list[str]:
    """The hardware addresses that the guest's agent sees."""
    sock, _ = await (await vm.get_agent_socket()).connect(1024, 30)
    client = ttrpc.Client(sock)
    try:
        method = _AGENT.methods_by_name["ListInterfaces"]
        answer = await client.call(method, agent_pb2.ListInterfacesRequest(), timeout=60)
        return [one.hwAddr for one in answer.Interfaces]
    finally:
        await client.close()


@pytest.mark.benchhost
async def test_a_jailed_vm_in_a_namespace(section: FirecrackerConfig, tap: str, tmp_path: Path) -> None:
    limited = dataclasses.replace(section, disk_rate_limiter_bw_max_rate=16_000_000)
    card = NetworkConfig(id="net0", mac=_MAC, tap="tap0")
    async with _vm(limited, "t1", card, netns=tap) as vm:
        assert os.stat(await vm.get_ns_path()).st_ino == os.stat(tap).st_ino
        assert await vm.get_jailer_root() == "/run/kata-shim/firecracker/t1/root"
        assert list((await vm.get_thread_ids()).vcpus) == [0]

        assert _MAC in await _interfaces(vm)

        metrics = await vm.get_hypervisor_metrics()
        assert metrics["resident_bytes"] > 1 << 20
        api = vm._api()
        drive = (await api.get("/vm/config", timeout=30))["drives"][0]
        assert drive["rate_limiter"]["bandwidth"]["size"] == 2_000_000  # bytes: an eighth of the bits

        await vm.pause_vm()
        await vm.check()
        await vm.resume_vm()

        disk = tmp_path / "disk"
        disk.write_bytes(bytes(1 << 20))
        disk.chmod(0o666)
        assert await vm.add_device(BlockConfig(id="d1", path=str(disk))) == "/dev/vdf"
        os.truncate(disk, 2 << 20)
        await vm.update_device(BlockConfig(id="d1", path=str(disk)))
        await vm.remove_device("d1")
        for number in range(4):
            await vm.add_device(BlockConfig(id=f"r{number}", path=str(disk), read_only=True))
        with pytest.raises(HypervisorError, match="no free slot for the read-only disk"):
            await vm.add_device(BlockConfig(id="r4", path=str(disk), read_only=True))

        for refused in (
            vm.resize_vcpu(2),
            vm.resize_memory(512),
            vm.add_device(dataclasses.replace(card, id="net1")),
        ):
            with pytest.raises(UnsupportedByHypervisor):
                await refused


@pytest.mark.benchhost
async def test_a_snapshot_becomes_another_vm(section: FirecrackerConfig, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    os.chmod(tmp_path, 0o755)
    async with _vm(section, "t1") as vm:
        await vm.save_vm(str(saved))
        await vm.check()  # and goes on
    template = dataclasses.replace(
        section,
        boot_from_template=True,
        device_state_path=str(saved / "device_state"),
        memory_path=str(saved / "memory"),
    )
    plugin.validate_config(template)
    async with _vm(template, "t2") as vm:
        assert await _interfaces(vm)


@pytest.mark.benchhost
async def test_a_planted_link_is_refused(section: FirecrackerConfig) -> None:
    os.makedirs("/run/kata-shim/firecracker", 0o700)
    os.symlink("/etc", "/run/kata-shim/firecracker/t3")
    vm = plugin.create(section, sandbox_id="t3", state_dir="/run/kata-shim/t3", undo=MemoryUndo())
    try:
        with pytest.raises(HostError, match="/run/kata-shim/firecracker/t3 exists already"):
            await vm.prepare_vm("t3", None)
        await vm.cleanup()
    finally:
        os.unlink("/run/kata-shim/firecracker/t3")
        os.rmdir("/run/kata-shim/firecracker")


@pytest.mark.benchhost
async def test_its_death_is_told_with_its_last_words(section: FirecrackerConfig) -> None:
    broken = dataclasses.replace(section, kernel_params="init=/nope panic=-1")
    state = Path("/run/kata-shim/t4")
    state.mkdir(parents=True)
    undo = MemoryUndo()
    vm = plugin.create(broken, sandbox_id="t4", state_dir=str(state), undo=undo)
    try:
        await vm.prepare_vm("t4", None)
        for device in (
            BlockConfig(id="image", path=section.image, read_only=True),
            VsockConfig(),
            ConsoleConfig(),
        ):
            await vm.add_device(device)
        await vm.start_vm(60)
        with pytest.raises(HypervisorError, match="the VM is gone") as caught:
            await (await vm.get_agent_socket()).wait_ready(PATIENCE)
        assert "/nope" in caught.value.details["guest console"]
        async with asyncio.timeout(10):
            assert not (await vm.wait_vm()).expected
    finally:
        await vm.cleanup()
    assert undo.entries == []
    state.rmdir()
