"""The guest's links, addresses and neighbours, as the host wants them.

What: the agent's network RPCs but for the routes, over `agent.network.rtnetlink`.
Why replace and not add: the host sends the whole wanted state, and may send it again.
Invariants: a link is found by its MAC address (the host cannot know the guest's names); loopback is
never touched. An IPv4 address has the broadcast address of its network, as CNI's plugins give it. IPv6
addresses serve at once, the link's own too: it is the one that the host's link has had, by the same MAC.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from agent.fit import NOTHING
from agent.network import rtnetlink as nl
from agent.network.links import Link, bad, family_of, ifinfo, ip_text, links, named, pack_ip
from proto import types_pb2
from ttrpc import Code, RpcError

__all__ = ["add_neighbors", "list_interfaces", "update_interface"]

_ifaddr = struct.Struct("BBBBi")  # family, prefix length, flags, scope, index
_ndmsg = struct.Struct("BxxxiHBB")  # family, index, state, flags, type

_IFF_UP = 1
_IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 0x2, 0x200
_IFF_NOARP = 0x80
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_PERMANENT = 0x80
_ADDRESSES_MAX = 256


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
        present = links(netlink)
        addresses = _addresses(netlink)
    result = []
    for link in present:
        interface = types_pb2.Interface(device=link.name, name=link.name, mtu=link.mtu, hwAddr=link.mac)
        for index, family, packed, prefix in addresses:
            if index == link.number:
                address = ip_text(packed)
                interface.IPAddresses.add(family=family_of(family), address=address, mask=str(prefix))
        result.append(interface)
    return result


def update_interface(wanted: types_pb2.Interface, beyond: Mapping[str, Any] = NOTHING) -> None:
    """UpdateInterface: find the link by MAC (else by name), rename, address, set MTU, raise it. `beyond`:
    `addresses`, what is to be known of some of them: {"10.0.0.2": {"peer": "10.0.0.1", "scope": 0,
    "noprefixroute": false}}.
    """
    with nl.Netlink() as netlink:
        try:
            _update_interface(netlink, wanted, beyond.get("addresses") or {})
        except OSError as error:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"interface {wanted.name[:40]} ({wanted.hwAddr[:40]}): {error.strerror}",
            ) from None


def _update_interface(
    netlink: nl.Netlink, wanted: types_pb2.Interface, more: Mapping[str, Mapping[str, Any]]
) -> None:
    present = links(netlink)
    mac = wanted.hwAddr.lower()
    link = next((link for link in present if mac and link.mac == mac), None)
    if link is None:
        link = named(present, wanted.name or wanted.device)
    if link.name == "lo":
        raise bad("the loopback interface is not the host's to change")
    change = b""
    if mac and link.mac != mac:
        try:
            change += nl.attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        except ValueError:
            raise bad(f"{mac[:40]!r} is no MAC address") from None
    if wanted.mtu:
        change += nl.attribute(_IFLA_MTU, wanted.mtu)
    if wanted.name and wanted.name != link.name:
        if not 0 < len(wanted.name.encode()) < 16 or "/" in wanted.name:
            raise bad(f"{wanted.name[:40]!r} is no interface name")
        if any(other.name == wanted.name for other in present):
            _make_room(netlink, present, wanted.name)
        if link.flags & _IFF_UP:
            _set_link(netlink, link.number, 0, b"")  # a link that is up cannot be renamed
        change += nl.attribute(_IFLA_IFNAME, wanted.name)
    _trust_own_address(link.name)
    _set_link(netlink, link.number, 0 if change else _IFF_UP, change)
    _replace_addresses(netlink, link.number, wanted.IPAddresses, more)
    _set_link(netlink, link.number, _IFF_UP | (wanted.raw_flags & _IFF_NOARP), b"")


def _trust_own_address(name: str) -> None:
    """No look for a duplicate of the link-local address. A kernel without IPv6 has no such setting."""
    with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv6/conf/{name}/accept_dad", "w") as setting:
        setting.write("0")


def _set_link(netlink: nl.Netlink, index: int, flags: int, change: bytes) -> None:
    body = ifinfo.pack(0, 0, index, flags, _IFF_UP | _IFF_NOARP) + change
    netlink.ask(nl.RTM_NEWLINK, 0, body)


def _make_room(netlink: nl.Netlink, present: list[Link], name: str) -> None:
    """Another link has the name (eth0 and eth1 arrive in any order): move it aside."""
    other = named(present, name)
    taken = {link.name for link in present}
    aside = next(f"kata{number}" for number in range(len(present) + 1) if f"kata{number}" not in taken)
    _set_link(netlink, other.number, 0, nl.attribute(_IFLA_IFNAME, aside))


def _replace_addresses(
    netlink: nl.Netlink,
    index: int,
    wanted: Iterable[types_pb2.IPAddress],
    more: Mapping[str, Mapping[str, Any]],
) -> None:
    keep: dict[tuple[int, bytes, int], str] = {}  # in the host's order, whose first one is the link's own
    for address in list(wanted)[:_ADDRESSES_MAX]:
        family, packed = pack_ip(address.address)
        if not address.mask.isdigit() or int(address.mask) > len(packed) * 8:
            raise bad(f"{address.mask[:40]!r} is no prefix length")
        keep[family, packed, int(address.mask)] = address.address
    for at, family, packed, prefix in _addresses(netlink):
        known = (family, packed, prefix)
        link_local = family == socket.AF_INET6 and packed.startswith(b"\xfe\x80")
        if at == index and known not in keep and not link_local:
            body = _ifaddr.pack(family, prefix, 0, 0, index) + nl.attribute(_IFA_LOCAL, packed)
            netlink.ask(nl.RTM_DELADDR, 0, body)
    for (family, packed, prefix), text in keep.items():
        body = _address(index, family, packed, prefix, more.get(text) or {})
        try:
            netlink.ask(nl.RTM_NEWADDR, nl.NLM_F_CREATE | nl.NLM_F_REPLACE, body)
        except OSError as error:
            what = f"address {text[:60]}/{prefix} of the interface: {error.strerror}"
            raise RpcError(Code.FAILED_PRECONDITION, what) from None


def _address(index: int, family: int, packed: bytes, prefix: int, more: Mapping[str, Any]) -> bytes:
    peer = packed
    if more.get("peer"):
        other, peer = pack_ip(str(more["peer"]))
        if other != family:
            raise bad(f"the peer {str(more['peer'])[:60]!r} of {ip_text(packed)} has another address family")
    # Whoever gave the address has seen to it that it is nobody else's; it is to serve at once.
    flags = _IFA_F_NODAD if family == socket.AF_INET6 else 0
    flags |= _IFA_F_NOPREFIXROUTE if more.get("noprefixroute") else 0
    scope = more.get("scope") or 0
    if not isinstance(scope, int) or not 0 <= scope <= 255:
        raise bad(f"{str(scope)[:40]!r} is no scope")
    body = _ifaddr.pack(family, prefix, flags & 0xFF, scope, index)
    body += (
        nl.attribute(_IFA_LOCAL, packed) + nl.attribute(_IFA_ADDRESS, peer) + nl.attribute(_IFA_FLAGS, flags)
    )
    if family == socket.AF_INET and prefix < 31 and peer == packed:
        last = int.from_bytes(packed, "big") | (1 << (32 - prefix)) - 1
        body += nl.attribute(_IFA_BROADCAST, last.to_bytes(4, "big"))
    return body


def add_neighbors(wanted: Iterable[types_pb2.ARPNeighbor]) -> None:
    """AddARPNeighbors."""
    with nl.Netlink() as netlink:
        names = {link.name: link.number for link in links(netlink)}
        for neighbor in wanted:
            if neighbor.device not in names:
                raise RpcError(Code.NOT_FOUND, f"the guest has no interface {neighbor.device[:40]!r}")
            family, packed = pack_ip(neighbor.toIPAddress.address)
            state = neighbor.state or _NUD_PERMANENT
            body = _ndmsg.pack(family, names[neighbor.device], state & 0xFFFF, neighbor.flags & 0xFF, 0)
            body += nl.attribute(_NDA_DST, packed)
            if neighbor.lladdr:
                try:
                    body += nl.attribute(_NDA_LLADDR, bytes.fromhex(neighbor.lladdr.replace(":", "")))
                except ValueError:
                    raise bad(f"{neighbor.lladdr[:40]!r} is no MAC address") from None
            try:
                netlink.ask(nl.RTM_NEWNEIGH, nl.NLM_F_CREATE | nl.NLM_F_REPLACE, body)
            except OSError as error:
                what = f"neighbour {neighbor.toIPAddress.address[:60]} dev {neighbor.device[:20]}"
                raise RpcError(Code.FAILED_PRECONDITION, f"{what}: {error.strerror}") from None
