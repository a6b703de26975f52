"""The guest's end of name servers that listen on the loopback of the pod's network namespace.

What: `Resolver` takes what the guest's programs ask such an address, by UDP and TCP, hands each question to
the host on one stream, and gives back what the host answers. proto/loopback.proto says what is on the
stream.
Why by questions, not by connections: the host then decides where each goes, and that is an address that its
own resolv.conf names, port 53, and nothing else.
Invariants: at most `QUESTIONS` wait for an answer, each at most `PATIENCE` seconds; at most `CONNECTIONS`
ask by TCP; of what waits to be sent there are `QUEUE` messages. Beyond that questions are lost, as UDP loses
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
from collections.abc import Callable, Sequence

from agent import log
from agent.network.redirect import PORT, redirect
from agent.threads import in_thread

__all__ = ["CONNECTIONS", "HEAD", "MESSAGE", "PATIENCE", "QUESTIONS", "QUEUE", "Resolver"]

QUESTIONS = 256
CONNECTIONS = 32
QUEUE = 64
PATIENCE = 10.0  # seconds
MESSAGE = 65535  # bytes of a message of DNS at most
HEAD = struct.Struct(
    "!IIBB"
)  # length of what follows, number of the question, index of the address, whether TCP
LOCALHOST = "127.0.0.1"
_LENGTH = 4
_BURST = 16
_TRIES = 16

Answer = Callable[[bytes], None]


class Resolver:
    """For addresses of IPv4. `ports`: those of localhost that are not for the host to dial."""

    def __init__(self) -> None:
        self.ports: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, tuple[Answer, asyncio.TimerHandle]] = {}
        self._number = 0
        self._connections = 0
        self._out: asyncio.Queue[bytes] = asyncio.Queue(QUEUE)
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.Server] = []

    async def start(self, addresses: Sequence[str], stream: socket.socket) -> None:
        """Listen, have the addresses lead here, and serve `stream`, which is owned. Raises OSError,
        RpcError."""
        self._tasks = [
            asyncio.ensure_future(self._send(stream)),
            asyncio.ensure_future(self._receive(stream)),
        ]
        pairs = []
        if LOCALHOST in addresses:
            self.ports.add(PORT)  # who came back by the host's localhost would go round for ever
        for index, address in enumerate(addresses):
            udp, tcp = _listen()
            port = udp.getsockname()[1]
            self.ports.add(port)
            self._sockets.append(udp)
            self._loop.add_reader(udp, self._datagrams, index, udp)
            serve = functools.partial(self._connection, index)
            self._servers.append(await asyncio.start_server(serve, sock=tcp, limit=MESSAGE + 2))
            pairs.append((address, port))
        await in_thread("redirecting to the resolver", lambda: redirect(pairs))

    def close(self) -> None:
        """Serve no longer. The rules stay, and lead to nobody: it is refused, as without us."""
        for task in self._tasks:
            task.cancel()
        for server in self._servers:
            server.close()
        for number in list(self._waiting):
            self._answered(number, b"")
        for udp in self._sockets:
            self._loop.remove_reader(udp)
            udp.close()
        self._sockets.clear()

    async def ended(self) -> None:
        """Its stream has gone, and it with it."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        for server in self._servers:
            await server.wait_closed()

    # --- questions

    def _ask(self, index: int, tcp: bool, question: bytes, answer: Answer) -> bool:
        """Whether it is on its way."""
        if len(self._waiting) >= QUESTIONS:
            return False
        self._number = (self._number + 1) & 0xFFFFFFFF
        number = self._number
        frame = HEAD.pack(HEAD.size - _LENGTH + len(question), number, index, tcp) + question
        try:
            self._out.put_nowait(frame)
        except asyncio.QueueFull:
            return False
        timer = self._loop.call_later(PATIENCE, self._answered, number, b"")
        self._waiting[number] = (answer, timer)
        return True

    def _answered(self, number: int, data: bytes) -> None:
        found = self._waiting.pop(number, None)
        if found is not None:
            answer, timer = found
            timer.cancel()
            answer(data)

    def _datagrams(self, index: int, udp: socket.socket) -> None:
        for _ in range(_BURST):
            try:
                data, peer = udp.recvfrom(MESSAGE)
            except OSError:
                return
            self._ask(index, False, data, functools.partial(_reply, udp, peer))

    async def _connection(
        self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Questions of one connection, one after the other."""
        if self._connections >= CONNECTIONS:
            writer.close()
            return
        self._connections += 1
        try:
            while True:
                async with asyncio.timeout(PATIENCE):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    question = await reader.readexactly(size)
                answered: asyncio.Future[bytes] = self._loop.create_future()
                if not self._ask(index, True, question, functools.partial(_resolve, answered)):
                    return
                answer = await answered
                if not answer:
                    return
                writer.write(struct.pack("!H", len(answer)) + answer)
                async with asyncio.timeout(PATIENCE):
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # it has asked all, or is gone
        finally:
            self._connections -= 1
            writer.close()

    # --- the stream

    async def _send(self, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                await self._loop.sock_sendall(stream, await self._out.get())

    async def _receive(self, stream: socket.socket) -> None:
        try:
            while True:
                length, number, _, _ = HEAD.unpack(await self._exactly(stream, HEAD.size))
                size = length - (HEAD.size - _LENGTH)
                if not 0 <= size <= MESSAGE:
                    raise ConnectionAbortedError("the host sent an answer that is none")
                self._answered(number, await self._exactly(stream, size))
        except OSError as error:
            log.debug(f"the host resolves no longer: {error}")
        finally:
            self.close()
            stream.close()

    async def _exactly(self, stream: socket.socket, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = await self._loop.sock_recv(stream, size - len(data))
            if not piece:
                raise ConnectionResetError("the stream has ended")
            data += piece
        return bytes(data)


def _listen() -> tuple[socket.socket, socket.socket]:
    """By UDP and TCP, at one port of 127.0.0.1. Raises OSError."""
    for attempt in range(_TRIES):
        udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
        try:
            udp.bind((LOCALHOST, 0))
            tcp.bind((LOCALHOST, udp.getsockname()[1]))
            tcp.listen()
        except OSError:
            udp.close()
            tcp.close()
            if attempt == _TRIES - 1:
                raise
        else:
            udp.setblocking(False)
            tcp.setblocking(False)
            return udp, tcp
    raise AssertionError("unreachable")


def _reply(udp: socket.socket, peer: tuple[str, int], answer: bytes) -> None:
    if answer:
        with contextlib.suppress(OSError):  # who asked may be gone
            udp.sendto(answer, peer)


def _resolve(answered: asyncio.Future[bytes], answer: bytes) -> None:
    if not answered.done():
        answered.set_result(answer)
