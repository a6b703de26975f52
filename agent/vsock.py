"""Sockets that never give the kernel more at once than fits one descriptor of vsock's queue.

What: `Listener` is a listening socket whose connections take at most `PACKET` bytes with each send.
Why: Linux 6.12.y and later lay a packet of more than 32 KiB into several descriptors, and device daemons
exist that read the first one only: the output stops for ever there, without an error. One send is one packet
of a stream, or several smaller ones, never a larger one. Ours is told to grant no more either
(devices/vsock_daemon.py); this is for those that cannot be told.
Invariants: what `send` and `sendmsg` answer is true: who has more sends again, as with every stream.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

__all__ = ["PACKET", "Connection", "Listener"]

PACKET = 28672
"""Bytes: with header and the kernel's own part less than eight pages."""


class Connection(socket.socket):
    """See the module's docstring."""

    def send(self, data: Any, flags: int = 0, /) -> int:
        """As a socket does, at most `PACKET` bytes."""
        return super().send(data if len(data) <= PACKET else memoryview(data)[:PACKET], flags)

    def sendmsg(self, buffers: Iterable[Any], /, *more: Any) -> int:
        """As a socket does, at most `PACKET` bytes of all buffers."""
        room, parts = PACKET, []
        for buffer in buffers:
            if len(buffer) > room:
                parts.append(memoryview(buffer)[:room])
                break
            parts.append(buffer)
            room -= len(buffer)
        return super().sendmsg(parts, *more)


class Listener(socket.socket):
    """See the module's docstring."""

    def accept(self) -> tuple[Connection, Any]:
        """As a socket does; the connection is a `Connection`."""
        plain, address = super().accept()
        return Connection(plain.family, plain.type, plain.proto, plain.detach()), address
