"""The guest's links, addresses, routes and neighbours, as the host wants them.

What: the agent's network RPCs over `agent.network.rtnetlink`.
Why replace and not add: the host sends the whole wanted state, and may send it again.
Invariants: a link is found by its MAC address (the host cannot know the guest's names); loopback is
never touched; routes without a gateway come before those that need them.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from agent.network import rtnetlink as nl
from proto import types_pb2
from ttrpc import Code, RpcError

__all__ = ["add_neighbors", "list_interfaces", "list_routes", "update_interface", "update_routes"]

_ifinfo = struct.Struct("BxHiII")  # family, type, index, flags, change
_ifaddr = struct.Struct("BBBBi")  # family, prefix length, flags, scope, index
_rtmsg = struct.Struct("BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
_ndmsg = struct.Struct("BxxxiHBB")  # family, index, state, flags, type

_IFF_UP = 1
_IFA_F_NODAD = 2
_IFF_NOARP = 0x80
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_METRICS = 1, 4, 5, 7, 8
_RTAX_MTU = 2
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80
_RT_TABLE_MAIN = 254
_RTPROT_KERNEL, _RTPROT_BOOT = 2, 3
_RTN_UNICAST = 1
_RTNH_F_ONLINK = 4
_ADDRESSES_MAX = 256


class _Link(NamedTuple):
    number: int  # IFLA's index
    name: str
    mac: str
    mtu: int
    flags: int


def _bad(what: str) -> RpcError:
    return RpcError(Code.INVALID_ARGUMENT, what)


def _links(netlink: nl.Netlink) -> list[_Link]:
    found = []
    for kind, body in netlink.ask(nl.RTM_GETLINK, nl.NLM_F_DUMP, _ifinfo.pack(0, 0, 0, 0, 0)):
        if kind != nl.RTM_NEWLINK:
            continue
        _, _, index, flags, _ = _ifinfo.unpack_from(body)
        have = nl.attributes(body[_ifinfo.size :])
        (mtu,) = struct.unpack("I", have.get(_IFLA_MTU, bytes(4)))
        mac = have.get(_IFLA_ADDRESS, b"").hex(":")
        found.append(_Link(index, nl.text(have.get(_IFLA_IFNAME, b"")), mac, mtu, flags))
    return found


def _named(links: Iterable[_Link], name: str) -> _Link:
    for link in links:
        if link.name == name:
            return link
    raise RpcError(Code.NOT_FOUND, f"the guest has no interface {name[:40]!r}")


def _pack_ip(address: str) -> tuple[int, bytes]:
    """(family, bytes)"""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return family, socket.inet_pton(family, address)
    except (OSError, ValueError):  # of what is none, of what has a NUL byte or is no ASCII
        raise _bad(f"{address[:80]!r} is no IP address") from None


def _ip(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _pack_network(network: str) -> tuple[int, bytes, int]:
    """(family, bytes, prefix length) of "10.0.0.0/8", without the bits of a host."""
    address, _, prefix = network.partition("/")
    try:
        family, packed = _pack_ip(address)
        bits = len(packed) * 8
        length = int(prefix[:9]) if prefix else bits
        if not 0 <= length <= bits:
            raise ValueError
    except (RpcError, ValueError):
        raise _bad(f"{network[:80]!r} is no network") from None
    kept = int.from_bytes(packed, "big") >> (bits - length) << (bits - length)
    return family, kept.to_bytes(len(packed), "big"), length


def _family(family: int) -> types_pb2.IPFamily.ValueType:
    return types_pb2.v4 if family == socket.AF_INET else types_pb2.v6


def _addresses(netlink: nl.Netlink) -> list[tuple[int, int, bytes, int]]:
    """(link index, family, address, prefix length) of every address."""
    found = []
    for kind, body in netlink.ask(nl.RTM_GETADDR, nl.NLM_F_DUMP, _ifaddr.pack(0, 0, 0, 0, 0)):
        if kind != nl.RTM_NEWADDR:
            continue
        family, prefix, _, _, index = _ifaddr.unpack_from(body)
        have = nl.attributes(body[_ifaddr.size :])
        found.append((index, family, have.get(_IFA_LOCAL) or have.get(_IFA_ADDRESS, b""), prefix))
    return found


def list_interfaces() -> list[types_pb2.Interface]:
    """ListInterfaces."""
    with nl.Netlink() as netlink:
        links = _links(netlink)
        addresses = _addresses(netlink)
    result = []
    for link in links:
        interface = types_pb2.Interface(device=link.name, name=link.name, mtu=link.mtu, hwAddr=link.mac)
        for index, family, packed, prefix in addresses:
            if index == link.number:
                address = _ip(packed)
                interface.IPAddresses.add(family=_family(family), address=address, mask=str(prefix))
        result.append(interface)
    return result


def update_interface(wanted: types_pb2.Interface) -> None:
    """UpdateInterface: find the link by MAC (else by name), rename, address, set MTU, raise it."""
    with nl.Netlink() as netlink:
        try:
            _update_interface(netlink, wanted)
        except OSError as error:
            raise RpcError(Code.INTERNAL, f"interface {wanted.name[:40]}: {error.strerror}") from None


def _update_interface(netlink: nl.Netlink, wanted: types_pb2.Interface) -> None:
    links = _links(netlink)
    mac = wanted.hwAddr.lower()
    link = next((link for link in links if mac and link.mac == mac), None)
    if link is None:
        link = _named(links, wanted.name or wanted.device)
    if link.name == "lo":
        raise _bad("the loopback interface is not the host's to change")
    change = b""
    if mac and link.mac != mac:
        try:
            change += nl.attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        except ValueError:
            raise _bad(f"{mac[:40]!r} is no MAC address") from None
    if wanted.mtu:
        change += nl.attribute(_IFLA_MTU, wanted.mtu)
    if wanted.name and wanted.name != link.name:
        if not 0 < len(wanted.name.encode()) < 16 or "/" in wanted.name:
            raise _bad(f"{wanted.name[:40]!r} is no interface name")
        if any(other.name == wanted.name for other in links):
            _make_room(netlink, links, wanted.name)
        if link.flags & _IFF_UP:
            _set_link(netlink, link.number, 0, b"")  # a link that is up cannot be renamed
        change += nl.attribute(_IFLA_IFNAME, wanted.name)
    _set_link(netlink, link.number, 0 if change else _IFF_UP, change)
    _replace_addresses(netlink, link.number, wanted.IPAddresses)
    _set_link(netlink, link.number, _IFF_UP | (wanted.raw_flags & _IFF_NOARP), b"")


def _set_link(netlink: nl.Netlink, index: int, flags: int, change: bytes) -> None:
    body = _ifinfo.pack(0, 0, index, flags, _IFF_UP | _IFF_NOARP) + change
    netlink.ask(nl.RTM_NEWLINK, 0, body)


def _make_room(netlink: nl.Netlink, links: list[_Link], name: str) -> None:
    """Another link has the name (eth0 and eth1 arrive in any order): move it aside."""
    other = _named(links, name)
    taken = {link.name for link in links}
    aside = next(f"kata{number}" for number in range(len(links) + 1) if f"kata{number}" not in taken)
    _set_link(netlink, other.number, 0, nl.attribute(_IFLA_IFNAME, aside))


def _replace_addresses(netlink: nl.Netlink, index: int, wanted: Iterable[types_pb2.IPAddress]) -> None:
    keep = set()
    for address in list(wanted)[:_ADDRESSES_MAX]:
        family, packed = _pack_ip(address.address)
        if not address.mask.isdigit() or int(address.mask) > len(packed) * 8:
            raise _bad(f"{address.mask[:40]!r} is no prefix length")
        keep.add((family, packed, int(address.mask)))
    for at, family, packed, prefix in _addresses(netlink):
        known = (family, packed, prefix)
        link_local = family == socket.AF_INET6 and packed.startswith(b"\xfe\x80")
        if at == index and known not in keep and not link_local:
            body = _ifaddr.pack(family, prefix, 0, 0, index) + nl.attribute(_IFA_LOCAL, packed)
            netlink.ask(nl.RTM_DELADDR, 0, body)
    for family, packed, prefix in keep:
        # Whoever gave the address has seen to it that it is nobody else's; it is to serve at once.
        flags = _IFA_F_NODAD if family == socket.AF_INET6 else 0
        body = _ifaddr.pack(family, prefix, flags, 0, index)
        body += nl.attribute(_IFA_LOCAL, packed) + nl.attribute(_IFA_ADDRESS, packed)
        netlink.ask(nl.RTM_NEWADDR, nl.NLM_F_CREATE | nl.NLM_F_REPLACE, body)


# --- routes ----------------------------------------------------------------------------------


def _main_routes(netlink: nl.Netlink) -> list[tuple[bytes, dict[int, bytes]]]:
    """(rtmsg, attributes) of the main table's unicast routes."""
    found = []
    for kind, body in netlink.ask(nl.RTM_GETROUTE, nl.NLM_F_DUMP, _rtmsg.pack(*([0] * 9))):
        if kind != nl.RTM_NEWROUTE:
            continue
        fields = _rtmsg.unpack_from(body)
        if fields[4] == _RT_TABLE_MAIN and fields[7] == _RTN_UNICAST:
            found.append((body, nl.attributes(body[_rtmsg.size :])))
    return found


