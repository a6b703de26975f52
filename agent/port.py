"""The agent's channel by virtio-serial: one stream of bytes, carried to and from the ttrpc server.

What: `Port` opens the port that the host has named and joins it with a socket pair, whose other end the
server has; when the host lets go, that connection ends, and the port is opened anew for the next one.
Why: a VM that becomes a template has no vsock (devices/port.py on the host). Opened anew, because QEMU tells
its host of that: then this side has seen the end, and no half of an old message can meet the next host.
Invariants: at most 64 KiB of each direction are under way here: what one side does not take is not read from
the other. Nothing blocks: the port says by edges (EPOLLET) what has changed, since without a host it says
"hung up" for as long as nobody comes.
Source: drivers/char/virtio_console.c (port_fops_poll, port_fops_read) of Linux 6.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket

from agent import deadlines, log
from ttrpc import Server

__all__ = ["Port"]

_PORTS = "/sys/class/virtio-ports"
_PIECE = 64 << 10
_EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET
_MOMENT = 0.02  # seconds


class Port:
    """See the module's docstring. Made by `find`."""

    def __init__(self, path: str, server: Server) -> None:
        self._loop = asyncio.get_running_loop()
        self._path = path
        self._server = server
        self._serving: asyncio.Task[None] | None = None
        self._inner: socket.socket | None = None  # while the host is there
        self._in = b""  # from the host, not taken by the server yet
        self._out = b""  # from the server, not taken by the host yet
        self._full = False  # whether the port does not take more, and nothing is read for it
        self._epoll = select.epoll(1)
        self._port = -1
        self._open()
        self._loop.add_reader(self._epoll.fileno(), self._on_edge)

    @classmethod
    async def find(cls, name: str, server: Server) -> Port:
        """The port with this name, once the kernel has it. Raises TimeoutError."""
        async with asyncio.timeout(deadlines.HOTPLUG):
            while not (path := _path_of(name)):  # noqa: ASYNC110  (nothing announces it without a udev)
                await asyncio.sleep(_MOMENT)
        return cls(path, server)

    def close(self) -> None:
        """Let go of the port and of its connection."""
        self._loop.remove_reader(self._epoll.fileno())
        self._end_connection()
        self._epoll.close()
        os.close(self._port)

    def _open(self) -> None:
        self._port = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._port, _EDGES)

    def _on_edge(self) -> None:
        for _, events in self._epoll.poll(0):
            if events & select.EPOLLHUP:
                if self._inner is not None:
                    self._hung_up()
                return
            if self._inner is None:
                self._begin_connection()
            self._inwards()
            self._outwards()

    def _begin_connection(self) -> None:
        log.debug("the host is at the port")
        self._inner, theirs = socket.socketpair()
        self._inner.setblocking(False)
        theirs.setblocking(False)
        self._serving = asyncio.ensure_future(self._server.serve_connected(theirs))
        self._loop.add_reader(self._inner, self._outwards)

    def _end_connection(self) -> None:
        if self._inner is not None:
            self._loop.remove_reader(self._inner)
            self._loop.remove_writer(self._inner)
            self._inner.close()
            self._inner = None
        self._in = self._out = b""
        self._full = False

    def _hung_up(self) -> None:
        log.debug("the host has left the port")
        self._end_connection()
        self._epoll.unregister(self._port)
        os.close(self._port)
        self._open()

    def _inwards(self) -> None:
        """From the host to the server, as much as there is and as it takes."""
        while self._inner is not None:
            if not self._in:
                try:
                    self._in = os.read(self._port, _PIECE)
                except BlockingIOError:
                    return
                if not self._in:
                    self._hung_up()
                    return
            try:
                self._in = self._in[self._inner.send(self._in) :]
            except BlockingIOError:
                self._loop.add_writer(self._inner, self._taken)
                return
            except OSError:  # the server has closed it: the host has broken the protocol
                self._hung_up()
                return

    def _taken(self) -> None:
        if self._inner is not None:
            self._loop.remove_writer(self._inner)
        self._inwards()

    def _outwards(self) -> None:
        """From the server to the host, likewise."""
        while self._inner is not None:
            if not self._out:
                try:
                    self._out = self._inner.recv(_PIECE)
                except BlockingIOError:
                    return
                except OSError:  # as below: with something of the host's unread
                    self._out = b""
                if not self._out:
                    self._hung_up()
                    return
            try:
                self._out = self._out[os.write(self._port, self._out) :]
            except BlockingIOError:  # an edge tells when there is room
                self._full = self._loop.remove_reader(self._inner)
                return
            if self._full:
                self._full = False
                self._loop.add_reader(self._inner, self._outwards)


def _path_of(name: str) -> str:
    with contextlib.suppress(OSError):
        for port in os.listdir(_PORTS):
            with open(f"{_PORTS}/{port}/name", encoding="utf-8", errors="replace") as file:
                if file.read().strip() == name:
                    return f"/dev/{port}"
    return ""
