"""Each device has a place of its own, what is given back is given again, and a full VM says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.addresses import FlatSpace, PciTopology, ccw_space
from devices.errors import BugError, HypervisorError


def test_slots_are_hexadecimal_and_the_lowest_free_one_is_given() -> None:
    topology = PciTopology()
    paths = [topology.allocate(f"d{number}").guest_path for number in range(30)]

    assert paths[:2] == ["01", "02"]
    assert paths[9:11] == ["0a", "0b"]
    assert paths[-1] == "1e"
    with pytest.raises(HypervisorError, match="no free PCI slot for late: a VM has 30"):
        topology.allocate("late")
    topology.release("d10")
    assert topology.allocate("late").guest_path == "0b"


def test_hot_plug_goes_to_ports_first_and_then_to_bridges() -> None:
    topology = PciTopology()
    topology.allocate("image")
    topology.add_root_ports(1)
    topology.add_switch(2)
    topology.add_bridges(1)
    assert topology.free() == 1 + 2 + 31
    paths = [topology.allocate(f"d{number}", hotplug=True).guest_path for number in range(34)]

    # image at 1, rp0 at 2, the switch's root port at 3, the bridge at 4
    assert paths[:5] == ["02/00", "03/00/00/00", "03/00/01/00", "04/01", "04/02"]
    assert paths[-1] == "04/1f"
    with pytest.raises(HypervisorError, match="all 34 of the running VM are taken") as caught:
        topology.allocate("late", hotplug=True)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert "pcie_root_port" in caught.value.hint


def test_without_ports_nothing_can_be_plugged() -> None:
    with pytest.raises(HypervisorError, match="all 0 of the running VM"):
        PciTopology().allocate("disk", hotplug=True)


def test_ports_take_slots_too() -> None:
    topology = PciTopology()
    topology.add_root_ports(30)
    with pytest.raises(HypervisorError, match="no free PCI slot for pci-bridge-0"):
        topology.add_bridges(1)


def test_one_place_for_each() -> None:
    topology = PciTopology()
    topology.allocate("d")
    with pytest.raises(BugError):
        topology.allocate("d")
    topology.release("d")
    topology.release("d")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_no_two_devices_ever_share_a_place(steps: list[tuple[bool, int]]) -> None:
    topology = PciTopology()
    topology.add_root_ports(2)
    topology.add_bridges(1)
    room = topology.free()
    there: dict[str, str] = {}
    for plug, number in steps:
        name = f"d{number}"
        if plug and name not in there:
            if len(there) == room:
                with pytest.raises(HypervisorError):
                    topology.allocate(name, hotplug=True)
                continue
            path = topology.allocate(name, hotplug=True).guest_path
            assert path not in there.values()
            there[name] = path
        elif not plug:
            topology.release(name)
            there.pop(name, None)
        assert topology.free() == room - len(there)


def test_a_flat_space_has_an_end() -> None:
    space = FlatSpace("virtio-mmio transports", range(2))
    assert [space.allocate("a"), space.allocate("b")] == [0, 1]
    with pytest.raises(HypervisorError, match=r"none of the 2 .* is free for c"):
        space.allocate("c")
    with pytest.raises(BugError):
        space.allocate("a")
    space.release("a")
    space.release("a")
    assert space.allocate("c") == 0


def test_channel_devices_have_a_number() -> None:
    space = ccw_space()
    assert [space.allocate(name) for name in "ab"] == [0, 1]


def test_a_device_that_starts_behind_a_port_has_one_of_its_own() -> None:
    topology = PciTopology()
    topology.allocate("image")
    places = [topology.open_port("a", "root-port"), topology.open_port("b", "switch-port")]
    places += [topology.open_port("c", "switch-port"), topology.open_port("d", "root-port")]
    topology.add_root_ports(1)

    assert [place.guest_path for place in places] == ["02/00", "03/00/00/00", "03/00/01/00", "04/00"]
    assert [place.properties for place in places[:2]] == [
        {"bus": "cp0", "addr": "0x0"},
        {"bus": "cp1", "addr": "0x0"},
    ]
    kinds = {port.name: port.kind for port in topology.ports}
    assert kinds["cp0"] == "root-port"
    assert kinds["cp1"] == kinds["cp2"] == "switch-downstream"
    assert topology.free() == 1
    topology.release("a")  # its port stays its own
    assert topology.allocate("later", hotplug=True).guest_path == "05/00"
    with pytest.raises(BugError):
        topology.open_port("b", "root-port")
    with pytest.raises(HypervisorError, match="no device starts behind a bridge-port"):
        topology.open_port("e", "bridge-port")


def test_a_switch_is_full_with_32_ports() -> None:
    topology = PciTopology()
    paths = [topology.open_port(f"d{number}", "switch-port").guest_path for number in range(32)]
    assert paths[-1] == "01/00/1f/00"
    with pytest.raises(HypervisorError, match="no free port of the PCIe switch for late: it has 32"):
        topology.open_port("late", "switch-port")


def test_ports_that_are_kept_for_vfio_are_the_last_for_others() -> None:
    topology = PciTopology()
    topology.kept_for_vfio = "root-port"
    topology.add_root_ports(2)
    topology.add_bridges(1)
    disks = [topology.allocate(f"disk{number}", hotplug=True).guest_path for number in range(2)]
    assert disks == ["03/01", "03/02"]
    assert topology.allocate("gpu", hotplug=True, behind="root-port").guest_path == "01/00"
    for number in range(2, 31):
        topology.allocate(f"disk{number}", hotplug=True)
    assert topology.allocate("disk31", hotplug=True).guest_path == "02/00"
    with pytest.raises(HypervisorError, match="no free PCI slot behind a root-port to plug nic into: all 2"):
        topology.allocate("nic", hotplug=True, behind="root-port")