def list_routes() -> list[types_pb2.Route]:
    """ListRoutes: the main table of both families."""
    with nl.Netlink() as netlink:
        names = {link.number: link.name for link in _links(netlink)}
        routes = _main_routes(netlink)
    result = []
    for body, have in routes:
        family, prefix, _, _, _, _, scope, _, flags = _rtmsg.unpack_from(body)
        (index,) = struct.unpack("i", have.get(_RTA_OIF, bytes(4)))
        route = types_pb2.Route(device=names.get(index, ""), scope=scope, family=_family(family), flags=flags)
        if _RTA_DST in have:
            route.dest = f"{_ip(have[_RTA_DST])}/{prefix}"
        if _RTA_GATEWAY in have:
            route.gateway = _ip(have[_RTA_GATEWAY])
        if _RTA_PREFSRC in have:
            route.source = _ip(have[_RTA_PREFSRC])
        result.append(route)
    return result


def update_routes(wanted: Iterable[types_pb2.Route]) -> None:
    """UpdateRoutes: these instead of what an earlier call set; the kernel's own stay."""
    routes = sorted(wanted, key=lambda route: bool(route.gateway))
    with nl.Netlink() as netlink:
        names = {link.name: link.number for link in _links(netlink)}
        try:
            for body, _ in _main_routes(netlink):
                if _rtmsg.unpack_from(body)[5] != _RTPROT_KERNEL:
                    netlink.ask(nl.RTM_DELROUTE, 0, body)
            for route in routes:
                if route.device not in names:
                    raise RpcError(Code.NOT_FOUND, f"the guest has no interface {route.device[:40]!r}")
                netlink.ask(
                    nl.RTM_NEWROUTE, nl.NLM_F_CREATE | nl.NLM_F_REPLACE, _route(route, names[route.device])
                )
        except OSError as error:
            raise RpcError(Code.INTERNAL, f"route: {error.strerror}") from None


