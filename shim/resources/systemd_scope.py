"""A scope of systemd's: the cgroup of a pod on a host whose cgroups systemd manages.

What: `start_scope` has systemd make a transient scope in a slice, with processes in it; `manages` tells
whether systemd is there to be asked.
Why ask: what lies in systemd's tree and is not systemd's may lose its controllers at any reload. Why by the
bus's own bytes: one call is all that is needed, on the private socket that takes no daemon in between, and a
library for it would be a dependency of every start.
Invariants: every wait has a deadline; an answer is bounded; nothing of a pod's reaches the message but the
names, which were checked.
Source: the D-Bus specification (authentication, marshalling), org.freedesktop.systemd1(5),
StartTransientUnit; systemd's docs/CONTROL_GROUP_INTERFACE.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Sequence

__all__ = ["ScopeError", "manages", "start_scope"]

SOCKET = "/run/systemd/private"
_RUNNING = "/run/systemd/system"
_MANAGER = "org.freedesktop.systemd1.Manager"
_TIMEOUT = 5.0  # seconds for the call, and as many until the processes are there
_MOST = 1 << 20  # bytes of a message
_RETURN, _ERROR = 2, 3


class ScopeError(OSError):
    """systemd does not do it; the text says why."""


def manages(running: str = _RUNNING) -> bool:
    """Whether the host was booted with systemd."""
    return os.path.isdir(running)


def start_scope(
    unit: str,
    slice_name: str,
    pids: Sequence[int],
    *,
    arrived: Callable[[], bool],
    path: str = SOCKET,
    timeout: float = _TIMEOUT,
) -> None:
    """Make the scope `unit`, delegated, with these processes in it; return when `arrived` says that they are.

    It goes by itself with its last process. Raises ScopeError, OSError. Blocks.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bus:
        bus.settimeout(timeout)
        bus.connect(path)
        _authenticate(bus)
        bus.sendall(_call(unit, slice_name, pids))
        _answer(bus)
    until = time.monotonic() + timeout
    while not arrived():
        if time.monotonic() > until:
            raise ScopeError(f"systemd did not move the processes to {unit} within {timeout:g} s")
        time.sleep(0.002)


def _authenticate(bus: socket.socket) -> None:
    bus.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
    line = b""
    while not line.endswith(b"\r\n"):
        data = bus.recv(1)
        if not data or len(line) > 200:
            raise ScopeError(f"systemd's socket does not speak D-Bus: {line[:50]!r}")
        line += data
    if not line.startswith(b"OK "):
        raise ScopeError(f"systemd does not let us in: {line[:50]!r}")
    bus.sendall(b"BEGIN\r\n")


class _Writer:
    """Marshalling: everything is aligned to its own size, from the message's begin on."""

    def __init__(self) -> None:
        self.data = bytearray()

    def align(self, size: int) -> None:
        self.data += bytes(-len(self.data) % size)

    def uint32(self, value: int) -> None:
        self.align(4)
        self.data += struct.pack("<I", value)

    def string(self, text: str) -> None:
        encoded = text.encode()
        self.uint32(len(encoded))
        self.data += encoded + b"\0"

    def signature(self, text: str) -> None:
        self.data += bytes((len(text),)) + text.encode() + b"\0"

    def array(self, alignment: int, write: Callable[[], None]) -> None:
        """Its length does not count what aligns the first element."""
        self.uint32(0)
        at = len(self.data)
        self.align(alignment)
        begin = len(self.data)
        write()
        self.data[at - 4 : at] = struct.pack("<I", len(self.data) - begin)


def _call(unit: str, slice_name: str, pids: Sequence[int]) -> bytes:
    body = _Writer()
    body.string(unit)
    body.string("fail")  # if there is one already

    def properties() -> None:
        for name, kind, value in (
            ("Description", "s", f"kata-shim: {unit}"),
            ("Slice", "s", slice_name),
            ("Delegate", "b", 1),
            ("DefaultDependencies", "b", 0),
            ("CPUAccounting", "b", 1),
            ("MemoryAccounting", "b", 1),
            ("TasksAccounting", "b", 1),
        ):
            body.align(8)
            body.string(name)
            body.signature(kind)
            body.string(str(value)) if kind == "s" else body.uint32(int(value))
        body.align(8)
        body.string("PIDs")
        body.signature("au")
        body.array(4, numbers)

    def numbers() -> None:
        for pid in pids:
            body.uint32(pid)

    body.array(8, properties)
    body.array(8, lambda: None)  # no further units
    message = _Writer()
    message.data += b"l\x01\x00\x01" + struct.pack("<II", len(body.data), 1)

    def fields() -> None:
        for number, kind, text in (
            (1, "o", "/org/freedesktop/systemd1"),
            (2, "s", _MANAGER),
            (3, "s", "StartTransientUnit"),
            (6, "s", "org.freedesktop.systemd1"),
            (8, "g", "ssa(sv)a(sa(sv))"),
        ):
            message.align(8)
            message.data.append(number)
            message.signature(kind)
            message.signature(text) if kind == "g" else message.string(text)

    message.array(8, fields)
    message.align(8)
    return bytes(message.data + body.data)


def _answer(bus: socket.socket) -> None:
    """Wait for the answer to our one call; what else is said on the way is none."""
    while True:
        head = _read(bus, 16)
        order, kind = chr(head[0]), head[1]
        sign = "<" if order == "l" else ">"
        size, _, fields = struct.unpack(f"{sign}III", head[4:])
        rest = -(-fields // 8) * 8 + size
        if order not in "lB" or rest > _MOST:
            raise ScopeError("systemd's answer makes no sense")
        body = _read(bus, rest)[rest - size :]
        if kind == _ERROR:
            length = struct.unpack(f"{sign}I", body[:4])[0] if size >= 4 else 0
            raise ScopeError(f"systemd: {body[4 : 4 + length].decode(errors='replace')[:300]}")
        if kind == _RETURN:
            return


def _read(bus: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = bus.recv(size - len(data))
        if not more:
            raise ScopeError("systemd closed the connection")
        data += more
    return data
