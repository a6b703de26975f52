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
from proto import types_pb2 as t
from ttrpc import RpcError
def ip(*args): return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout
for name, mac in (("x0", "02:00:00:00:00:01"), ("x1", "02:00:00:00:00:02")):
    ip("link", "add", name, "address", mac, "type", "veth")
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
wanted = [
    t.Route(dest="", gateway="10.9.0.1", device="eth0"),
    t.Route(dest="10.9.0.0/24", device="eth0", scope=253),
]
for _ in range(2):
    network.update_routes(wanted)
text = ip("route")
assert "default via 10.9.0.1 dev eth0" in text and "10.9.0.0/24 dev eth0" in text, text
assert "10.77" not in text and "10.1.0.0/24 dev eth0 proto kernel" in text, text
listed = network.list_routes()
assert any(r.gateway == "10.9.0.1" and r.dest == "" for r in listed), listed
"""
    )


def test_ipv6_and_neighbours() -> None:
    _in_namespace(
        """
wanted = t.Interface(name="eth0", hwAddr="02:00:00:00:00:01")
wanted.IPAddresses.add(family=t.v6, address="fd00::2", mask="64")
network.update_interface(wanted)
network.update_routes([t.Route(dest="::/0", gateway="fd00::1", device="eth0", family=t.v6)])
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
assert "no network" in fails(network.update_routes, [t.Route(dest="x", device="x0")])
assert "no interface" in fails(network.update_routes, [t.Route(dest="10.0.0.0/8", device="no")])
assert "route:" in fails(network.update_routes, [t.Route(gateway="10.99.0.1", device="x0")])
"""
    )