def _route(route: types_pb2.Route, index: int) -> bytes:
    prefix = 0
    tail = nl.attribute(_RTA_OIF, index)
    family = int(socket.AF_INET6 if route.family == types_pb2.v6 else socket.AF_INET)
    if route.dest and route.dest not in ("default", "0.0.0.0/0", "::/0"):
        family, packed, prefix = _pack_network(route.dest)
        tail += nl.attribute(_RTA_DST, packed)
    for value, kind in ((route.gateway, _RTA_GATEWAY), (route.source, _RTA_PREFSRC)):
        if value:
            own, packed = _pack_ip(value.partition("/")[0])
            if own != family:
                raise _bad(f"route {route.dest[:80]!r} mixes address families")
            tail += nl.attribute(kind, packed)
    if route.mtu:
        tail += nl.attribute(_RTA_METRICS, nl.attribute(_RTAX_MTU, route.mtu))
    flags = route.flags & _RTNH_F_ONLINK
    head = _rtmsg.pack(
        family, prefix, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, route.scope & 0xFF, _RTN_UNICAST, flags
    )
    return head + tail


def add_neighbors(wanted: Iterable[types_pb2.ARPNeighbor]) -> None:
    """AddARPNeighbors."""
    with nl.Netlink() as netlink:
        names = {link.name: link.number for link in _links(netlink)}
        for neighbor in wanted:
            if neighbor.device not in names:
                raise RpcError(Code.NOT_FOUND, f"the guest has no interface {neighbor.device[:40]!r}")
            family, packed = _pack_ip(neighbor.toIPAddress.address)
            state = neighbor.state or _NUD_PERMANENT
            body = _ndmsg.pack(family, names[neighbor.device], state & 0xFFFF, neighbor.flags & 0xFF, 0)
            body += nl.attribute(_NDA_DST, packed)
            if neighbor.lladdr:
                try:
                    body += nl.attribute(_NDA_LLADDR, bytes.fromhex(neighbor.lladdr.replace(":", "")))
                except ValueError:
                    raise _bad(f"{neighbor.lladdr[:40]!r} is no MAC address") from None
            try:
                netlink.ask(nl.RTM_NEWNEIGH, nl.NLM_F_CREATE | nl.NLM_F_REPLACE, body)
            except OSError as error:
                raise RpcError(
                    Code.INTERNAL, f"neighbour {neighbor.toIPAddress.address}: {error.strerror}"
                ) from None
