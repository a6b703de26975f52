"""The pod's network in the agent's messages.

What: `interface`, `routes` and `neighbors` translate a `Scan`; `tell` sends them.
Invariants: a card keeps its link's name, addresses, MTU; the guest finds it by its MAC address, and one that
has just been plugged by its PCI path. Which routes come first is the agent's matter. What Kata's messages
have no place for goes beside them, and only if there is something.
Source: Kata's types.proto.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from proto import types_pb2
from shim.resources.network.routes import beyond
from shim.resources.network.scan import Link, Scan

__all__ = ["NetworkAgent", "addresses", "interface", "neighbors", "routes", "tell"]

_IFF_NOARP = 0x80
_NUD_PERMANENT = 0x80


class NetworkAgent(Protocol):
    """What is asked of the agent: a part of `shim.sandbox.agent_client.GuestAgent`."""

    async def update_interface(self, interface: types_pb2.Interface, beyond: Mapping[str, Any]) -> None: ...
    async def update_routes(self, routes: Sequence[types_pb2.Route], beyond: Mapping[str, Any]) -> None: ...
    async def add_arp_neighbors(self, neighbors: Sequence[types_pb2.ARPNeighbor]) -> None: ...


async def tell(agent: NetworkAgent, cards: Sequence[tuple[Link, str]], scan: Scan) -> None:
    """`cards`: those that the guest does not know yet, with their PCI paths. Raises KataError."""
    for link, path in cards:
        await agent.update_interface(interface(link, path), addresses(link))
    await agent.update_routes(routes(scan), beyond(scan.routes, scan.rules))
    if found := neighbors(scan):
        await agent.add_arp_neighbors(found)


def interface(link: Link, path: str) -> types_pb2.Interface:
    """`path`: its PCI path in the guest, "" where it has none."""
    return types_pb2.Interface(
        device=link.name,
        name=link.name,
        IPAddresses=[
            types_pb2.IPAddress(family=_family(one.family), address=one.address, mask=str(one.prefix))
            for one in link.addresses
        ],
        mtu=link.mtu,
        hwAddr=link.mac,
        devicePath=path,
        raw_flags=link.flags & _IFF_NOARP,
    )


def addresses(link: Link) -> dict[str, Any]:
    """What Kata's message does not say of the link's addresses; {} for nothing."""
    more = {
        one.address: {"peer": one.peer, "scope": one.scope, "noprefixroute": one.noprefixroute}
        for one in link.addresses
        if one.peer or one.scope or one.noprefixroute
    }
    return {"addresses": more} if more else {}


def routes(scan: Scan) -> list[types_pb2.Route]:
    """Those that Kata's message can say, of several that differ by their metrics the best one last: an agent
    that is told no metrics keeps that one."""
    return [
        types_pb2.Route(
            dest=route.destination,
            gateway=hop.gateway,
            device=hop.link,
            source=route.source,
            scope=route.scope,
            family=_family(route.family),
            flags=hop.flags,
            mtu=route.mtu,
        )
        for route in sorted(scan.routes, key=lambda route: -route.metric)
        if replace(route, metric=0).plain
        for hop in route.hops
    ]


def neighbors(scan: Scan) -> list[types_pb2.ARPNeighbor]:
    """Permanent ones."""
    return [
        types_pb2.ARPNeighbor(
            toIPAddress=types_pb2.IPAddress(family=_family(one.family), address=one.address),
            device=one.link,
            lladdr=one.mac,
            state=_NUD_PERMANENT,
        )
        for one in scan.neighbors
    ]


def _family(family: int) -> types_pb2.IPFamily.ValueType:
    return types_pb2.v6 if family == socket.AF_INET6 else types_pb2.v4
