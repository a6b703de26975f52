"""The guest's routes and rules, as the host wants them: every table, kind and metric.

What: `update_routes` sets the host's routes and rules in place of those that it set before; `list_routes`.
Why two forms: Kata's Route has a destination, a gateway and a link. What a pod's namespace can have beyond
(metrics, tables, several ways, rules, ...) comes as JSON beside the message (`agent.fit.beyond`), and then
holds for all of them.
Invariants: what the host did not set is not touched: routes that a container made, or the kernel. Routes
without a gateway come before those that need them, else the order is the host's: of two equal ones the first
counts. An error names the route in the words of ip-route(8).
Source: rtnetlink(7), ip-route(8), ip-rule(8), linux/rtnetlink.h, linux/fib_rules.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from agent.fit import NOTHING
from agent.network import rtnetlink as nl
from agent.network.links import bad, family_of, ip_text, links, pack_ip, pack_network
from proto import types_pb2
from ttrpc import Code, RpcError

__all__ = ["list_routes", "update_routes"]

_rtmsg = struct.Struct("BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
_rtnh = struct.Struct("HBBi")  # length, flags, hops, index
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 8, 9, 15, 18
_RTAX_MTU = 2
_RT_TABLE_UNSPEC, _RT_TABLE_MAIN = 0, 254
_RTPROT_BOOT = 3
_RTN_UNICAST = 1
_KINDS = {
    1: "",
    2: "local ",
    3: "broadcast ",
    6: "blackhole ",
    7: "unreachable ",
    8: "prohibit ",
    9: "throw ",
}
_RTNH_F_ONLINK = 4
_ROUTES_MAX = 8192  # and as many rules; a host that sends more is no host of ours
_HINTS = {
    errno.ENETUNREACH: "a route to its gateway must come with it",
    errno.EHOSTUNREACH: "a route to its gateway must come with it",
    errno.EINVAL: "see whether the guest's kernel can do it",
    errno.EOPNOTSUPP: "the guest's kernel cannot do it",
}

# What the host set last, so that it is taken away when it changes its mind. One agent, one host.
_routes: list[bytes] = []
_rules: list[bytes] = []


class _Hop(NamedTuple):
    """One of a route's ways: a gateway, which may be of the other address family, and a link; "" for none."""

    via: str
    dev: str
    flags: int
    weight: int


class _Route(NamedTuple):
    """A route in full; `hops` is empty for those that lead nowhere, such as blackhole."""

    family: int
    dst: str
    kind: int
    table: int
    protocol: int
    scope: int
    tos: int
    metric: int
    src: str
    metrics: tuple[tuple[int, int], ...]
    hops: tuple[_Hop, ...]

    def __str__(self) -> str:
        words = [f"{_KINDS.get(self.kind, '')}{self.dst[:80] or 'default'}"]
        for hop in self.hops:
            nexthop = ["nexthop"] if len(self.hops) > 1 else []
            way = [f"via {hop.via[:60]}"] if hop.via else []
            words += [*nexthop, *way, *([f"dev {hop.dev[:20]}"] if hop.dev else [])]
        for name, value in (("src", self.src[:60]), ("metric", self.metric)):
            words += [f"{name} {value}"] if value else []
        words += [f"table {self.table}"] if self.table != _RT_TABLE_MAIN else []
        return " ".join(words)


def _plain(route: types_pb2.Route) -> _Route:
    """Kata's message."""
    family = int(socket.AF_INET6 if route.family == types_pb2.v6 else socket.AF_INET)
    dst = "" if route.dest in ("default", "0.0.0.0/0", "::/0") else route.dest
    if dst:
        family = pack_network(dst)[0]
    return _Route(
        family,
        dst,
        _RTN_UNICAST,
        _RT_TABLE_MAIN,
        _RTPROT_BOOT,
        route.scope & 0xFF,
        0,
        0,
        route.source.partition("/")[0],
        ((_RTAX_MTU, route.mtu),) if route.mtu else (),
        (_Hop(route.gateway.partition("/")[0], route.device, route.flags & _RTNH_F_ONLINK, 0),),
    )


