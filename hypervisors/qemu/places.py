"""Where the devices are that a VM has from its start: on PCI, a microvm's transports, SCSI, slots for memory.

What: `Places` gives each device its place, and says what the guest will call it.
Why one: a place of one kind decides about another (a SCSI disk needs a controller on PCI), and what is left
over is what hot-plug has.
Invariants: no place twice; what `release` gives back can be given again; places last until then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from devices.addresses import FlatSpace, PciTopology, Place
from devices.config import DeviceConfig, VfioConfig
from devices.kinds import Kind
from devices.manager import disk_name
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.cmdline import MICROVM
from hypervisors.qemu.hotplug import LUNS, scsi_seat
from hypervisors.qemu.recipes import SCSI, Placed

__all__ = ["Places"]

# A microvm's transports: the guest looks at the last one first, and its first disk has to be vda. The
# interrupt of number 0 never arrives (QEMU 7.2).
_MMIO = range(23, 0, -1)
# What the guest's kernel calls /dev/vdX, in the order in which it finds them.
_LETTERED = (Kind.BLK, Kind.VHOST_USER_BLK)


class Places:
    """Those of one VM. `topology` and `luns`: hot-plug goes on with them. `controller`: of SCSI, None while
    nobody needed it."""

    def __init__(self, section: HypervisorConfig) -> None:
        self.topology = PciTopology()
        self.luns = FlatSpace("SCSI addresses", LUNS)
        self.controller: Place | None = None
        self._microvm = section.machine_type == MICROVM
        self._mmio = FlatSpace("virtio-mmio transports", _MMIO)
        self._dimms = FlatSpace("slots for memory", range(section.memory_slots))

    def allocate(self, device: DeviceConfig, others: Sequence[Placed]) -> tuple[Mapping[str, str | int], str]:
        """The properties that place it, and the guest's path to it, "" for none. `others`: what the VM has
        already. Raises HypervisorError when there is no room."""
        match device.kind:
            case Kind.SCSI:
                if self.controller is None:
                    self.controller = self.topology.allocate(SCSI)
                return scsi_seat(self.luns.allocate(device.id))
            case Kind.PMEM:
                slot = self._dimms.allocate(device.id)
                return {"slot": slot}, f"/dev/pmem{slot}"
        if self._microvm:
            at = {"bus": f"virtio-mmio-bus.{self._mmio.allocate(device.id)}"}
            disks = sum(placed.device.kind in _LETTERED for placed in others)
            return at, f"/dev/{disk_name(disks)}" if device.kind in _LETTERED else ""
        if isinstance(device, VfioConfig):
            place = self.topology.open_port(device.id, device.port)
        else:
            place = self.topology.allocate(device.id)
        return place.properties, place.guest_path

    def release(self, device_id: str) -> None:
        """Its place is free again. Unknown ids are fine."""
        for space in (self._mmio, self.luns, self._dimms, self.topology):
            space.release(device_id)
