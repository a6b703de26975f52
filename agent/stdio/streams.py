"""Where the host's stdio connections arrive, each naming itself.

What: the host opens one connection per stream to `agent.stream_port` and sends four bytes first: the
stream's id, a big-endian u32 of its choice. CreateContainer and ExecProcess name the streams by these
ids in stdin_port, stdout_port and stderr_port; `StreamListener.take` finds the connection, arrived
already or not yet. What follows on the connection is framed; see agent.pumps.
Why not by the peer's port number, as Kata does: with vhost-device-vsock the host never learns it.
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
ID_BYTES = 4


class StreamListener:
    """Accepts on a listening stream socket until closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        self._loop = loop
        self._listener = listener
        self._unnamed: dict[socket.socket, tuple[bytearray, asyncio.TimerHandle]] = {}
        self._arrived: dict[int, tuple[socket.socket, asyncio.TimerHandle]] = {}
        self._wanted: dict[int, asyncio.Future[socket.socket]] = {}
        listener.setblocking(False)
        loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.error(f"accept of a stream failed: {error}")
                return
            connection.setblocking(False)
            if len(self._unnamed) + len(self._arrived) >= WAITING_MAX:
                log.error("refused a stream: too many wait to be named")
                connection.close()
                continue
            timer = self._loop.call_later(WAITING_TIME, self._drop_unnamed, connection)
            self._unnamed[connection] = (bytearray(), timer)
            # By number: of an object that it does not know yet the loop makes a text first.
            self._loop.add_reader(connection.fileno(), self._read_id, connection)

    def _drop_unnamed(self, connection: socket.socket) -> None:
        self._unnamed.pop(connection)[1].cancel()
        self._loop.remove_reader(connection.fileno())
        connection.close()

    def _read_id(self, connection: socket.socket) -> None:
        got, timer = self._unnamed[connection]
        try:
            data = connection.recv(ID_BYTES - len(got))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        got += data
        if not data:
            self._drop_unnamed(connection)
        elif len(got) == ID_BYTES:
            del self._unnamed[connection]
            timer.cancel()
            self._loop.remove_reader(connection.fileno())
            self._offer(int.from_bytes(got, "big"), connection)

    def _offer(self, stream: int, connection: socket.socket) -> None:
        wanted = self._wanted.pop(stream, None)
        if wanted is not None and not wanted.done():
            wanted.set_result(connection)
            return
        if stream in self._arrived:
            log.error(f"stream {stream} came twice")
            connection.close()
            return
        timer = self._loop.call_later(WAITING_TIME, self._expire, stream)
        self._arrived[stream] = (connection, timer)

    def _expire(self, stream: int) -> None:
        connection, _ = self._arrived.pop(stream)
        log.error(f"nobody asked for stream {stream}")
        connection.close()

    async def take(self, stream: int, timeout: float = 10.0) -> socket.socket:
        """The connection with this id. Raises TimeoutError when it does not arrive."""
        arrived = self._arrived.pop(stream, None)
        if arrived is not None:
            arrived[1].cancel()
            return arrived[0]
        future: asyncio.Future[socket.socket] = self._loop.create_future()
        self._wanted[stream] = future
        try:
            return await asyncio.wait_for(future, timeout)
        finally:
            self._wanted.pop(stream, None)

    def forget(self, stream: int) -> None:
        """Close it if it waits: whoever would have asked for it cannot be made. 0 is none."""
        arrived = self._arrived.pop(stream, None)
        if arrived is not None:
            arrived[1].cancel()
            arrived[0].close()

    def close(self) -> None:
        """Stop accepting and drop what nobody asked for."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self._unnamed):
            self._drop_unnamed(connection)
        for connection, timer in self._arrived.values():
            timer.cancel()
            connection.close()
        self._arrived.clear()
