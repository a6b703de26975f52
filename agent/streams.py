"""Where the host's stdio connections arrive, each known by its peer port.

What: the host opens one connection per stream to the stdio port, and names it in CreateContainer or
ExecProcess by its own port number; `StreamListener.take` finds it, arrived already or not yet.
Invariants: at most `WAITING_MAX` connections wait to be named, each at most `WAITING_TIME` seconds;
a connection is handed out once.
"""

from __future__ import annotations

import asyncio
import socket

from agent import log

__all__ = ["StreamListener"]

WAITING_MAX = 256
WAITING_TIME = 30.0


class StreamListener:
    """Accepts on a listening socket (AF_VSOCK: addresses are (cid, port)) until closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        self._loop = loop
        self._listener = listener
        self._arrived: dict[int, tuple[socket.socket, asyncio.TimerHandle]] = {}
        self._wanted: dict[int, asyncio.Future[socket.socket]] = {}
        listener.setblocking(False)
        loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.error(f"accept of a stdio connection failed: {error}")
                return
            connection.setblocking(False)
            self._offer(address[1], connection)

    def _offer(self, port: int, connection: socket.socket) -> None:
        wanted = self._wanted.pop(port, None)
        if wanted is not None and not wanted.done():
            wanted.set_result(connection)
            return
        if port in self._arrived or len(self._arrived) >= WAITING_MAX:
            log.error(f"refused a stdio connection from port {port}: too many wait")
            connection.close()
            return
        timer = self._loop.call_later(WAITING_TIME, self._expire, port)
        self._arrived[port] = (connection, timer)

    def _expire(self, port: int) -> None:
        connection, _ = self._arrived.pop(port)
        log.error(f"nobody named the stdio connection from port {port}")
        connection.close()

    async def take(self, port: int, timeout: float = 10.0) -> socket.socket:
        """The connection from this peer port. Raises TimeoutError when it does not arrive."""
        arrived = self._arrived.pop(port, None)
        if arrived is not None:
            arrived[1].cancel()
            return arrived[0]
        future: asyncio.Future[socket.socket] = self._loop.create_future()
        self._wanted[port] = future
        try:
            return await asyncio.wait_for(future, timeout)
        finally:
            self._wanted.pop(port, None)

    def close(self) -> None:
        """Stop accepting and drop what nobody named."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for connection, timer in self._arrived.values():
            timer.cancel()
            connection.close()
        self._arrived.clear()
