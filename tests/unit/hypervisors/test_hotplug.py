"""A disk comes and goes whole: whatever fails on the way, neither a half nor a leak is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from devices.addresses import PciTopology
from devices.config import BlockConfig, BlockFormat, DeviceConfig, NetworkConfig
from devices.errors import BugError, CallerError, HypervisorError, UnsupportedByHypervisor
from hypervisors.qemu.hotplug import Plugger
from hypervisors.qemu.recipes import Placed
from tests.unit.hypervisors.machine import Machine

DISK = BlockConfig(id="disk", path="/nope/disk.img", serial="abc")
OTHER = BlockConfig(id="other", path="/nope/other.img", read_only=True, format=BlockFormat.QCOW2)


class Vm:
    """A machine with a port and a bridge, and what plugs into it."""

    def __init__(self, machine: Machine, plugger: Plugger, topology: PciTopology) -> None:
        self.machine = machine
        self.plugger = plugger
        self.topology = topology
        self.room = topology.free()

    async def add(self, device: DeviceConfig, *, host_device: bool = False) -> str:
        return await self.plugger.add(Placed(device=device, host_device=host_device))

    def nothing_left(self) -> bool:
        machine = self.machine
        left = (machine.devices, machine.nodes, machine.netdevs, machine.descriptors)
        return not any(left) and self.topology.free() == self.room


@pytest.fixture
async def vm() -> AsyncIterator[Vm]:
    machine, topology = Machine(), PciTopology()
    topology.allocate("image")
    topology.add_root_ports(1)
    topology.add_bridges(1)
    client = await machine.connect()
    yield Vm(machine, Plugger(client, topology, 0.1), topology)
    await client.close()
    await machine.close()


async def test_a_disk_comes_and_goes(vm: Vm) -> None:
    assert await vm.add(DISK) == "02/00"
    assert await vm.add(OTHER) == "03/01"
    assert "disk" in vm.plugger
    with pytest.raises(BugError, match="there is a device disk already"):
        await vm.add(DISK)
    front = vm.machine.devices["disk"]
    assert (front["bus"], front["addr"], front["serial"]) == ("rp0", "0x0", "abc")
    assert vm.machine.nodes["node-disk"]["file"] == {
        "driver": "file",
        "filename": "/nope/disk.img",
        "read-only": False,
        "discard": "unmap",
    }
    node = vm.machine.nodes["node-other"]
    assert (node["driver"], node["backing"], node["read-only"]) == ("qcow2", None, True)

    await vm.plugger.remove("disk")
    assert await vm.add(DISK) == "02/00"
    await vm.plugger.remove("disk")
    await vm.plugger.remove("other")
    assert vm.nothing_left()
    with pytest.raises(CallerError) as caught:
        await vm.plugger.remove("disk")
    assert caught.value.code == "NOT_FOUND"


async def test_a_block_device_of_the_host_is_opened_as_one(vm: Vm) -> None:
    await vm.add(DISK, host_device=True)
    assert vm.machine.nodes["node-disk"]["file"]["driver"] == "host_device"


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
async def test_what_qemu_refuses_leaves_nothing(vm: Vm, command: str) -> None:
    vm.machine.refuse.add(command)
    with pytest.raises(HypervisorError, match=f"QEMU refused {command}"):
        await vm.add(DISK)
    assert vm.nothing_left()
    assert "disk" not in vm.plugger

    vm.machine.refuse.clear()
    assert await vm.add(DISK) == "02/00"


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
async def test_a_plug_that_is_given_up_leaves_nothing(vm: Vm, command: str) -> None:
    """Its answer is dropped, but QEMU has done it."""
    adding = asyncio.create_task(vm.add(DISK))
    await vm.machine.saw(command)
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)
    if not adding.cancelled():  # it was quicker
        await vm.plugger.remove("disk")

    assert vm.nothing_left()


async def test_a_guest_that_does_not_let_go_keeps_it_until_it_does(vm: Vm) -> None:
    await vm.add(DISK)
    vm.machine.lazy = True
    for _ in range(2):
        with pytest.raises(HypervisorError, match=r"did not let go of disk within 0.1 s") as caught:
            await vm.plugger.remove("disk")
        assert caught.value.code == "DEADLINE_EXCEEDED"
    assert not vm.nothing_left()
    assert "node-disk" in vm.machine.nodes

    vm.machine.unplugged("disk")  # while nobody waits
    await vm.plugger.remove("disk")
    assert vm.nothing_left()


async def test_a_removal_goes_on_where_it_ended(vm: Vm) -> None:
    await vm.add(DISK)
    vm.machine.refuse.add("blockdev-del")
    with pytest.raises(HypervisorError, match="QEMU refused blockdev-del"):
        await vm.plugger.remove("disk")
    assert vm.machine.devices == {}
    vm.machine.refuse.clear()

    # Whoever plugs the same id next is not in its way.
    assert await vm.add(DISK) == "02/00"
    await vm.plugger.remove("disk")
    assert vm.nothing_left()


async def test_a_device_that_is_freed_late_is_waited_for(vm: Vm) -> None:
    """QEMU lets go of the node a moment after it told that the device is gone."""
    await vm.add(DISK)
    vm.machine.late = 3
    await vm.plugger.remove("disk")
    assert vm.nothing_left()

    await vm.add(DISK)
    vm.machine.late = 1000
    with pytest.raises(HypervisorError, match="Node node-disk is in use"):
        await vm.plugger.remove("disk")
    vm.machine.late = 0
    await vm.plugger.remove("disk")
    assert vm.nothing_left()


async def test_when_all_is_full_the_last_one_is_told(vm: Vm) -> None:
    for number in range(vm.room):
        await vm.add(BlockConfig(id=f"d{number}", path="/nope"))
    with pytest.raises(HypervisorError, match="no free PCI slot to plug disk into") as caught:
        await vm.add(DISK)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert "disk" not in vm.plugger


async def test_a_card_takes_its_queues_along(vm: Vm) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    card = NetworkConfig(id="net0", mac="02:00:00:00:00:01", tap_fds=tuple(fds[:2]), vhost_fds=tuple(fds[2:]))
    try:
        await vm.add(card)
        netdev, front = vm.machine.netdevs["net-net0"], vm.machine.devices["net0"]
        assert netdev["fds"] == "fds-net-net0-0:fds-net-net0-1"
        assert (netdev["vhostfds"], netdev["vhost"]) == ("vhostfds-net-net0-0:vhostfds-net-net0-1", True)
        assert (front["mac"], front["mq"], front["vectors"]) == ("02:00:00:00:00:01", True, 6)
        await vm.plugger.remove("net0")
        assert vm.nothing_left()

        vm.machine.refuse.add("netdev_add")
        with pytest.raises(HypervisorError):
            await vm.add(card)
        assert vm.nothing_left()
    finally:
        for fd in fds:
            os.close(fd)
    with pytest.raises(UnsupportedByHypervisor, match="without a tap"):
        await vm.add(NetworkConfig(id="net1", mac="02:00:00:00:00:02"))
    assert vm.nothing_left()


async def test_a_vm_that_dies_ends_the_wait(vm: Vm) -> None:
    await vm.add(DISK)
    vm.machine.lazy = True
    removing = asyncio.create_task(vm.plugger.remove("disk"))
    await vm.machine.saw("device_del")
    await vm.machine.close()
    with pytest.raises(HypervisorError, match="closed its control socket"):
        await removing
