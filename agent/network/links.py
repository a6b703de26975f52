"""The guest's links, and addresses as text and as bytes: what interfaces and routes both need.

Invariants: a text that is no address, network or link is an RpcError that shows it, cut.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from agent.network import rtnetlink as nl
from proto import types_pb2
from ttrpc import Code, RpcError

__all__ = ["Link", "bad", "family_of", "ifinfo", "ip_text", "links", "named", "pack_ip", "pack_network"]

ifinfo = struct.Struct("BxHiII")  # family, type, index, flags, change
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4


class Link(NamedTuple):
    """One of the guest's."""

    number: int  # IFLA's index
    name: str
    mac: str
    mtu: int
    flags: int


def bad(what: str) -> RpcError:
    """What the host asked for makes no sense."""
    return RpcError(Code.INVALID_ARGUMENT, what)


def links(netlink: nl.Netlink) -> list[Link]:
    """All of them. Raises OSError."""
    found = []
    for kind, body in netlink.ask(nl.RTM_GETLINK, nl.NLM_F_DUMP, ifinfo.pack(0, 0, 0, 0, 0)):
        if kind != nl.RTM_NEWLINK:
            continue
        _, _, index, flags, _ = ifinfo.unpack_from(body)
        have = nl.attributes(body[ifinfo.size :])
        (mtu,) = struct.unpack("I", have.get(_IFLA_MTU, bytes(4)))
        mac = have.get(_IFLA_ADDRESS, b"").hex(":")
        found.append(Link(index, nl.text(have.get(_IFLA_IFNAME, b"")), mac, mtu, flags))
    return found


def named(present: Iterable[Link], name: str) -> Link:
    """Raises NOT_FOUND."""
    for link in present:
        if link.name == name:
            return link
    raise RpcError(Code.NOT_FOUND, f"the guest has no interface {name[:40]!r}")


def pack_ip(address: str) -> tuple[int, bytes]:
    """(family, bytes)"""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return family, socket.inet_pton(family, address)
    except (OSError, ValueError):  # of what is none, of what has a NUL byte or is no ASCII
        raise bad(f"{address[:80]!r} is no IP address") from None


def ip_text(packed: bytes) -> str:
    """The address of four or sixteen bytes."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def pack_network(network: str) -> tuple[int, bytes, int]:
    """(family, bytes, prefix length) of "10.0.0.0/8", without the bits of a host."""
    address, _, prefix = network.partition("/")
    try:
        family, packed = pack_ip(address)
        bits = len(packed) * 8
        length = int(prefix[:9]) if prefix else bits
        if not 0 <= length <= bits:
            raise ValueError
    except (RpcError, ValueError):
        raise bad(f"{network[:80]!r} is no network") from None
    kept = int.from_bytes(packed, "big") >> (bits - length) << (bits - length)
    return family, kept.to_bytes(len(packed), "big"), length


def family_of(family: int) -> types_pb2.IPFamily.ValueType:
    """AF_INET or AF_INET6 in the agent's messages."""
    return types_pb2.v4 if family == socket.AF_INET else types_pb2.v6
