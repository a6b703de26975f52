"""The few rtnetlink(7) messages that a guest's network needs.

What: encoding of requests, decoding of answers, one blocking exchange (`Netlink.ask`). Names follow
rtnetlink(7) and linux/rtnetlink.h.
Why not the `ip` program: it cannot say which step failed, and each call is a process start.
Invariants: an exchange with the kernel ends at its NLMSG_DONE or NLMSG_ERROR; errors are OSError.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Self

__all__ = ["Message", "Netlink", "attribute", "attributes", "text"]

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_CREATE = 0x400
NLM_F_EXCL = 0x200
NLM_F_APPEND = 0x800

RTM_NEWLINK, RTM_GETLINK, RTM_SETLINK = 16, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH = 28
RTM_NEWRULE, RTM_DELRULE = 32, 33

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_TIMEOUT = 5.0  # seconds; the kernel answers at once

_header = struct.Struct("IHHII")  # length, type, flags, sequence, port
_attribute = struct.Struct("HH")  # length, type
Message = tuple[int, bytes]  # type, body


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def attribute(kind: int, value: bytes | int | str) -> bytes:
    """One rtattr; an int is a u32, a str ends with NUL."""
    if isinstance(value, int):
        value = struct.pack("I", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    return _pad(_attribute.pack(_attribute.size + len(value), kind) + value)


def attributes(data: bytes) -> dict[int, bytes]:
    """The rtattrs of a message's tail, the last of each kind."""
    found = {}
    while len(data) >= _attribute.size:
        length, kind = _attribute.unpack_from(data)
        if length < _attribute.size:
            break
        found[kind & 0x3FFF] = data[_attribute.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def text(value: bytes) -> str:
    """A NUL-terminated string attribute."""
    return value.rstrip(b"\0").decode(errors="replace")


class Netlink:
    """A NETLINK_ROUTE socket, for `with`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.settimeout(_TIMEOUT)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, kind: int, flags: int, body: bytes) -> list[Message]:
        """Send one request; everything that the kernel answers. Raises OSError with its errno."""
        self._sequence += 1
        wanted = flags | NLM_F_REQUEST | (0 if flags & NLM_F_DUMP == NLM_F_DUMP else NLM_F_ACK)
        length = _header.size + len(body)
        self._socket.send(_header.pack(length, kind, wanted, self._sequence, 0) + body)
        answer: list[Message] = []
        while True:
            for kind_, body_ in self._messages(self._socket.recv(1 << 16)):
                if kind_ == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("i", body_)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return answer
                if kind_ == _NLMSG_DONE:
                    return answer
                answer.append((kind_, body_))

    def _messages(self, data: bytes) -> Iterator[Message]:
        while len(data) >= _header.size:
            length, kind, _, sequence, _ = _header.unpack_from(data)
            if length < _header.size:
                return
            if sequence == self._sequence:
                yield kind, data[_header.size : length]
            data = data[(length + 3) & ~3 :]
