"""Each device that a VM starts with has the place that its guest will find it at."""

from __future__ import annotations

from devices.config import BlockConfig, DeviceConfig, RngConfig, VhostUserBlkConfig
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.places import Places
from hypervisors.qemu.recipes import Placed


def places(machine: str, *devices: DeviceConfig) -> list[str]:
    made = Places(HypervisorConfig(machine_type=machine))
    said: list[str] = []
    placed: list[Placed] = []
    for device in devices:
        at, path = made.allocate(device, placed)
        placed.append(Placed(device=device, at=at))
        said.append(path)
    return said


DISKS = (
    BlockConfig(id="image", path="/a"),
    RngConfig(),
    VhostUserBlkConfig(id="served", path="/s"),
    BlockConfig(id="data", path="/b"),
)


def test_disks_of_a_microvm_are_counted_whoever_serves_them() -> None:
    """Its kernel knows no difference: each is the next /dev/vdX."""
    assert places("microvm", *DISKS) == ["/dev/vda", "", "/dev/vdb", "/dev/vdc"]


def test_on_pci_each_device_has_a_slot() -> None:
    assert places("q35", *DISKS) == ["01", "02", "03", "04"]
