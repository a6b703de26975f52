"""The guest's end of what dials the pod's localhost: which ports are listened at, and connections to them.

What: `Watch` answers when other TCP ports than those known are listened at; `Dialler` connects to one, and
joins that connection with a stream of the host (`agent.network.relay`).
Why by looking at /proc/net/tcp: no event of the kernel tells of a listen(2). It names all listeners before
the first connection, so a few KiB of it are read, however many connections there are. Nobody looks unless a
host asks, and the longer nothing has happened, the seldomer: a pod at rest is looked at every `SELDOM`
seconds, one in which a process was started, a port came or went, or a connection was refused, every `OFTEN`.
Invariants: of the ports at most `PORTS` of a family are told, the lowest; at most `CONNECTIONS` connections
exist.
Source: proc(5), Linux's net/ipv4/tcp_ipv4.c (tcp_seq_start: listeners first).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Collection, Iterator

from agent import log
from agent.network.relay import relay
from agent.stdio.streams import StreamListener
from ttrpc import Code, RpcError

__all__ = ["CONNECTIONS", "OFTEN", "PORTS", "SELDOM", "Dialler", "Ports", "Watch", "listening", "pause"]

#: Seconds from one look to the next, at least and at most; between them a part of the time that nothing has
#: happened for.
OFTEN, SELDOM = 0.5, 5.0
_PART = 8
PORTS = 128
CONNECTIONS = 256
_CONNECT_TIME = 5.0  # seconds; the kernel answers for the loopback at once, unless a backlog is full
_LINE = 150  # bytes of a line of /proc/net/tcp
_MOST = 4096 * _LINE  # bytes read of it
_LISTEN = "0A"
# Addresses as /proc/net/tcp and tcp6 write them: words in the byte order of x86.
_ANY4, _LOOPBACK4 = "00000000", "0100007F"
_ANY6, _LOOPBACK6 = "0" * 32, "0" * 24 + "01000000"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")

Ports = tuple[frozenset[int], frozenset[int]]
"""At 127.0.0.1, at ::1."""


def listening(tables: tuple[str, str] = _TABLES, own: Collection[int] = ()) -> Ports:
    """The ports as they are now, but for the agent's `own`. A table that is not there names none."""
    four, six = tables
    v4 = {port for address, port in _listeners(four) if address in {_ANY4, _LOOPBACK4}}
    v6: set[int] = set()
    for address, port in _listeners(six):
        if address in {_ANY6, _LOOPBACK6}:
            v6.add(port)
        if address == _ANY6:  # it has IPv4 too, unless it has said IPV6_V6ONLY, which no table tells
            v4.add(port)
    v4.difference_update(own)
    return frozenset(sorted(v4)[:PORTS]), frozenset(sorted(v6)[:PORTS])


def _listeners(path: str) -> Iterator[tuple[str, int]]:
    """Address and port of each; they stand before all that do not listen."""
    lines = _lines(path)
    next(lines, None)  # the header
    for line in lines:
        words = line.split(maxsplit=4)
        if len(words) < 4 or words[3] != _LISTEN:
            return
        address, _, port = words[1].partition(":")
        yield address, int(port, 16)


def _lines(path: str) -> Iterator[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rest, total = b"", 0
        while total < _MOST and (data := os.read(fd, 4096)):
            total += len(data)
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode("ascii", "replace")
    finally:
        os.close(fd)


def pause(quiet: float) -> float:
    """Seconds to the next look, when nothing has happened for `quiet` seconds."""
    return min(SELDOM, max(OFTEN, quiet / _PART))


class Watch:
    """Looks at the ports. `own`: the agent's, which are never told; they may become more."""

    def __init__(self, own: Collection[int] = ()) -> None:
        self._own = own
        self._since = asyncio.get_running_loop().time()  # when something happened last
        self._stirred = asyncio.Event()

    def stir(self) -> None:
        """Something has happened by which a port may come or go: look often again."""
        self._stirred.set()

    async def wait(self, known: Ports, seconds: float) -> Ports:
        """Return when there are others than `known`, or after `seconds`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            now = listening(own=self._own)
            if now != known:
                self._since = loop.time()
                return now
            if (left := end - loop.time()) <= 0:
                return now
            try:
                await asyncio.wait_for(self._stirred.wait(), min(left, pause(loop.time() - self._since)))
            except TimeoutError:
                continue
            self._stirred.clear()
            self._since = loop.time()
            await asyncio.sleep(OFTEN)  # who stirs all the time is not looked at all the time


class Dialler:
    """Connections between the host's streams and the guest's loopback. `refused` is called with each that
    cannot be made: the host takes the port for one that is listened at."""

    def __init__(self, streams: StreamListener, refused: Callable[[], None] = lambda: None) -> None:
        self._streams = streams
        self._refused = refused
        #: What runs, for whoever wants to see it end.
        self.relays: set[asyncio.Task[None]] = set()
        self._dialling = 0

    async def dial(self, port: int, v6: bool, stream: int) -> None:
        """Connect to `port` and join that with `stream`. Raises RpcError; the stream is closed then."""
        try:
            if len(self.relays) + self._dialling >= CONNECTIONS:
                raise RpcError(Code.RESOURCE_EXHAUSTED, f"{CONNECTIONS} connections to the loopback are open")
            self._dialling += 1
            try:
                await self._dial(port, v6, stream)
            finally:
                self._dialling -= 1
        except BaseException:
            self._streams.forget(stream)
            raise

    async def _dial(self, port: int, v6: bool, stream: int) -> None:
        if not 0 < port < 1 << 16:
            raise RpcError(Code.INVALID_ARGUMENT, f"{port} is no port")
        inner = socket.socket(
            socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        )
        try:
            address = ("::1" if v6 else "127.0.0.1", port)
            loop = asyncio.get_running_loop()
            await asyncio.wait_for(loop.sock_connect(inner, address), _CONNECT_TIME)
            outer = await self._streams.take(stream, _CONNECT_TIME)
        except TimeoutError:
            inner.close()
            raise RpcError(Code.DEADLINE_EXCEEDED, f"port {port} of the loopback does not answer") from None
        except OSError as error:
            inner.close()
            self._refused()
            cause = os.strerror(error.errno or 0)
            raise RpcError(Code.FAILED_PRECONDITION, f"port {port} of the loopback: {cause}") from None
        except BaseException:
            inner.close()
            raise
        task = asyncio.ensure_future(relay(outer, inner))
        self.relays.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.relays.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error(f"a relay failed: {task.exception()}")
