"""PCI devices of the host in a VM: an NVMe disk, a network card and one without a driver, and back again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from devices.config import VfioConfig
from devices.errors import CallerError
from devices.pci_driver import give_to_vfio, restore
from devices.undo import Entry, MemoryUndo
from devices.vfio import find_group, read_function
from proto import agent_pb2 as agent
from proto import types_pb2 as types
from tests.benchhost.conftest import KERNEL_PARAMS, PATIENCE
from tests.benchhost.machine import SPARE_DISK
from tests.e2e.guests import STREAM_PORT, Guest, make_spec
from tests.e2e.vms import Boot, booting

pytestmark = pytest.mark.benchhost

PARAMS = f"agent.stream_port={STREAM_PORT} {KERNEL_PARAMS}"
DISK, CARD, EDU = (0x1B36, 0x0010), (0x1AF4, 0x1041), (0x1234, 0x11E8)
Take = Callable[[tuple[int, int]], Awaitable[tuple[str, Entry]]]


def find(ids: tuple[int, int]) -> str:
    """The address of the spare device of this kind."""
    names = sorted(os.listdir("/sys/bus/pci/devices"))
    (found,) = [n for n in names if (read_function(n).vendor, read_function(n).device) == ids]
    return found


def driver(address: str) -> str:
    return read_function(address).driver


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    async with booting(tmp_path) as boots:
        yield boots


@pytest.fixture
def take() -> Iterator[Take]:
    """Give a device to vfio-pci; at the end each has its old driver."""
    subprocess.run(["modprobe", "virtio_net"], check=True, timeout=60)
    undo = MemoryUndo()
    before: dict[str, str] = {}

    async def _take(ids: tuple[int, int]) -> tuple[str, Entry]:
        address = find(ids)
        before.setdefault(address, driver(address))
        entry = await give_to_vfio(read_function(address), undo)
        find_group(address).check_bound()
        return address, entry

    yield _take
    for entry in undo.entries:
        restore(entry.facts)
    assert {address: driver(address) for address in before} == before


def config(name: str, address: str) -> VfioConfig:
    return VfioConfig(id=name, address=address)


def device(mode: str, address: str, path: str) -> agent.Device:
    number = find_group(address).number
    return agent.Device(
        id=str(number), type=mode, container_path=f"/dev/vfio/{number}", options=[f"{address}={path}"]
    )


def here(address: str) -> Path:
    """The disk's node in this machine, once its driver has made it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for name in Path("/sys/class/block").iterdir():
            if f"/{address}/" in os.path.realpath(name):
                return Path("/dev", name.name)
        time.sleep(0.05)
    raise AssertionError(f"{address} has no disk")


