"""A device is plugged once, counted, named, and unplugged when its last user lets go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from devices.config import BlockConfig, DeviceConfig, RngConfig
from devices.device import PluggedDevice
from devices.errors import BugError, CallerError, HostError, HypervisorError
from devices.kinds import Kind
from devices.manager import DeviceManager, disk_name


class Host:
    """A hypervisor that only remembers; `refuse` makes the next call fail."""

    def __init__(self) -> None:
        self.plugged: list[str] = []
        self.refuse = False

    def _may(self) -> None:
        if self.refuse:
            self.refuse = False
            raise HypervisorError("no")

    async def add_device(self, device: DeviceConfig) -> str:
        await asyncio.sleep(0)
        self._may()
        assert device.id not in self.plugged
        self.plugged.append(device.id)
        return f"{len(self.plugged):02x}"

    async def remove_device(self, device_id: str) -> None:
        await asyncio.sleep(0)
        self._may()
        self.plugged.remove(device_id)


@pytest.fixture
def disks(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"disk{number}" for number in range(4)]
    for path in paths:
        path.write_bytes(b"")
    return [str(path) for path in paths]


async def test_one_disk_by_two_names_is_plugged_once(disks: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(disks[0])
    manager, host = DeviceManager(), Host()
    first, second = await asyncio.gather(
        manager.try_add_device(BlockConfig(id="a", path=disks[0]), host),
        manager.try_add_device(BlockConfig(id="b", path=str(tmp_path / "link")), host),
    )

    # Which of the two is first is the threads' matter that look at the files.
    assert first == second
    assert host.plugged == [first]
    assert await manager.try_remove_device(first, host) is None
    assert host.plugged == [first]
    assert await manager.try_remove_device(first, host) == 0
    assert host.plugged == []
    with pytest.raises(CallerError, match=f"no device {first}"):
        await manager.try_remove_device(first, host)


async def test_the_same_disk_with_other_properties_is_refused(disks: list[str]) -> None:
    manager, host = DeviceManager(), Host()
    await manager.try_add_device(BlockConfig(id="a", path=disks[0], read_only=True), host)
    with pytest.raises(CallerError, match="not as asked"):
        await manager.try_add_device(BlockConfig(id="b", path=disks[0]), host)


async def test_names_are_given_out_and_taken_back(disks: list[str]) -> None:
    manager, host = DeviceManager(), Host()
    for name, path in zip("abc", disks, strict=False):
        await manager.try_add_device(BlockConfig(id=name, path=path), host)
    assert (await manager.generate_agent_device("c")).vm_path == "/dev/vdc"
    assert await manager.try_remove_device("b", host) == 1
    await manager.try_add_device(BlockConfig(id="d", path=disks[3]), host)
    agent_device = await manager.generate_agent_device("d")

    assert (agent_device.type, agent_device.vm_path) == ("blk", "/dev/vdb")
    assert agent_device.id == "03"  # its PCI path
    assert await manager.get_device_guest_path("d") == "/dev/vdb"
    assert await manager.get_driver_options() == "virtio-blk-pci"
    assert await DeviceManager(Kind.SCSI).get_driver_options() == "virtio-scsi"


async def test_a_failed_plug_leaves_no_trace(disks: list[str]) -> None:
    manager, host = DeviceManager(), Host()
    host.refuse = True
    with pytest.raises(HypervisorError):
        await manager.try_add_device(BlockConfig(id="a", path=disks[0]), host)

    assert await manager.get_device_guest_path("a") is None
    await manager.try_add_device(BlockConfig(id="a", path=disks[0]), host)
    assert (await manager.generate_agent_device("a")).vm_path == "/dev/vda"


async def test_a_failed_unplug_keeps_the_device(disks: list[str]) -> None:
    manager, host = DeviceManager(), Host()
    await manager.try_add_device(BlockConfig(id="a", path=disks[0]), host)
    host.refuse = True
    with pytest.raises(HypervisorError):
        await manager.try_remove_device("a", host)

    assert await manager.try_remove_device("a", host) == 0
    assert host.plugged == []


async def test_a_disk_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        await DeviceManager().try_add_device(BlockConfig(id="a", path=str(tmp_path / "x")), Host())


async def test_what_the_agent_does_not_look_for_has_no_agent_device() -> None:
    manager, host = DeviceManager(), Host()
    assert await manager.try_add_device(RngConfig(), host) == "rng"
    with pytest.raises(CallerError, match="none of the agent"):
        await manager.generate_agent_device("rng")


async def test_the_traits_counts_say_what_to_skip() -> None:
    device = PluggedDevice(RngConfig())

    assert not await device.increase_attach_count()
    assert await device.increase_attach_count()
    assert await device.decrease_attach_count()
    assert not await device.decrease_attach_count()
    with pytest.raises(BugError):
        await device.decrease_attach_count()


@pytest.mark.parametrize(
    ("index", "name"), [(0, "vda"), (25, "vdz"), (26, "vdaa"), (701, "vdzz"), (702, "vdaaa")]
)
def test_disk_names_are_the_kernels(index: int, name: str) -> None:
    assert disk_name(index) == name
