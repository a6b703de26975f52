"""Where devices sit in a VM: PCI slots behind ports and bridges, and the flat spaces of MMIO and CCW.

What: `PciTopology` is the tree of buses of one VM; `allocate` gives a device a place and `release` takes
it back. `FlatSpace` does the same for virtio-mmio transports and for channel-attached (CCW) devices.
Why a value, asked before the VMM is: the guest is told where its disk is before it sees it, so this
and the VMM's arguments must agree; and a slot that is not given back is a leak that nobody sees.
Invariants:
- A place belongs to one device at most; the lowest free one is given, so that a run repeats itself.
- `Place.guest_path` is what the guest's sysfs says: the slots from the root bus, hexadecimal, as in
  "02/00". Functions other than 0 are not used.
- A root bus hot-plugs nothing; ports and bridges do. A port has one slot, 0; a bridge 1 to 31.
- A port that was opened for one device before the start (`open_port`) is never another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from devices.errors import BugError, HypervisorError

__all__ = ["PORT_KINDS", "FlatSpace", "PciTopology", "Place", "Port", "ccw_space"]

PORT_KINDS = {"root-port": "root-port", "switch-port": "switch-downstream", "bridge-port": "bridge"}
"""Kata's names of what a device can sit behind -> `Port.kind`."""

_ROOT = "pcie.0"
_ROOT_SLOTS = range(0x1, 0x1F)  # 0 is the host bridge, 1f the ISA bridge
_PORT_SLOTS = range(1)
_SWITCH_SLOTS = range(32)
_BRIDGE_SLOTS = range(0x1, 0x20)  # 0 is for a hot-plug controller that we do not have


@dataclass(frozen=True, slots=True)
class Place:
    """A PCI slot. `bus` is the VMM's name of the bus, `above` the slots of the bridges over it."""

    bus: str
    slot: int
    above: tuple[int, ...] = ()

    @property
    def guest_path(self) -> str:
        """Kata's PCI path, "02/00"."""
        return "/".join(f"{slot:02x}" for slot in (*self.above, self.slot))

    @property
    def properties(self) -> dict[str, str]:
        """What QEMU's devices are told of it. Its slots are hexadecimal, whatever they look like."""
        return {"bus": self.bus, "addr": f"{self.slot:#x}"}


@dataclass(frozen=True, slots=True)
class Port:
    """What opens a bus of its own: where it sits itself, and the name and kind by which it was made.

    `kind`: "root-port", "switch-upstream", "switch-downstream" or "bridge". `number` counts its kind from 0.
    """

    name: str
    kind: str
    number: int
    place: Place


class _Bus:
    """The slots below one port, or those of the root."""

    def __init__(
        self, name: str, slots: range, above: tuple[int, ...], *, hotplug: bool, kind: str = ""
    ) -> None:
        self.name = name
        self.kind = kind
        self.slots = slots
        self.above = above
        self.hotplug = hotplug
        self.taken: dict[int, str] = {}

    def take(self, owner: str) -> Place | None:
        for slot in self.slots:
            if slot not in self.taken:
                self.taken[slot] = owner
                return Place(self.name, slot, self.above)
        return None