async def test_devices_come_and_go_and_the_guest_uses_them(boot: Boot, take: Take) -> None:
    """edu is there from the start; disk and card come, go and come again while the VM runs."""
    (edu, _), (disk, taken), (card, _) = await take(EDU), await take(DISK), await take(CARD)
    vm, guest, manager = await boot(
        also=[config("edu", edu)],
        kernel_params=PARAMS,
        cold_plug_vfio="root-port",
        hot_plug_vfio="root-port",
        pcie_root_port=2,
    )
    for name, address in (("disk", disk), ("card", card)):
        await manager.try_add_device(config(name, address), vm)
    paths = {name: (await manager.generate_agent_device(name)).id for name in ("edu", "disk", "card")}

    script = (
        f"head -c {len(SPARE_DISK)} /dev/nvme0n1; echo written by the guest |"
        " dd of=/dev/nvme0n1 bs=512 seek=8 conv=sync,fsync 2>/dev/null;"
        " for a in $PCIDEVICE_EDU $PCIDEVICE_DISK; do cat /sys/bus/pci/devices/$a/vendor; done"
    )
    spec = make_spec("sh", "-c", script)
    spec.Process.Env.extend([f"PCIDEVICE_EDU={edu}", f"PCIDEVICE_DISK={disk}"])
    devices = [
        device("vfio-pci-gk", address, paths[name]) for name, address in (("edu", edu), ("disk", disk))
    ]
    code, out, err = await guest.run(spec=spec, devices=devices)
    assert (code, err) == (0, b"")
    assert out == SPARE_DISK + b"0x1234\n0x1b36\n"

    # The card has its link in the guest, and an address of QEMU's user network answers through it.
    link = types.Interface(
        device="net9",
        name="net9",
        devicePath=paths["card"],
        mtu=1500,
        hwAddr=await mac(guest),
        IPAddresses=[types.IPAddress(address="10.0.2.15", mask="24")],
    )
    await guest.agent.update_interface(agent.UpdateInterfaceRequest(interface=link))
    spec = make_spec("busybox", "ping", "-c", "2", "-W", "30", "10.0.2.2")
    spec.Process.Capabilities.Bounding.append("CAP_NET_RAW")
    spec.Process.Capabilities.Effective.append("CAP_NET_RAW")
    spec.Process.Capabilities.Permitted.append("CAP_NET_RAW")
    code, out, _ = await guest.run(spec=spec)
    assert code == 0, out
    assert b"2 packets received" in out

    assert await vm.resize_memory(384) == 384  # a DIMM: more to map for the devices
    await guest.agent.online_cpu_mem(agent.OnlineCPUMemRequest(wait=True, nb_cpus=1))

    for name in ("card", "disk"):
        await manager.try_remove_device(name, vm)
    restore(taken.facts)
    with here(disk).open("rb") as node:
        assert node.read(len(SPARE_DISK)) == SPARE_DISK
        node.seek(8 * 512)
        assert node.read(21) == b"written by the guest\n"
    await take(DISK)
    await manager.try_add_device(config("disk", disk), vm)
    code, out, _ = await guest.run(
        spec=make_spec("dd", "if=/dev/nvme0n1", "bs=21", "count=1"),
        devices=[device("vfio-pci-gk", disk, (await manager.generate_agent_device("disk")).id)],
    )
    assert (code, out) == (0, SPARE_DISK[:21])


async def mac(guest: Guest) -> str:
    """Of the guest's one card, once it is there."""
    interfaces = await guest.agent.list_interfaces(agent.ListInterfacesRequest())
    (address,) = [one.hwAddr for one in interfaces.Interfaces if one.name != "lo"]
    return str(address)


async def test_a_container_gets_the_group_where_the_guest_has_an_iommu(boot: Boot, take: Take) -> None:
    """vfio mode: the guest binds the device to its own vfio-pci; the container opens /dev/vfio/<group>."""
    disk, _ = await take(DISK)
    _, guest, manager = await boot(
        also=[config("disk", disk)],
        kernel_params=PARAMS,
        cold_plug_vfio="switch-port",
        enable_iommu=True,
    )
    path = (await manager.generate_agent_device("disk")).id
    spec = make_spec(
        "sh", "-c", "for g in /dev/vfio/[0-9]*; do exec 3<>$g && echo opened; done; echo /dev/vfio/*"
    )
    wanted = device("vfio-pci", disk, path)
    spec.Linux.Devices.add(Path=wanted.container_path, Type="c", Major=244, Minor=9)
    code, out, err = await guest.run(spec=spec, devices=[wanted])
    assert (code, err) == (0, b"")
    opened, nodes = out.decode().splitlines()
    assert opened == "opened"
    group, control = nodes.split()
    assert group.removeprefix("/dev/vfio/").isdigit()
    assert control == "/dev/vfio/vfio"


async def test_what_this_machine_uses_is_not_taken(take: Take) -> None:
    """A disk that somebody has for himself, as a mount in any namespace has; a link that is up."""
    node, card = here(find(DISK)), find(CARD)
    holder = os.open(node, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(CallerError, match=f"{node.name} is taken"):
        await take(DISK)
    os.close(holder)
    (link,) = [p.name for p in Path("/sys/class/net").iterdir() if f"/{card}/" in os.path.realpath(p)]
    subprocess.run(["ip", "link", "set", link, "up"], check=True, timeout=60)
    with pytest.raises(CallerError, match=f"the network link {link} is up"):
        await take(CARD)
    subprocess.run(["ip", "link", "set", link, "down"], check=True, timeout=60)
    await take(CARD)
