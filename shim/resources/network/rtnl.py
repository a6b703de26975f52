"""rtnetlink by pyroute2's messages, without the rest of pyroute2.

What: `message` gives the classes that encode and decode; `Rtnl` is a socket that dumps and asks.
Why not `pyroute2.IPRoute`: `import pyroute2` takes 75 ms, a tenth of them for what is used here, and the
start of every pod waits for it. The messages are plain data: one socket, opened in the pod's namespace,
and a loop over what the kernel answers are all that they need.
Invariants: an exchange ends with the kernel's NLMSG_DONE or NLMSG_ERROR, or after five seconds; errors are
OSError with the kernel's errno. Blocking: for threads only.
Source: rtnetlink(7), netlink(7).
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, Self

__all__ = [
    "NLM_F_CREATE",
    "NLM_F_EXCL",
    "RTM_DELLINK",
    "RTM_DELQDISC",
    "RTM_GETADDR",
    "RTM_GETLINK",
    "RTM_GETNEIGH",
    "RTM_GETQDISC",
    "RTM_GETROUTE",
    "RTM_GETRULE",
    "RTM_NEWLINK",
    "RTM_NEWQDISC",
    "RTM_NEWTFILTER",
    "Rtnl",
    "TooMany",
    "attributes",
    "message",
]

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_GETADDR, RTM_GETROUTE, RTM_GETNEIGH = 22, 26, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER = 44
RTM_GETRULE = 34

NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x300, 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TIMEOUT = 5.0  # seconds; the kernel answers at once
_DUMPS = 5  # how often a dump that something changed under is begun again

_MOST = 1024
"""Messages of one dump, if its caller does not say otherwise."""

_header = struct.Struct("IHHII")  # length, type, flags, sequence, port
_attribute = struct.Struct("HH")  # length, type
_importing = threading.Lock()


def message(name: str) -> Any:
    """pyroute2's class of this message, such as "ifinfmsg"; each is imported when it is first asked for."""
    module = f"pyroute2.netlink.rtnl.{name}"
    with _importing:
        if module not in sys.modules:
            _import(module)
    return getattr(sys.modules[module], name)


def _import(module: str) -> None:
    """Import one module of pyroute2 without what the package itself would import."""
    if "pyroute2" in sys.modules:
        importlib.import_module(module)
        return
    spec = importlib.util.find_spec("pyroute2")
    assert spec is not None
    package = types.ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = spec
    sys.modules["pyroute2"] = package
    try:
        importlib.import_module(module)
    finally:
        del sys.modules["pyroute2"]  # who imports the whole gets the whole


class TooMany(OSError):  # noqa: N818  (says what is the matter)
    """The kernel has more of what was asked for than anybody wants to know."""

    def __init__(self, most: int) -> None:
        super().__init__(errno.E2BIG, f"there are more than {most}")
        self.most = most


class Rtnl:
    """A NETLINK_ROUTE socket of the calling thread's network namespace, for `with`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.settimeout(_TIMEOUT)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(
        self,
        name: str,
        kind: int,
        *,
        wanted: Callable[[bytes], bool] = lambda _: True,
        most: int = _MOST,
        **fields: int,
    ) -> list[Any]:
        """The messages of this class that the kernel has; `kind` is the RTM_GET*.

        `wanted` says of the bytes behind the netlink header whether to decode them. Raises TooMany.
        """
        asked = message(name)()
        for key, value in fields.items():
            asked[key] = value

        def decoded(body: bytes) -> Any:
            answer = type(asked)(body)
            answer.decode()
            return answer

        return self._whole(
            name, lambda: self._exchange(self._encoded(asked, kind, _NLM_F_DUMP), decoded, wanted, most)
        )

    def dump_plain(
        self, what: str, kind: int, family: int, *, wanted: Callable[[bytes], bool], most: int
    ) -> list[bytes]:
        """The bodies of the messages of one address family, undecoded: of what there may be thousands, at a
        tenth of a millisecond each. Raises TooMany."""

        def exchange() -> tuple[list[bytes], bool]:
            body = bytes([family]).ljust(12, b"\0")  # struct rtmsg, and struct fib_rule_hdr
            self._sequence += 1
            flags = _NLM_F_DUMP | NLM_F_REQUEST
            packet = _header.pack(_header.size + len(body), kind, flags, self._sequence, 0) + body
            return self._exchange(packet, lambda answer: answer[_header.size :], wanted, most)

        return self._whole(what, exchange)

    def _whole(self, what: str, exchange: Callable[[], tuple[list[Any], bool]]) -> list[Any]:
        for _ in range(_DUMPS):
            found, whole = exchange()
            if whole:
                return found
        raise OSError(errno.EBUSY, f"the kernel's {what} table changed all the time")

    def ask(self, asked: Any, kind: int, flags: int = 0) -> None:
        """Send one message and wait for its acknowledgement."""
        self._exchange(self._encoded(asked, kind, flags | NLM_F_ACK), lambda _: None)

    def _encoded(self, asked: Any, kind: int, flags: int) -> bytes:
        self._sequence += 1
        asked["header"]["type"] = kind
        asked["header"]["flags"] = flags | NLM_F_REQUEST
        asked["header"]["sequence_number"] = self._sequence
        asked.encode()
        return bytes(asked.data)

    def _exchange(
        self,
        packet: bytes,
        decoded: Callable[[bytes], Any],
        wanted: Callable[[bytes], bool] = lambda _: True,
        most: int = _MOST,
    ) -> tuple[list[Any], bool]:
        self._socket.send(packet)
        found: list[Any] = []
        whole = True
        while True:
            data = self._socket.recv(1 << 18)
            offset = 0
            while offset + _header.size <= len(data):
                length, type_, marks, sequence, _ = _header.unpack_from(data, offset)
                if length < _header.size:
                    break
                body = data[offset : offset + length]
                offset += (length + 3) & ~3
                if sequence != self._sequence:
                    continue  # what is left of a dump that was cut short
                whole = whole and not marks & _NLM_F_DUMP_INTR
                if type_ == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("i", body, _header.size)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return found, whole
                if type_ == _NLMSG_DONE:
                    return found, whole
                if not wanted(body[_header.size :]):
                    continue
                if len(found) >= most:
                    raise TooMany(most)
                found.append(decoded(body))


def attributes(data: bytes) -> dict[int, bytes]:
    """The rtattrs of a body, the last of each kind: {kind: value}."""
    return dict(_attributes(data))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _attribute.size <= len(data):
        length, kind = _attribute.unpack_from(data, offset)
        if length < _attribute.size:
            return
        yield kind & 0x3FFF, data[offset + _attribute.size : offset + length]
        offset += (length + 3) & ~3
