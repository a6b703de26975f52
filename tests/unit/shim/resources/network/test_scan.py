"""What a pod's namespace holds is read as it is, and what a VM cannot have is named."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devices.errors import HostError
from proto import types_pb2
from shim.resources.network.guest import interface, neighbors, routes
from shim.resources.network.netns import names
from shim.resources.network.scan import MOST, Address, Neighbor, Scan, scan
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


def test_more_routes_than_a_guest_is_told_are_refused(lab: NetLab, tmp_path: Path) -> None:
    """By their number, and at once; those of other tables, and the kernel's, are not counted."""

    def batch(*lines: str) -> None:
        (tmp_path / "batch").write_text("\n".join(lines) + "\n")
        lab.sh("pod", f"ip -batch {tmp_path}/batch")

    def many(count: int, more: str, first: int = 20) -> list[str]:
        return [
            f"route add {first + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24 via {HOST4} {more}"
            for n in range(count)
        ]

    batch(*many(20_000, "table 7", 30), *many(500, "proto kernel", 40))
    known = len(lab.inside("pod", scan).routes)
    batch(*many(MOST["routes"] - known - 1, ""))
    found = lab.inside("pod", scan)
    assert len(found.routes) == MOST["routes"] - 1, "of which one is an IPv6 route"
    batch(*many(20_000, "", 50))
    began = time.process_time()
    with pytest.raises(HostError, match=f"more than {MOST['routes']} routes") as caught:
        lab.inside("pod", scan)
    assert time.process_time() - began < 5
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_more_neighbours_than_a_guest_is_told_are_refused(lab: NetLab, tmp_path: Path) -> None:
    lines = [
        f"neigh add 10.199.{n >> 8}.{n & 255} lladdr 02:00:00:00:00:01 dev eth0 nud {state}"
        for state, numbers in (
            ("reachable", range(300, 600)),
            ("permanent", range(1000, 1000 + MOST["routes"])),
        )
        for n in numbers
    ]
    (tmp_path / "batch").write_text("\n".join(lines) + "\n")
    lab.sh("pod", f"ip addr add 10.199.0.5/16 dev eth0; ip -batch {tmp_path}/batch")
    with pytest.raises(HostError, match="more than 1024 permanent neighbours"):
        lab.inside("pod", scan)


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
