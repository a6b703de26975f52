"""The guest's links, addresses, routes and neighbours become what the host asks, however often it asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Each script runs as root of a network namespace of its own, with two links.
_SETUP = """
import subprocess, sys
from agent.network import interfaces as network
from agent.network import routes as roads
from proto import types_pb2 as t
from ttrpc import RpcError
def ip(*args):
    text = subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout
    return text.replace("linkdown ", "")
for name, mac in (("x0", "02:00:00:00:00:01"), ("x1", "02:00:00:00:00:02")):
    ip("link", "add", name, "address", mac, "type", "veth")
ROUTE = {"family": 4, "dst": "", "type": 1, "table": 254, "protocol": 3, "scope": 0, "tos": 0, "metric": 0,
         "src": "", "metrics": {}, "hops": [{"via": "10.1.0.1", "dev": "eth0", "flags": 0, "weight": 0}]}
def way(via, dev="eth0", weight=0): return {"via": via, "dev": dev, "flags": 0, "weight": weight}
def interface(name, mac, address, mtu=1400):
    made = t.Interface(name=name, device=name, hwAddr=mac, mtu=mtu)
    made.IPAddresses.add(family=t.v4, address=address, mask="24")
    return made
"""


def _in_namespace(script: str) -> None:
    probe = subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True)
    if probe.returncode != 0:
        pytest.skip("needs the right to make a network namespace")
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", _SETUP + script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr


def test_an_interface_is_found_by_mac_named_and_addressed() -> None:
    _in_namespace(
        """
for address in ("10.1.0.2", "10.1.0.3", "10.1.0.3"):
    network.update_interface(interface("eth0", "02:00:00:00:00:01", address))
text = ip("addr", "show", "eth0")
assert "10.1.0.3/24" in text and "10.1.0.2/24" not in text and "mtu 1400" in text and ",UP" in text, text
found = {i.name: i for i in network.list_interfaces()}
assert found["eth0"].hwAddr == "02:00:00:00:00:01"
assert [(a.address, a.mask) for a in found["eth0"].IPAddresses if a.family == t.v4] == [("10.1.0.3", "24")]
"""
    )


def test_an_ipv6_address_serves_at_once() -> None:
    """Nobody looks for a duplicate first: who gave the address has seen to it."""
    _in_namespace(
        """
made = interface("eth0", "02:00:00:00:00:01", "10.1.0.2")
made.IPAddresses.add(family=t.v6, address="fd00::2", mask="64")
network.update_interface(made)
text = ip("-6", "addr", "show", "eth0")
assert "fd00::2/64 scope global nodad" in text, text
assert open("/proc/sys/net/ipv6/conf/eth0/accept_dad").read() == "0\\n", "its own fe80:: neither"
"""
    )


def test_names_may_be_exchanged() -> None:
    _in_namespace(
        """
network.update_interface(interface("x1", "02:00:00:00:00:01", "10.1.0.2"))
network.update_interface(interface("x0", "02:00:00:00:00:02", "10.2.0.2"))
assert "10.1.0.2/24" in ip("addr", "show", "x1") and "02:00:00:00:00:02" in ip("link", "show", "x0")
"""
    )


def test_routes_are_replaced_in_a_working_order() -> None:
    _in_namespace(
        """
network.update_interface(interface("eth0", "02:00:00:00:00:01", "10.1.0.2"))
ip("route", "add", "10.77.0.0/16", "dev", "eth0")
roads.update_routes([t.Route(dest="10.78.0.0/16", device="eth0")])
wanted = [
    t.Route(dest="", gateway="10.9.0.1", device="eth0"),
    t.Route(dest="10.9.0.0/24", device="eth0", scope=253),
]
for _ in range(2):
    roads.update_routes(wanted)
text = ip("route")
assert "default via 10.9.0.1 dev eth0" in text and "10.9.0.0/24 dev eth0" in text, text
assert "10.77" in text, "it is not the host's"
assert "10.78" not in text and "10.1.0.0/24 dev eth0 proto kernel" in text, text
listed = roads.list_routes()
assert any(r.gateway == "10.9.0.1" and r.dest == "" for r in listed), listed
"""
    )


def test_what_katas_message_cannot_say() -> None:
    """Metrics, ways, tables, kinds, gateways of the other family, and rules; all of it goes again."""
    _in_namespace(
        r"""
network.update_interface(interface("eth0", "02:00:00:00:00:01", "10.1.0.2"))
network.update_interface(interface("eth1", "02:00:00:00:00:02", "10.2.0.2"))
before = ip("route", "show", "table", "all"), ip("rule")
routes = [
    {**ROUTE, "metric": 200, "hops": [way("10.2.0.1", "eth1")]},
    {**ROUTE, "metric": 10},
    {**ROUTE, "dst": "10.5.0.0/16", "hops": [way("10.1.0.1", weight=2), way("10.2.0.1", "eth1")]},
    {**ROUTE, "dst": "10.6.0.0/16", "hops": [way("10.1.0.1")]},
    {**ROUTE, "dst": "10.6.0.0/16", "hops": [way("10.2.0.1", "eth1")]},
    {**ROUTE, "dst": "10.7.0.0/16", "table": 1000, "metrics": {"2": 1300, "8": 1200}},
    {**ROUTE, "dst": "10.8.0.0/16", "type": 6, "hops": []},
    {**ROUTE, "dst": "10.9.0.0/16", "hops": [way("fe80::9")]},
    {**ROUTE, "dst": "10.10.0.0/16", "type": 2, "table": 133, "scope": 254, "hops": [way("", "lo")]},
    {**ROUTE, "family": 6, "hops": [way("fe80::1")], "metric": 10},
    {**ROUTE, "family": 6, "hops": [way("fe80::2", "eth1")], "metric": 200},
]
# ip rule add from 10.1.0.2 lookup 1000 priority 100
rule = {"body": "020020000000000100000000" "08000200" "0a010002" "08000600" "64000000" "08000f00" "e8030000",
        "text": "100: from 10.1.0.2 lookup 1000"}
