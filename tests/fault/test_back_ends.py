"""What serves a device goes, hangs or says nothing: the VM ends with that reason, or lives without it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.back_ends import Passt, StorageDaemon
from devices.config import ShareFsConfig, VhostUserBlkConfig, VhostUserNetConfig
from devices.errors import HypervisorError
from devices.rendezvous import listen
from hypervisors.qemu.vmm import Qemu
from proto import agent_pb2 as agent
from tests.e2e.guests import make_spec
from tests.e2e.served import PROMPT, card, carrying, disk, interface, serving, with_disk
from tests.e2e.vms import Boot

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    yield from serving(tmp_path)


@pytest.fixture
def passt(tmp_path: Path) -> Iterator[Passt]:
    yield from carrying(tmp_path)


async def test_a_back_end_that_does_not_answer_is_given_up_and_the_vm_lives(
    boot: Boot, tmp_path: Path
) -> None:
    """QEMU waits for it with its main loop standing still, until we end the connection."""
    vm, guest, manager = await boot()
    free = vm._places.topology.free()
    path = str(tmp_path / "mute")
    mute = listen(path)
    for device in (
        VhostUserBlkConfig(id="mute", path=path),
        VhostUserNetConfig(id="mute", path=path, mac="02:00:00:00:00:07"),
    ):
        with pytest.raises(HypervisorError, match="QEMU did not answer"):
            await manager.try_add_device(device, vm)
        await vm.check()
        assert vm._places.topology.free() == free
    mute.close()
    assert (await guest.run("echo", "alive"))[1] == b"alive\n"


async def ended(vm: Qemu) -> str:
    async with asyncio.timeout(PROMPT):
        return (await vm.wait_vm()).reason


async def test_the_vm_ends_when_a_disks_back_end_dies(boot: Boot, daemon: StorageDaemon) -> None:
    """QEMU says nothing, and the guest's reads would never return."""
    vm, guest, manager = await boot()
    await manager.try_add_device(disk(daemon), vm)
    await guest.start(make_spec("sleep", "1000"))
    daemon.kill()
    assert await ended(vm) == f"the vhost-user back end at {daemon.path} closed its connection"
    assert await vm.get_pids() == []


async def test_a_card_whose_back_end_dies_loses_its_carrier_and_goes(boot: Boot, passt: Passt) -> None:
    vm, guest, _ = await boot()
    wanted = interface(await vm.add_device(card(passt)))
    await guest.agent.update_interface(agent.UpdateInterfaceRequest(interface=wanted))
    passt.kill()
    wait = "until [ $(cat /sys/class/net/eth7/carrier) = 0 ]; do sleep 0.05; done"
    assert (await guest.run("sh", "-c", wait))[0] == 0
    await vm.remove_device("net7")
    assert (await guest.run("echo", "alive"))[1] == b"alive\n"


@pytest.mark.parametrize("which", ["first", "second"])
async def test_the_vm_ends_when_a_virtiofsd_dies(boot: Boot, tmp_path: Path, which: str) -> None:
    vm, _, _ = await boot()
    before = set(await vm.get_pids())
    (tmp_path / "second").mkdir()
    await vm.add_device(ShareFsConfig(id="second", source=str(tmp_path / "second"), tag="two"))
    (second,) = set(await vm.get_pids()) - before
    victim = second
    if which == "first":
        named = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in before}
        (victim,) = (pid for pid, line in named.items() if re.search(r"\bvirtiofsd\b", line))
    os.kill(victim, signal.SIGKILL)
    assert await ended(vm) == "virtiofsd was killed by SIGKILL"


async def test_a_disk_is_unplugged_though_its_back_end_hangs(boot: Boot, daemon: StorageDaemon) -> None:
    """QEMU asks the back end for its queues before it lets the disk go, and would wait for ever."""
    vm, guest, manager = await boot(hotplug_timeout=3.0)
    name = await manager.try_add_device(disk(daemon), vm)
    device = await manager.generate_agent_device(name)
    assert (await with_disk(guest, device.id, "head", "-c", "4", "/dev/x"))[0] == 0
    os.kill(daemon.process.pid, signal.SIGSTOP)
    await manager.try_remove_device(name, vm)
    await vm.check()
    assert (await guest.run("echo", "alive"))[1] == b"alive\n"
