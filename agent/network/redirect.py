"""What a guest sends to port 53 of an address of its loopback goes to another port there: rules of nftables.

What: `redirect` replaces the table `kata_shim` by one whose rules say so, in one transaction.
Why not to listen at port 53 of that address: a name server of the pod's own, which listens at all addresses,
could not begin then. Docker keeps its resolver out of the way by such rules, too.
Invariants: all of it is there, or nothing. The kernel loads the modules that it needs by itself.
Source: linux/netfilter/nfnetlink.h and nf_tables.h for names and numbers.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable

from agent.network.rtnetlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, attribute

__all__ = ["PORT", "redirect"]

PORT = 53
_TABLE, _CHAIN = "kata_shim", "resolver"
_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = 0, 2, 3, 6
_IPV4 = socket.AF_INET
_NESTED = 0x8000
_NLM_F_APPEND = 0x800
_NF_INET_LOCAL_OUT = 3
_NAT_PRIORITY = -100
_REGISTER = 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_L4PROTO = 16
_TIMEOUT = 20.0  # seconds: modules are loaded meanwhile

_header = struct.Struct("IHHII")  # length, type, flags, sequence, port


def _u32(value: int) -> bytes:
    return struct.pack("!i" if value < 0 else "!I", value)


def _nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def _expression(name: str, *data: bytes) -> bytes:
    return _nested(1, attribute(1, name), _nested(2, *data))


def _equals(value: bytes) -> bytes:
    data = _nested(3, attribute(1, value))
    return _expression("cmp", attribute(1, _u32(_REGISTER)), attribute(2, _u32(0)), data)


def _payload(base: int, offset: int, size: int) -> bytes:
    words = (_REGISTER, base, offset, size)
    return _expression("payload", *(attribute(at + 1, _u32(word)) for at, word in enumerate(words)))


def _rule(address: str, protocol: int, port: int) -> bytes:
    """`ip daddr ADDRESS PROTOCOL dport 53 redirect to :PORT`."""
    value = _nested(2, attribute(1, struct.pack("!H", port)))
    expressions = (
        _payload(_NETWORK_HEADER, 16, 4),
        _equals(socket.inet_aton(address)),
        _expression("meta", attribute(1, _u32(_REGISTER)), attribute(2, _u32(_L4PROTO))),
        _equals(bytes([protocol])),
        _payload(_TRANSPORT_HEADER, 2, 2),
        _equals(struct.pack("!H", PORT)),
        _expression("immediate", attribute(1, _u32(_REGISTER)), value),
        _expression("redir", attribute(1, _u32(_REGISTER))),
    )
    return attribute(1, _TABLE) + attribute(2, _CHAIN) + _nested(4, *expressions)


def redirect(ports: Iterable[tuple[str, int]]) -> None:
    """For each address of IPv4 what is sent to its port 53, by UDP and TCP, goes to this port of 127.0.0.1.
    Blocks. Raises OSError."""
    table = attribute(1, _TABLE)
    hook = _nested(4, attribute(1, _u32(_NF_INET_LOCAL_OUT)), attribute(2, _u32(_NAT_PRIORITY)))
    messages = [
        (_NEWTABLE, NLM_F_CREATE, table),  # so that there is one to delete, with all that it has
        (_DELTABLE, 0, table),
        (_NEWTABLE, NLM_F_CREATE, table),
        (_NEWCHAIN, NLM_F_CREATE, table + attribute(3, _CHAIN) + hook + attribute(7, "nat")),
    ]
    messages += [
        (_NEWRULE, NLM_F_CREATE | _NLM_F_APPEND, _rule(address, protocol, port))
        for address, port in ports
        for protocol in (socket.IPPROTO_UDP, socket.IPPROTO_TCP)
    ]
    _commit(messages)


def _commit(messages: list[tuple[int, int, bytes]]) -> None:
    batch = _message(_BATCH_BEGIN, 0, 0, struct.pack("!BBH", 0, 0, _SUBSYSTEM))
    for number, (kind, flags, body) in enumerate(messages, 1):
        head = struct.pack("!BBH", _IPV4, 0, 0)
        batch += _message(_SUBSYSTEM << 8 | kind, flags | NLM_F_ACK, number, head + body)
    batch += _message(_BATCH_END, 0, 0, struct.pack("!BBH", 0, 0, _SUBSYSTEM))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(_TIMEOUT)
        netlink.bind((0, 0))
        netlink.send(batch)
        answered = 0
        while answered < len(messages):
            data = netlink.recv(1 << 16)
            while data:
                length, kind, _, _, _ = _header.unpack_from(data)
                (code,) = struct.unpack_from("i", data, _header.size)
                if kind == 2 and code:  # NLMSG_ERROR
                    raise OSError(-code, os.strerror(-code))
                answered += 1
                data = data[(length + 3) & ~3 :]


def _message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return _header.pack(_header.size + len(body), kind, flags | NLM_F_REQUEST, number, 0) + body
