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
from shim.resources.network.guest import addresses, interface, neighbors, routes
from shim.resources.network.netns import names
from shim.resources.network.routes import beyond
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
    told = {
        (route.destination, hop.gateway, route.source, hop.link)
        for route in found.routes
        for hop in route.hops
    }
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
        "ip route add 203.0.114.0/24 nexthop via 10.199.0.1 nexthop dev plain",
    )
    found = lab.inside("pod", scan)
    assert [link.name for link in found.links] == ["eth0"]
    assert len(found.routes) == 3
    assert found.names == {"eth0", "plain", "other"}
    assert beyond(found.routes, found.rules) == {}, (
        "a usual network costs the guest no more than Kata's messages"
    )


def test_metrics_tables_ways_kinds_and_rules(lab: NetLab) -> None:
    """All of it goes to the agent beside Kata's message, which has what it can say of it."""
    lab.sh(
        "pod",
        f"""
        ip route add default via {HOST4} metric 200
        ip -6 route add default via {HOST6} metric 7
        ip route add 192.0.2.0/24 dev eth0 table 1000 mtu 1300 advmss 1200 initcwnd 20
        ip route add blackhole 198.18.0.0/15
        ip -6 route add unreachable fd01::/48
        ip route add local 203.0.113.0/24 dev lo
        ip route add 203.0.114.0/24 nexthop via {HOST4} weight 3 nexthop via 10.199.0.3
        ip route add 203.0.115.0/24 via inet6 {HOST6} dev eth0
        ip rule add from {GUEST4} lookup 1000 priority 100
        ip -6 rule add not fwmark 0x7/0xff lookup 1000 priority 5
        """,
    )
    found = lab.inside("pod", scan)
    told = beyond(found.routes, found.rules)
    shown = {(route["dst"], route["metric"], route["family"]): route for route in told["routes"]}
    ways = {
        key: [(hop["via"], hop["dev"], hop["weight"]) for hop in one["hops"]] for key, one in shown.items()
    }
    assert ways["", 0, 4] == ways["", 200, 4] == [(HOST4, "eth0", 0)]
    assert ways["", 0, 6] == ways["", 7, 6] == [(HOST6, "eth0", 0)]
    assert ways["203.0.114.0/24", 0, 4] == [(HOST4, "eth0", 2), ("10.199.0.3", "eth0", 0)]
    assert ways["203.0.115.0/24", 0, 4] == [(HOST6, "eth0", 0)]
    assert ways["203.0.113.0/24", 0, 4] == [("", "lo", 0)]
    assert ways["198.18.0.0/15", 0, 4] == ways["fd01::/48", 0, 6] == []
    assert [shown[dst, 0, family]["type"] for dst, family in (("198.18.0.0/15", 4), ("fd01::/48", 6))] == [
        6,
        7,
    ]
    far = shown["192.0.2.0/24", 0, 4]
    assert (far["table"], far["metrics"]) == (1000, {"2": 1300, "8": 1200, "11": 20})
    assert [rule["text"] for rule in told["rules"]] == [
        f"100: from {GUEST4}/32 lookup 1000",
        "5: not from all fwmark 0x7 lookup 1000",
    ]
    assert [(one.dest, one.gateway) for one in routes(found) if one.dest == ""][-1] == ("", HOST6)
    assert {one.dest for one in routes(found)} == {"", "198.51.100.0/24"}


def test_addresses_with_peers_and_without_routes(lab: NetLab) -> None:
    lab.sh(
        "pod",
        "ip addr add 192.0.2.1 peer 192.0.2.9/32 dev eth0;"
        "ip addr add fd02::1 peer fd02::9/128 dev eth0 nodad;"
        "ip addr add 192.0.3.1/24 dev eth0 noprefixroute; ip addr add 192.0.4.1/24 scope link dev eth0",
    )
    (link,) = lab.inside("pod", scan).links
    usual = {"peer": "", "scope": 0, "noprefixroute": False}
    assert addresses(link) == {
        "addresses": {
            "192.0.2.1": {**usual, "peer": "192.0.2.9"},
            "fd02::1": {**usual, "peer": "fd02::9"},
            "192.0.3.1": {**usual, "noprefixroute": True},
            "192.0.4.1": {**usual, "scope": 253},
        }
    }


def test_more_routes_than_a_guest_is_told_are_refused(lab: NetLab, tmp_path: Path) -> None:
    """By their number, and at once; the kernel's are not counted."""

    def batch(*lines: str) -> None:
        (tmp_path / "batch").write_text("\n".join(lines) + "\n")
        lab.sh("pod", f"ip -batch {tmp_path}/batch")

    def many(count: int, more: str, first: int = 20) -> list[str]:
        return [
            f"route add {first + (n >> 16)}.{n >> 8 & 255}.{n & 255}.0/24 via {HOST4} {more}"
            for n in range(count)
        ]

    batch(*many(20_000, "proto kernel", 40))
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