for _ in range(2):
    told = [t.Route(dest="", gateway="10.1.0.1", device="eth0")]
    roads.update_routes(told, {"routes": routes, "rules": [rule]})
text = ip("route")
assert text.splitlines()[:2] == [
    "default via 10.1.0.1 dev eth0 metric 10 ", "default via 10.2.0.1 dev eth1 metric 200 "], text
for part in (
    "10.5.0.0/16 \n\tnexthop via 10.1.0.1 dev eth0 weight 3 \n\tnexthop via 10.2.0.1 dev eth1 weight 1 \n",
    "10.6.0.0/16 via 10.1.0.1 dev eth0 \n10.6.0.0/16 via 10.2.0.1 dev eth1 \n",
    "blackhole 10.8.0.0/16", "10.9.0.0/16 via inet6 fe80::9 dev eth0",
): assert part in text, text
assert "10.7.0.0/16 via 10.1.0.1 dev eth0 mtu 1300 advmss 1200" in ip("route", "show", "table", "1000")
assert "local 10.10.0.0/16 dev lo scope host" in ip("route", "show", "table", "133")
assert [line.split(" proto")[0].strip() for line in ip("-6", "route", "show", "default").splitlines()] == [
    "default via fe80::1 dev eth0 metric 10 pref medium",
    "default via fe80::2 dev eth1 metric 200 pref medium"]
assert "100:\tfrom 10.1.0.2 lookup 1000" in ip("rule"), ip("rule")
roads.update_routes([])
assert (ip("route", "show", "table", "all"), ip("rule")) == before
""",
    )


def test_addresses_with_peers_and_without_routes() -> None:
    _in_namespace(
        """
made = interface("eth0", "02:00:00:00:00:01", "10.1.0.2")
for address, mask in (("10.3.0.1", "32"), ("10.4.0.1", "24")):
    made.IPAddresses.add(family=t.v4, address=address, mask=mask)
more = {"addresses": {"10.3.0.1": {"peer": "10.3.0.9"}, "10.4.0.1": {"noprefixroute": True, "scope": 253}}}
for _ in range(2):
    network.update_interface(made, more)
text = ip("addr", "show", "eth0")
for part in ("inet 10.1.0.2/24 brd 10.1.0.255 scope global", "inet 10.3.0.1 peer 10.3.0.9/32",
             "inet 10.4.0.1/24 brd 10.4.0.255 scope link noprefixroute"):
    assert part in text, text
assert "10.3.0.9" in ip("route") and "10.4.0.0" not in ip("route"), ip("route")
assert text.index("10.1.0.2") < text.index("10.3.0.1"), "the first is the link's own"
"""
    )


def test_ipv6_and_neighbours() -> None:
    _in_namespace(
        """
wanted = t.Interface(name="eth0", hwAddr="02:00:00:00:00:01")
wanted.IPAddresses.add(family=t.v6, address="fd00::2", mask="64")
network.update_interface(wanted)
roads.update_routes([t.Route(dest="::/0", gateway="fd00::1", device="eth0", family=t.v6)])
neighbor = t.ARPNeighbor(device="eth0", lladdr="02:00:00:00:00:09")
neighbor.toIPAddress.address = "fd00::1"
network.add_neighbors([neighbor])
assert "fd00::2/64" in ip("-6", "addr", "show", "eth0")
assert "default via fd00::1" in ip("-6", "route"), ip("-6", "route")
assert "02:00:00:00:00:09 PERMANENT" in ip("-6", "neigh")
"""
    )


def test_what_is_wrong_is_named() -> None:
    _in_namespace(
        """
def fails(call, *args):
    try:
        call(*args)
    except RpcError as error:
        return f"{error.code.name} {error.message}"
    raise AssertionError("it worked")
assert "no interface 'nope'" in fails(network.update_interface, t.Interface(name="nope"))
assert "loopback" in fails(network.update_interface, t.Interface(name="lo"))
assert "prefix" in fails(network.update_interface, t.Interface(
    name="x0", IPAddresses=[t.IPAddress(address="10.0.0.1", mask="33")]))
assert "IP address" in fails(network.update_interface, t.Interface(
    name="x0", IPAddresses=[t.IPAddress(address="x", mask="3")]))
assert "no network" in fails(roads.update_routes, [t.Route(dest="x", device="x0")])
assert "no interface" in fails(roads.update_routes, [t.Route(dest="10.0.0.0/8", device="no")])
text = fails(roads.update_routes, [t.Route(gateway="10.99.0.1", device="x0")])
assert text.startswith("FAILED_PRECONDITION route default via 10.99.0.1 dev x0: Network is"), text
assert "; try: a route to its gateway" in text, text
for wrong in ({"family": 5}, {"hops": 3}, {"dst": "10.0.0.0/99"}, {"metric": -1}, {"metrics": {"x": 1}}):
    assert fails(roads.update_routes, [], {"routes": [{**ROUTE, **wrong}]}).startswith("INVALID_ARGUMENT")
assert "a rule of the host is none" in fails(roads.update_routes, [], {"rules": [{"body": "xy", "text": ""}]})
"""
    )
