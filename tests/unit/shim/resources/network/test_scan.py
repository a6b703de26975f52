"""What a pod's namespace holds is read as it is, and what a VM cannot have is named."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from devices.errors import HostError
from proto import types_pb2
from shim.resources.network.guest import interface, neighbors, routes
from shim.resources.network.netns import names
from shim.resources.network.scan import Address, Neighbor, Scan, scan
from tests.netlab import GUEST4, GUEST6, HOST4, HOST6, NetLab


def test_links_addresses_routes_and_neighbours(lab: NetLab) -> None:
    mac = lab.sh("pod", "ip -br link show eth0").split()[2]
    found = lab.inside("pod", scan)
    (link,) = found.links
    assert (link.name, link.kind, link.mac, link.mtu) == ("eth0", "veth", mac, 1400)
    assert set(link.addresses) == {
        Address(socket.AF_INET, GUEST4, 24),
        Address(socket.AF_INET6, GUEST6, 64),
    }, "the link-local one is the guest kernel's to make"
    told = {(route.destination, route.gateway, route.source, route.link) for route in found.routes}
    assert told == {
        ("", HOST4, "", "eth0"),
        ("", HOST6, "", "eth0"),
        ("198.51.100.0/24", HOST4, GUEST4, "eth0"),
    }, "those that the kernel makes for an address it makes in the guest too"
    assert found.neighbors == (Neighbor(socket.AF_INET, "10.199.0.77", "02:00:00:00:00:77", "eth0"),)
    assert found.names == {"eth0"} == lab.inside("pod", names)


def test_what_does_not_count(lab: NetLab) -> None:
    """Links without an address, our own taps, and routes through what is no card of the VM."""
    lab.sh(
        "pod",
        "ip link add plain type veth peer name other; ip link set plain up; ip link set other up;"
        "ip tuntap add tap0_kata mode tap; ip route add 203.0.113.0/24 dev plain;"
        "ip route add blackhole 192.0.2.0/24; ip route add table 7 192.0.2.0/24 dev eth0",
    )
    found = lab.inside("pod", scan)
    assert [link.name for link in found.links] == ["eth0"]
    assert len(found.routes) == 3
    assert found.names == {"eth0", "plain", "other"}


def test_an_empty_namespace_has_nothing(lab: NetLab) -> None:
    lab.sh("pod", "ip link del eth0")
    assert lab.inside("pod", scan) == Scan()
    assert lab.inside("pod", names) == frozenset()


@pytest.mark.parametrize("kind", ["bridge", "ifb"])
def test_a_kind_that_no_vm_can_have_is_named(lab: NetLab, kind: str) -> None:
    made = subprocess.run(
        ["nsenter", f"--net={lab.pod}", "ip", "link", "add", "odd0", "type", kind], check=False
    )
    if made.returncode:
        pytest.skip(f"this kernel has no {kind} links")
    lab.sh("pod", "ip addr add 192.0.2.9/24 dev odd0")
    with pytest.raises(HostError, match=f"link odd0 is of kind '{kind}'"):
        lab.inside("pod", scan)


def test_the_agents_messages(lab: NetLab) -> None:
    found = lab.inside("pod", scan)
    card = interface(found.links[0], "01/02")
    assert (card.name, card.device, card.hwAddr, card.mtu) == ("eth0", "eth0", found.links[0].mac, 1400)
    assert card.devicePath == "01/02"
    assert {(one.family, one.address, one.mask) for one in card.IPAddresses} == {
        (types_pb2.v4, GUEST4, "24"),
        (types_pb2.v6, GUEST6, "64"),
    }
    assert {(one.dest, one.gateway, one.device, one.family) for one in routes(found)} == {
        ("", HOST4, "eth0", types_pb2.v4),
        ("", HOST6, "eth0", types_pb2.v6),
        ("198.51.100.0/24", HOST4, "eth0", types_pb2.v4),
    }
    (neighbor,) = neighbors(found)
    assert (neighbor.toIPAddress.address, neighbor.lladdr) == ("10.199.0.77", "02:00:00:00:00:77")
    assert neighbor.state == 0x80  # NUD_PERMANENT


def test_only_what_is_needed_of_pyroute2_is_imported() -> None:
    """The whole of it takes longer than a scan; who imports it afterwards gets the whole."""
    script = (
        "import sys; from shim.resources.network.rtnl import message;"
        "message('ifinfmsg'), message('rtmsg');"
        "assert 'pyroute2.ndb' not in sys.modules and 'pyroute2.iproute' not in sys.modules;"
        "import pyroute2; pyroute2.IPRoute"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
