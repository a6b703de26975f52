"""The routes and rules of a pod's network namespace, and what the guest is told of them.

What: `read` gets those that somebody set, of every table and kind; `beyond` says the same as JSON for our
agent, if Kata's messages have no place for a part of it.
Why not the main table alone: two default routes differ by their metrics, a pod with several networks finds
the right one by rules and further tables (CNI's `sbr`), and CNI 1.1 lets every plugin set them.
Invariants: reading only. Routes that the kernel makes for an address the guest's kernel makes as well; what
leads through a link that is no card of the VM, or by a kind of tunnel that the agent cannot be told of, is
left out with a line in the log. More than `MOST` of anything is an error: a guest could not be told in time.
Source: rtnetlink(7), linux/rtnetlink.h, linux/fib_rules.h; docs/network.md.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from devices.errors import HostError
from shim.resources.network.rtnl import RTM_GETROUTE, RTM_GETRULE, Rtnl, TooMany, attributes

__all__ = ["MOST", "RTAX_MTU", "Hop", "Route", "Rule", "beyond", "read", "too_many"]

MOST = 1024
"""Routes, and rules, of a pod, of each family."""

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_rtmsg = struct.Struct("BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
_rtnh = struct.Struct("HBBi")  # length, flags, hops, index
_rule = struct.Struct("BBBBBBBBI")  # family, dst, src, tos, table, -, -, action, flags
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 2, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA, _RTA_ENCAP = 8, 9, 15, 18, 22
_RTAX_NUMBERS = frozenset(range(1, 16))  # beyond them stands the name of a congestion control
RTAX_MTU = 2
_RT_TABLE_MAIN, _RTPROT_KERNEL, _RTN_UNICAST = 254, 2, 1
_NOWHERE = frozenset({6, 7, 8, 9})  # blackhole, unreachable, prohibit, throw
_KINDS = _NOWHERE | {_RTN_UNICAST, 2}  # 2: local
_RTM_F_CLONED = 0x200
_RTNH_F_ONLINK = 4
_IPV6_METRIC = 1024  # what the kernel gives a route of IPv6 that names none
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE = 1, 2, 3, 6, 10, 15
_FRA_OIFNAME, _FRA_PROTOCOL, _FRA_DPORT_RANGE = 17, 21, 24
_FIB_RULE_INVERT = 2

_log = structlog.get_logger("network")


@dataclass(frozen=True, slots=True)
class Hop:
    """One of a route's ways. `gateway` may be "", or of the other address family; `weight` counts from 0."""

    gateway: str
    link: str
    flags: int = 0
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """`destination` is "10.0.0.0/8", "" for the default; `source` may be ""; `scope`, `kind` (RTN_*) and
    `protocol` as the kernel has them, `metrics` as RTAX_* and value. `hops` are empty for blackhole and its
    like."""

    family: int
    destination: str
    hops: tuple[Hop, ...]
    source: str = ""
    scope: int = 0
    kind: int = _RTN_UNICAST
    table: int = _RT_TABLE_MAIN
    protocol: int = 3
    tos: int = 0
    metric: int = 0
    metrics: tuple[tuple[int, int], ...] = ()

    @property
    def mtu(self) -> int:
        """0 for none."""
        return dict(self.metrics).get(RTAX_MTU, 0)

    @property
    def plain(self) -> bool:
        """Whether Kata's message can say it."""
        return (
            len(self.hops) == 1
            and self.kind == _RTN_UNICAST
            and self.table == _RT_TABLE_MAIN
            and self.tos == self.metric == 0
            and dict(self.metrics).keys() <= {RTAX_MTU}
            and (
                not self.hops[0].gateway or (":" in self.hops[0].gateway) == (self.family == socket.AF_INET6)
            )
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """`body` is a struct fib_rule_hdr and its attributes, as the kernel takes them; `text` is for people."""

    body: bytes
    text: str


def read(rtnl: Rtnl, links: Mapping[int, str]) -> tuple[tuple[Route, ...], tuple[Rule, ...]]:
    """Of the namespace that `rtnl` is in. `links`: the indexes that the guest will have, loopback included.
    Raises OSError; HostError for more than `MOST`."""
    routes = []
    for family in _FAMILIES:
        for body in _dump(rtnl, "routes", RTM_GETROUTE, family, _is_somebodys):
            route = _route(body, links)
            if route is not None:
                routes.append(route)
    rules = []
    for family in _FAMILIES:
        for body in _dump(rtnl, "rules", RTM_GETRULE, family):
            rule = _read_rule(body)
            if rule is not None:
                rules.append(rule)
    return tuple(routes), tuple(rules)


def _dump(
    rtnl: Rtnl, what: str, kind: int, family: int, wanted: Callable[[bytes], bool] = lambda _: True
) -> list[bytes]:
    try:
        return rtnl.dump_plain(what, kind, family, wanted=wanted, most=MOST)
    except TooMany as error:
        raise too_many(error, what) from error


def too_many(error: TooMany, what: str) -> HostError:
    """What a pod is refused with whose namespace has more of something than the guest is told."""
    return HostError(
        f"the pod's network has more than {error.most} {what}",
        phase="network",
        hint="see what sets them; a pod with the host's network needs none of them in its VM",
        code="RESOURCE_EXHAUSTED",
    )


def _is_somebodys(route: bytes) -> bool:
    """Of a struct rtmsg: not the kernel's own, and no entry of its cache. rtnetlink(7)"""
    flags = int.from_bytes(route[8:12], sys.byteorder)
    return route[5] != _RTPROT_KERNEL and not flags & _RTM_F_CLONED


def beyond(routes: Sequence[Route], rules: Sequence[Rule]) -> dict[str, Any]:
    """What goes beside UpdateRoutes, for `agent/network/routes.py`; {} if its message says everything."""
    if not rules and all(route.plain for route in routes):
        return {}
    return {
        "routes": [
            {
                "family": 6 if route.family == socket.AF_INET6 else 4,
                "dst": route.destination,
                "type": route.kind,
                "table": route.table,
                "protocol": route.protocol,
                "scope": route.scope,
                "tos": route.tos,
                "metric": route.metric,
                "src": route.source,
                "metrics": {str(kind): value for kind, value in route.metrics},
                "hops": [
                    {"via": hop.gateway, "dev": hop.link, "flags": hop.flags, "weight": hop.weight}
                    for hop in route.hops
                ],
            }
            for route in routes
        ],
        "rules": [{"body": rule.body.hex(), "text": rule.text} for rule in rules],
    }


def _number(value: bytes | None, default: int = 0) -> int:
    return int.from_bytes(value, "little") if value else default


def _address(value: bytes | None) -> str:
    if not value or len(value) not in (4, 16):
        return ""
    return socket.inet_ntop(socket.AF_INET if len(value) == 4 else socket.AF_INET6, value)


def _gateway(have: Mapping[int, bytes]) -> str:
    via = have.get(_RTA_VIA, b"")
    return _address(have.get(_RTA_GATEWAY)) or _address(via[2:])


def _route(body: bytes, links: Mapping[int, str]) -> Route | None:
    family, prefix, source_prefix, tos, table, protocol, scope, kind, flags = _rtmsg.unpack_from(body)
    if protocol == _RTPROT_KERNEL or flags & _RTM_F_CLONED or family not in _FAMILIES:
        return None
    have = attributes(body[_rtmsg.size :])
    destination = _address(have.get(_RTA_DST))
    destination = f"{destination}/{prefix}" if destination else ""
    hops = _hops(have, flags)
    if kind not in _KINDS or _RTA_ENCAP in have or source_prefix or hops is None:
        _tell(destination, "it is of a kind that the guest's agent cannot be told")
        return None
    named = _named(hops, links)
    if any(not hop.link for hop in named):
        _tell(destination, "it leads through a link that is no card of the VM")
        return None
    if kind in _NOWHERE:
        named = ()  # those of IPv6 name loopback
    metric = _number(have.get(_RTA_PRIORITY))
    metrics = attributes(have.get(_RTA_METRICS, b""))
    return Route(
        family=family,
        destination=destination,
        hops=named,
        source=_address(have.get(_RTA_PREFSRC)),
        scope=scope,
        kind=kind,
        table=_number(have.get(_RTA_TABLE), table),
        protocol=protocol,
        tos=tos,
        metric=0 if family == socket.AF_INET6 and metric == _IPV6_METRIC else metric,
        metrics=tuple(
            (number, _number(value)) for number, value in sorted(metrics.items()) if number in _RTAX_NUMBERS
        ),
    )


def _tell(destination: str, why: str) -> None:
    _log.warning("a route that the guest does not get", destination=destination or "default", why=why)


def _hops(have: Mapping[int, bytes], flags: int) -> list[tuple[int, Hop]] | None:
    """The ways with the indexes of their links; None for what cannot be told."""
    if _RTA_MULTIPATH not in have:
        index = _number(have.get(_RTA_OIF))
        return [(index, Hop(_gateway(have), "", flags & _RTNH_F_ONLINK))] if index else []
    found = []
    data = have[_RTA_MULTIPATH]
    while len(data) >= _rtnh.size:
        length, flags, weight, index = _rtnh.unpack_from(data)
        if length < _rtnh.size:
            break
        inner = attributes(data[_rtnh.size : length])
        if _RTA_ENCAP in inner:
            return None
        found.append((index, Hop(_gateway(inner), "", flags & _RTNH_F_ONLINK, weight)))
        data = data[(length + 3) & ~3 :]
    return found


def _named(hops: Sequence[tuple[int, Hop]], links: Mapping[int, str]) -> tuple[Hop, ...]:
    return tuple(Hop(hop.gateway, links.get(index, ""), hop.flags, hop.weight) for index, hop in hops)


def _read_rule(body: bytes) -> Rule | None:
    """One that somebody set: those that every namespace has are the kernel's own."""
    family, dst, src, tos, table, res1, res2, action, flags = _rule.unpack_from(body)
    have = attributes(body[_rule.size :])
    if _number(have.get(_FRA_PROTOCOL)) == _RTPROT_KERNEL:
        return None
    words = [f"{_number(have.get(_FRA_PRIORITY))}:"]
    words += ["not"] if flags & _FIB_RULE_INVERT else []
    words.append(f"from {_address(have[_FRA_SRC])}/{src}" if _FRA_SRC in have else "from all")
    words += [f"to {_address(have[_FRA_DST])}/{dst}"] if _FRA_DST in have else []
    words += [f"fwmark {_number(have[_FRA_FWMARK]):#x}"] if _FRA_FWMARK in have else []
    for word, kind in (("iif", _FRA_IIFNAME), ("oif", _FRA_OIFNAME)):
        words += (
            [f"{word} {have[kind].rstrip(chr(0).encode()).decode(errors='replace')}"] if kind in have else []
        )
    words.append(f"lookup {_number(have.get(_FRA_TABLE), table)}")
    text = " ".join(words)
    if any(kind > _FRA_DPORT_RANGE for kind in have):  # to a kernel that does not know it, it would say less
        _log.warning("a rule that the guest does not get", rule=text, why="it is of a newer kind")
        return None
    head = _rule.pack(family, dst, src, tos, table, res1, res2, action, flags & _FIB_RULE_INVERT)
    return Rule(head + body[_rule.size :], text)