class PciTopology:
    """The PCI buses of one VM and who sits where. Owners are device ids."""

    def __init__(self) -> None:
        self._buses = {_ROOT: _Bus(_ROOT, _ROOT_SLOTS, (), hotplug=False)}
        self._places: dict[str, Place] = {}
        self.ports: list[Port] = []
        self.kept_for_vfio = ""
        """A key of `PORT_KINDS`: other devices are plugged behind such ports when nothing else is free."""

    def allocate(self, owner: str, *, hotplug: bool = False, behind: str = "") -> Place:
        """A slot for a device: on the root bus, or with `hotplug` behind a port or a bridge, ports first.

        `behind`: a key of `PORT_KINDS`, and no other will do. Raises HypervisorError when none is free,
        BugError when `owner` has a place.
        """
        if owner in self._places:
            raise BugError(f"{owner} has a PCI slot already")
        for bus in self._candidates(hotplug, behind):
            place = bus.take(owner)
            if place is not None:
                self._places[owner] = place
                return place
        if not hotplug:
            raise HypervisorError(f"no free PCI slot for {owner}: a VM has {len(_ROOT_SLOTS)}")
        count = sum(len(bus.slots) for bus in self._candidates(hotplug, behind))
        which = f" behind a {behind}" if behind else ""
        raise HypervisorError(
            f"no free PCI slot{which} to plug {owner} into: all {count} of the running VM are taken",
            hint="raise pcie_root_port, pcie_switch_port or default_bridges",
            code="RESOURCE_EXHAUSTED",
        )

    def release(self, owner: str) -> None:
        """Take the device's slot back. An owner without one is fine: its plug may have failed early."""
        place = self._places.pop(owner, None)
        if place is not None:
            del self._buses[place.bus].taken[place.slot]

    def open_port(self, owner: str, behind: str) -> Place:
        """A port of its own for a device that the VM starts with; its slot. `behind`: root-port, switch-port.

        Raises HypervisorError when the root bus is full, BugError when `owner` has a place.
        """
        if owner in self._places:
            raise BugError(f"{owner} has a PCI slot already")
        number = sum(port.name.startswith("cp") for port in self.ports)
        name, kind = f"cp{number}", PORT_KINDS[behind]
        if kind == "root-port":
            where = self.allocate(name)
        elif kind == "switch-downstream":
            if "cup0" not in self._buses:
                self._open_switch("crp0", "cup0", _SWITCH_SLOTS)
            taken = self._buses["cup0"].take(name)
            if taken is None:
                raise HypervisorError(f"no free port of the PCIe switch for {owner}: it has 32")
            where = taken
        else:
            raise HypervisorError(f"no device starts behind a {behind}", code="UNIMPLEMENTED")
        self._open(name, kind, number, where, _PORT_SLOTS, hotplug=False)
        place = self._buses[name].take(owner)
        assert place is not None
        self._places[owner] = place
        return place

    def add_root_ports(self, count: int) -> None:
        """PCI Express ports on the root bus, one slot each. Raises HypervisorError when it is full."""
        for number in range(count):
            self._open(f"rp{number}", "root-port", number, self.allocate(f"rp{number}"), _PORT_SLOTS)

    def add_switch(self, ports: int) -> None:
        """A root port, a switch below it, and `ports` downstream ports, one slot each."""
        if ports == 0:
            return
        self._open_switch("swrp0", "swup0", range(ports))
        for number in range(ports):
            down = self._buses["swup0"].take(f"swdp{number}")
            assert down is not None
            self._open(f"swdp{number}", "switch-downstream", number, down, _PORT_SLOTS)

    def add_bridges(self, count: int) -> None:
        """Conventional PCI bridges on the root bus, 31 slots each. Raises HypervisorError when it is full."""
        for number in range(count):
            name = f"pci-bridge-{number}"
            self._open(name, "bridge", number, self.allocate(name), _BRIDGE_SLOTS)

    def free(self) -> int:
        """How many more devices can be hot-plugged."""
        return sum(len(bus.slots) - len(bus.taken) for bus in self._candidates(True))

    def _open_switch(self, root: str, up: str, slots: range) -> None:
        self._open(root, "root-port", len(self.ports), self.allocate(root), _PORT_SLOTS, hotplug=False)
        place = self._buses[root].take(up)
        assert place is not None
        self._open(up, "switch-upstream", 0, place, slots, hotplug=False)

    def _open(
        self, name: str, kind: str, number: int, place: Place, slots: range, *, hotplug: bool = True
    ) -> None:
        self.ports.append(Port(name, kind, number, place))
        self._buses[name] = _Bus(name, slots, (*place.above, place.slot), hotplug=hotplug, kind=kind)

    def _candidates(self, hotplug: bool, behind: str = "") -> Iterator[_Bus]:
        if not hotplug:
            yield self._buses[_ROOT]
            return
        buses = [bus for bus in self._buses.values() if bus.hotplug]
        if behind:
            yield from (bus for bus in buses if bus.kind == PORT_KINDS[behind])
            return
        kept = PORT_KINDS.get(self.kept_for_vfio)
        yield from sorted(buses, key=lambda bus: bus.kind == kept)


class FlatSpace:
    """Numbered places of one kind without a tree. `what` is their name in messages."""

    def __init__(self, what: str, numbers: range) -> None:
        self._what = what
        self._numbers = numbers
        self._taken: dict[int, str] = {}

    def allocate(self, owner: str) -> int:
        """The lowest free number. Raises HypervisorError when none is, BugError when `owner` has one."""
        if owner in self._taken.values():
            raise BugError(f"{owner} has one of the {self._what} already")
        for number in self._numbers:
            if number not in self._taken:
                self._taken[number] = owner
                return number
        raise HypervisorError(
            f"none of the {len(self._numbers)} {self._what} is free for {owner}", code="RESOURCE_EXHAUSTED"
        )

    def release(self, owner: str) -> None:
        """Take it back. An owner without one is fine."""
        self._taken = {number: who for number, who in self._taken.items() if who != owner}


def ccw_space() -> FlatSpace:
    """The device numbers of s390x's virtual channel subsystem 0xfe, set 0: `fe.0.0000` to `fe.0.ffff`."""
    return FlatSpace("CCW device numbers", range(0x10000))