def _full(entry: Any) -> _Route:
    """One of the JSON's. Raises INVALID_ARGUMENT."""
    try:
        return _Route(
            family={4: socket.AF_INET, 6: socket.AF_INET6}[entry["family"]],
            dst=str(entry["dst"]),
            kind=_number(entry["type"], 0xFF),
            table=_number(entry["table"]),
            protocol=_number(entry["protocol"], 0xFF),
            scope=_number(entry["scope"], 0xFF),
            tos=_number(entry["tos"], 0xFF),
            metric=_number(entry["metric"]),
            src=str(entry["src"]),
            metrics=tuple(
                (_number(int(kind), 63), _number(value)) for kind, value in entry["metrics"].items()
            ),
            hops=tuple(_full_hop(hop) for hop in entry["hops"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad(f"a route of the host is none: {type(error).__name__} {error}") from None


def _full_hop(hop: Any) -> _Hop:
    return _Hop(
        str(hop["via"]), str(hop["dev"]), _number(hop["flags"]) & _RTNH_F_ONLINK, _number(hop["weight"], 255)
    )


def _number(value: Any, most: int = 0xFFFFFFFF) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:20]} is not from 0 to {most}")
    return value


def update_routes(wanted: Iterable[types_pb2.Route], beyond: Mapping[str, Any] = NOTHING) -> None:
    """UpdateRoutes: these instead of what an earlier call set. `beyond`: `routes`, all of them in full, and
    `rules`, each a `body` for the kernel in hexadecimal and a `text` for people.

    Raises RpcError, with the earlier ones gone and a part of the new ones set.
    """
    entries = beyond.get("routes")
    rules = beyond.get("rules") or []
    routes = (
        [_plain(route) for route in wanted]
        if entries is None
        else [_full(one) for one in entries[:_ROUTES_MAX]]
    )
    with nl.Netlink() as netlink:
        names = {link.name: link.number for link in links(netlink)}
        for sent, kind in ((_routes, nl.RTM_DELROUTE), (_rules, nl.RTM_DELRULE)):
            while sent:
                _forget(netlink, kind, sent.pop())
        for route in sorted(routes, key=lambda route: any(hop.via for hop in route.hops)):
            # Appended: of two that differ in their ways only, each is one more of them.
            _set(netlink, nl.RTM_NEWROUTE, nl.NLM_F_APPEND, _packed(route, names), _routes, f"route {route}")
        for rule in rules[:_ROUTES_MAX]:
            try:
                body, text = bytes.fromhex(rule["body"]), str(rule["text"])[:200]
            except (KeyError, TypeError, ValueError) as error:
                raise bad(f"a rule of the host is none: {error}") from None
            _set(netlink, nl.RTM_NEWRULE, nl.NLM_F_EXCL, body, _rules, f"rule {text}")


def _forget(netlink: nl.Netlink, kind: int, body: bytes) -> None:
    try:
        netlink.ask(kind, 0, body)
    except OSError as error:  # its link has gone, or somebody in the guest removed it
        if error.errno not in (errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL):
            raise RpcError(Code.INTERNAL, f"a route of before: {error.strerror}") from None


def _set(netlink: nl.Netlink, kind: int, flags: int, body: bytes, sent: list[bytes], what: str) -> None:
    try:
        netlink.ask(kind, nl.NLM_F_CREATE | flags, body)
    except OSError as error:
        number = error.errno or 0
        if number == errno.EEXIST:  # the kernel made the same of an address, or the host says it twice
            return
        hint = f"; try: {_HINTS[number]}" if number in _HINTS else ""
        raise RpcError(Code.FAILED_PRECONDITION, f"{what}: {os.strerror(number)}{hint}") from None
    sent.append(body)


def _packed(route: _Route, names: Mapping[str, int]) -> bytes:
    prefix, tail = 0, b""
    if route.dst:
        family, packed, prefix = pack_network(route.dst)
        if family != route.family:
            raise bad(f"route {route} mixes address families")
        tail += nl.attribute(_RTA_DST, packed)
    if route.src:
        family, packed = pack_ip(route.src)
        if family != route.family:
            raise bad(f"route {route} mixes address families")
        tail += nl.attribute(_RTA_PREFSRC, packed)
    tail += nl.attribute(_RTA_TABLE, route.table)
    if route.metric:
        tail += nl.attribute(_RTA_PRIORITY, route.metric)
    if route.metrics:
        values = b"".join(nl.attribute(kind, value) for kind, value in route.metrics)
        tail += nl.attribute(_RTA_METRICS, values)
    flags = 0
    if len(route.hops) == 1:
        (hop,) = route.hops
        flags = hop.flags
        tail += nl.attribute(_RTA_OIF, _index(hop, names)) + _gateway(hop, route)
    elif route.hops:
        ways = b""
        for hop in route.hops:
            way = _gateway(hop, route)
            ways += _rtnh.pack(_rtnh.size + len(way), hop.flags, hop.weight, _index(hop, names)) + way
        tail += nl.attribute(_RTA_MULTIPATH, ways)
    table = route.table if route.table < 256 else _RT_TABLE_UNSPEC
    head = _rtmsg.pack(
        route.family, prefix, 0, route.tos, table, route.protocol, route.scope, route.kind, flags
    )
    return head + tail


def _index(hop: _Hop, names: Mapping[str, int]) -> int:
    if hop.dev not in names:
        raise RpcError(Code.NOT_FOUND, f"the guest has no interface {hop.dev[:40]!r}")
    return names[hop.dev]


def _gateway(hop: _Hop, route: _Route) -> bytes:
    if not hop.via:
        return b""
    family, packed = pack_ip(hop.via)
    if family == route.family:
        return nl.attribute(_RTA_GATEWAY, packed)
    if route.family != socket.AF_INET:
        raise bad(f"route {route} mixes address families")
    return nl.attribute(_RTA_VIA, struct.pack("H", family) + packed)  # IPv4 by way of an IPv6 neighbour


def list_routes() -> list[types_pb2.Route]:
    """ListRoutes: the main table's unicast routes of both families."""
    with nl.Netlink() as netlink:
        names = {link.number: link.name for link in links(netlink)}
        messages = netlink.ask(nl.RTM_GETROUTE, nl.NLM_F_DUMP, _rtmsg.pack(*([0] * 9)))
    result = []
    for message, body in messages:
        family, prefix, _, _, table, _, scope, kind, flags = _rtmsg.unpack_from(body)
        if message != nl.RTM_NEWROUTE or table != _RT_TABLE_MAIN or kind != _RTN_UNICAST:
            continue
        have = nl.attributes(body[_rtmsg.size :])
        (index,) = struct.unpack("i", have.get(_RTA_OIF, bytes(4)))
        route = types_pb2.Route(
            device=names.get(index, ""), scope=scope, family=family_of(family), flags=flags
        )
        if _RTA_DST in have:
            route.dest = f"{ip_text(have[_RTA_DST])}/{prefix}"
        if _RTA_GATEWAY in have:
            route.gateway = ip_text(have[_RTA_GATEWAY])
        if _RTA_PREFSRC in have:
            route.source = ip_text(have[_RTA_PREFSRC])
        result.append(route)
    return result
