"""What a pod's network namespace holds: the links that become cards, and what the guest is told of each.

What: `scan` reads the namespace of the calling thread.
Why all of it at once: the cards are made before the VM starts and the guest hears of addresses and routes
afterwards, when the namespace's own are shadowed by what was joined to the VM.
Invariants: reading only. A link counts if somebody gave it an address (the link-local one that the kernel
makes says nothing, and the guest's kernel makes the same) and is no loopback; one of a kind that cannot be
joined to a VM is an error that names it, since the pod would be without it and not know why. Our own taps
are none of the pod's links. Routes and rules are `shim.resources.network.routes`' matter. Of each there is a
most (`MOST`): a namespace with more is refused by that name, since a pod without some of its routes would
not know why.
Source: rtnetlink(7); Kata's choice (facts/kata.md 1.6).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from devices.errors import HostError
from shim.resources.network import routes as routing
from shim.resources.network.netns import OURS, names
from shim.resources.network.routes import Route, Rule, read, too_many
from shim.resources.network.rtnl import RTM_GETADDR, RTM_GETLINK, RTM_GETNEIGH, Rtnl, TooMany

__all__ = ["MOST", "Address", "Link", "Neighbor", "Scan", "scan"]

_log = structlog.get_logger("network")

MOST = {"links": 1024, "addresses": 1024, "routes": routing.MOST, "permanent neighbours": 1024}
"""Of a namespace, routes and rules of each family. 100,000 took 19 s and 345 MiB, at each look."""
_KINDS = frozenset({"veth", "macvlan"})
_IFF_LOOPBACK = 0x8
_RT_SCOPE_LINK = 253
_IFA_F_NOPREFIXROUTE = 0x200
_NUD_PERMANENT = 0x80


@dataclass(frozen=True, slots=True)
class Address:
    """`family` is AF_INET or AF_INET6. `peer`: the address at the other end, whose prefix it is then, or "".
    `scope` as the kernel has it; `noprefixroute`: the kernel makes no route for the prefix."""

    family: int
    address: str
    prefix: int
    peer: str = ""
    scope: int = 0
    noprefixroute: bool = False


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A permanent one."""

    family: int
    address: str
    mac: str
    link: str


@dataclass(frozen=True, slots=True)
class Link:
    """One that becomes a card. `kind` is the kernel's word for it."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    flags: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """`names`: of all links but loopback and our own, those that do not count too."""

    links: tuple[Link, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    names: frozenset[str] = field(default_factory=frozenset)
    rules: tuple[Rule, ...] = ()


def scan() -> Scan:
    """Of the calling thread's namespace. Raises HostError for a link that no VM can be given, OSError."""
    present = names()
    if not present:
        return Scan()
    with Rtnl() as rtnl:
        addresses: dict[int, list[Address]] = {}
        for message in _dump(rtnl, "addresses", "ifaddrmsg", RTM_GETADDR):
            if not (message["family"] == socket.AF_INET6 and message["scope"] == _RT_SCOPE_LINK):
                addresses.setdefault(message["index"], []).append(_address(message))
        links = []
        for message in _dump(rtnl, "links", "ifinfmsg", RTM_GETLINK):
            link = _link(message, tuple(addresses.get(message["index"], ())))
            if link is not None:
                links.append(link)
        if not links:
            return Scan(names=present)
        by_index = {link.index: link.name for link in links}
        loopback = socket.if_nametoindex("lo")
        routes, rules = read(rtnl, {loopback: "lo", **by_index})
        neighbors = [
            Neighbor(
                message["family"],
                message.get_attr("NDA_DST"),
                message.get_attr("NDA_LLADDR"),
                by_index[message["ifindex"]],
            )
            for message in _dump(rtnl, "permanent neighbours", "ndmsg", RTM_GETNEIGH, _is_permanent)
            if message["ifindex"] in by_index
            and message.get_attr("NDA_DST")
            and message.get_attr("NDA_LLADDR")
        ]
    return Scan(tuple(links), routes, tuple(neighbors), present, rules)


def _dump(
    rtnl: Rtnl, what: str, name: str, kind: int, wanted: Callable[[bytes], bool] = lambda _: True
) -> list[Any]:
    """All of what the namespace has and is `wanted`. Raises HostError if that is more than the most."""
    try:
        return rtnl.dump(name, kind, wanted=wanted, most=MOST[what])
    except TooMany as error:
        raise too_many(error, what) from error


def _is_permanent(neighbor: bytes) -> bool:
    """Of a struct ndmsg."""
    return bool(int.from_bytes(neighbor[8:10], sys.byteorder) & _NUD_PERMANENT)


def _address(message: Any) -> Address:
    """IPv4 names the peer always, be it the address itself; IPv6 names the own one only if there is one."""
    local, address = message.get_attr("IFA_LOCAL"), message.get_attr("IFA_ADDRESS")
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    return Address(
        message["family"],
        local or address,
        message["prefixlen"],
        peer=address if local and address and local != address else "",
        scope=message["scope"],
        noprefixroute=bool(flags & _IFA_F_NOPREFIXROUTE),
    )


def _link(message: Any, addresses: tuple[Address, ...]) -> Link | None:
    name = str(message.get_attr("IFLA_IFNAME"))
    if message["flags"] & _IFF_LOOPBACK or name.endswith(OURS):
        return None
    info = message.get_attr("IFLA_LINKINFO")
    kind = str((info and info.get_attr("IFLA_INFO_KIND")) or "device")
    if not addresses:
        _log.debug("a link without an address is left out", link=name, kind=kind)
        return None
    if kind not in _KINDS:
        raise HostError(
            f"the pod's link {name} is of kind {kind!r}, which cannot be joined to a VM",
            phase="network",
            hint=f"use a CNI plugin that makes {' or '.join(sorted(_KINDS))} links",
        )
    return Link(
        index=message["index"],
        name=name,
        kind=kind,
        mac=str(message.get_attr("IFLA_ADDRESS")),
        mtu=int(message.get_attr("IFLA_MTU")),
        flags=message["flags"],
        addresses=addresses,
    )
