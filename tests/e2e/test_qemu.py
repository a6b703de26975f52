"""A real VM boots to its agent's home call, tells why when it does not, dies as one, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devices.config import (
    BalloonConfig,
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.errors import GuestError, HostError, HypervisorError
from devices.undo import MemoryUndo
from devices.vsock import AGENT_PORT
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.vmm import Qemu
from testing.guest import guest_files

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]

BOOT = 60.0  # seconds; about three when the machine is idle


class Bench:
    """A VM with its directories and undo log, and the counts from before."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.share = directory / "share"
        for path in (self.state, self.share):
            path.mkdir(mode=0o700)
        self.undo = MemoryUndo()
        files = guest_files()
        self.section = plugin.adjust_config(
            HypervisorConfig(
                kernel=str(files["kernel"]),
                initrd=str(files["initrd"]),
                image=str(files["image"]),
                default_memory=256,
                vsock_daemon=_vsock_daemon(),
            )
        )
        self.vm: Qemu | None = None

    async def prepare(self, *, netns: str | None = None, **changes: object) -> Qemu:
        section = dataclasses.replace(self.section, **changes)  # type: ignore[arg-type]
        vm = plugin.create(section, sandbox_id="e2e", state_dir=str(self.state), undo=self.undo)
        self.vm = vm
        await vm.prepare_vm("e2e", netns)
        devices: list[DeviceConfig] = [
            BlockConfig(id="image", path=section.image, read_only=True),
            VsockConfig(daemon=section.vsock_daemon),
            ShareFsConfig(source=str(self.share)),
            RngConfig(),
            BalloonConfig(),
            ConsoleConfig(),
        ]
        paths = [await vm.add_device(device) for device in devices]
        pci = section.machine_type != "microvm"
        assert paths == (["01", "02", "03", "04", "05", ""] if pci else ["/dev/vda", *[""] * 5])
        return vm

    async def boot(self, **changes: object) -> Qemu:
        vm = await self.prepare(**changes)  # type: ignore[arg-type]
        await vm.start_vm(BOOT)
        await (await vm.get_agent_socket()).wait_ready(BOOT)
        return vm


def _vsock_daemon() -> str:
    local = Path(__file__).parents[2] / "build/vsock/usr/bin/vhost-device-vsock"
    return str(local) if local.exists() else ""


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await asyncio.to_thread(int)  # the loop's own thread and descriptors exist from here on
    before = sorted(os.listdir("/proc/self/fd"))
    pids: list[int] = []
    yield made
    if made.vm is not None:
        pids = await made.vm.get_pids()
        await made.vm.cleanup()
        await made.vm.cleanup()

    assert made.undo.entries == []
    assert os.listdir(made.state) == []
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("machine", ["q35", "microvm"])
async def test_boot_to_the_home_call_and_stop(bench: Bench, machine: str) -> None:
    vm = await bench.boot(machine_type=machine)
    await vm.check()
    assert len((await vm.get_thread_ids()).vcpus) == 1
    assert len(await vm.get_pids()) == 3
    assert (await vm.save_state()).pid == await vm.get_vmm_master_tid()
    assert (await vm.get_hypervisor_metrics())["resident_bytes"] > 50 << 20
    sock, _ = await (await vm.get_agent_socket()).connect(AGENT_PORT, 10)
    sock.close()

    await vm.pause_vm()
    await vm.resume_vm()
    begin = time.monotonic()
    await vm.stop_vm()

    assert time.monotonic() - begin < 1.5
    ended = await vm.wait_vm()
    assert ended.expected
    assert await vm.get_pids() == []


async def test_the_vm_lives_in_the_pods_network_namespace(bench: Bench) -> None:
    holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        await asyncio.to_thread(holder.stdout.readline)
        expected = os.readlink(f"/proc/{holder.pid}/ns/net")
        vm = await bench.prepare(netns=f"/proc/{holder.pid}/ns/net")
        await vm.start_vm(BOOT)

        assert os.readlink(await vm.get_ns_path()) == expected
        assert os.readlink("/proc/self/ns/net") != expected
        await vm.stop_vm()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


async def test_a_guest_without_a_root_file_system_panics_in_words(bench: Bench) -> None:
    vm = await bench.prepare(kernel_params="rdinit=/no/such/init root=/dev/nothing")
    await vm.start_vm(BOOT)
    with pytest.raises(HypervisorError, match="kernel panicked") as caught:
        await (await vm.get_agent_socket()).wait_ready(BOOT)

    assert caught.value.phase == "boot"
    assert caught.value.hint
    assert "Kernel panic" in caught.value.details["guest console"]
    assert not (await vm.wait_vm()).expected


async def test_a_file_that_is_no_kernel(bench: Bench) -> None:
    bogus = bench.share / "kernel"
    bogus.write_bytes(b"nonsense" * 1000)
    vm = await bench.prepare(kernel=str(bogus))
    with pytest.raises(HypervisorError, match="qemu exited with code 1") as caught:
        await vm.start_vm(BOOT)

    assert caught.value.details["vmm stderr"]
    assert caught.value.hint


async def test_an_agent_that_never_answers_meets_the_deadline(bench: Bench) -> None:
    vm = await bench.prepare()
    await vm.start_vm(BOOT)
    await vm.pause_vm()  # a guest that does nothing, for sure
    begin = time.monotonic()
    with pytest.raises(GuestError, match="did not answer within 1 s"):
        await (await vm.get_agent_socket()).wait_ready(1)

    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("victim", ["qemu", "virtiofsd", "vhost-device-vsock"])
async def test_the_death_of_any_process_is_the_vms_death(bench: Bench, victim: str) -> None:
    vm = await bench.prepare()
    await vm.start_vm(BOOT)
    pids = await vm.get_pids()
    names = dict(zip(("qemu", "vhost-device-vsock", "virtiofsd"), pids, strict=True))
    waiting = asyncio.create_task((await vm.get_agent_socket()).wait_ready(BOOT))
    await asyncio.sleep(0)
    os.kill(names[victim], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(HypervisorError, match=f"{victim} was killed by SIGKILL"):
        await waiting

    assert time.monotonic() - begin < 2
    assert (await vm.wait_vm()).reason == f"{victim} was killed by SIGKILL"
    assert await vm.get_pids() == []


async def test_missing_programs_are_host_errors(bench: Bench) -> None:
    vm = plugin.create(bench.section, sandbox_id="e2e", state_dir=str(bench.state), undo=bench.undo)
    bench.vm = vm
    await vm.prepare_vm("e2e", None)
    with pytest.raises(HostError, match="virtiofsd is not there") as caught:
        await vm.add_device(ShareFsConfig(source=str(bench.share), daemon="/nope/virtiofsd"))
    assert caught.value.hint
    if not os.path.exists("/dev/vhost-vsock"):
        with pytest.raises(HostError, match="vhost-device-vsock is not executable at /nope"):
            await vm.add_device(VsockConfig(daemon="/nope"))
        await vm.add_device(VsockConfig(id="vsock2", daemon="/bin/false"))
        with pytest.raises(HostError, match="exited with code 1 before it was ready"):
            await vm.start_vm(BOOT)


async def test_a_cancelled_start_leaves_nothing(bench: Bench) -> None:
    vm = await bench.prepare()
    starting = asyncio.create_task(vm.start_vm(BOOT))
    await asyncio.sleep(0.03)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting

    await vm.stop_vm()
    assert await vm.get_pids() == []
