"""The pod's network in the agent's messages.

What: `interface`, `routes` and `neighbors` translate a `Scan`; `tell` sends them.
Invariants: a card keeps its link's name, address, MTU; the guest finds it by its MAC address, and one that
has just been plugged by its PCI path. Which routes come first is the agent's matter.
Source: Kata's types.proto.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

from proto import types_pb2
from shim.resources.network.scan import Link, Scan

__all__ = ["NetworkAgent", "interface", "neighbors", "routes", "tell"]

_IFF_NOARP = 0x80
_NUD_PERMANENT = 0x80


class NetworkAgent(Protocol):
    """What is asked of the agent: a part of `shim.sandbox.agent_client.GuestAgent`."""

    async def update_interface(self, interface: types_pb2.Interface) -> None: ...
    async def update_routes(self, routes: Sequence[types_pb2.Route]) -> None: ...
    async def add_arp_neighbors(self, neighbors: Sequence[types_pb2.ARPNeighbor]) -> None: ...


async def tell(agent: NetworkAgent, cards: Sequence[tuple[Link, str]], scan: Scan) -> None:
    """`cards`: those that the guest does not know yet, with their PCI paths. Raises KataError."""
    for link, path in cards:
        await agent.update_interface(interface(link, path))
    await agent.update_routes(routes(scan))
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


def routes(scan: Scan) -> list[types_pb2.Route]:
    """All of them: the agent replaces what it had."""
    return [
        types_pb2.Route(
            dest=route.destination,
            gateway=route.gateway,
            device=route.link,
            source=route.source,
            scope=route.scope,
            family=_family(route.family),
            flags=route.flags,
            mtu=route.mtu,
        )
        for route in scan.routes
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
