"""Name servers that listen on the loopback of the pod's network namespace, for the guest.

What: `loopback_servers` finds them in a resolv.conf; `resolve` answers what the guest asks them. Docker's
for networks that users make is at 127.0.0.11 there, which in the guest is the guest's own loopback.
Why by questions, not by connections: the guest says which of the addresses it asks, by its index, and a
message of DNS; so it reaches port 53 of those that the host's resolv.conf names, in the pod's own namespace,
and nothing else.
Invariants: at most `SERVERS` addresses, `QUESTIONS` questions at a time, each at most `PATIENCE` seconds:
what comes meanwhile waits in the guest. A socket is made for each question, by a thread in the namespace,
and closed with it. An address at which nobody answers in the namespace is left to the guest, whose own
server may have it.
Source: resolv.conf(5); RFC 1035, 4.2.2, for messages by TCP.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

import structlog

from devices.errors import KataError
from shim.resources.network.netns import Netns

__all__ = [
    "HEAD",
    "MESSAGE",
    "PATIENCE",
    "QUESTIONS",
    "SERVERS",
    "ResolverAgent",
    "answering",
    "loopback_servers",
    "read_question",
    "resolve",
    "set_up",
]

#: As many as a resolver asks (MAXNS of resolv.conf(5)).
SERVERS = 3
QUESTIONS = 32
#: Seconds for an answer: as long as resolvers wait for one.
PATIENCE = 5.0
MESSAGE = 65535
HEAD = struct.Struct(
    "!IIBB"
)  # length of what follows, number of the question, index of the address, whether TCP
_LENGTH = 4
_PORT = 53
OpenStream = Callable[[], Awaitable[tuple[socket.socket, int]]]
_PROBE = 1.0  # seconds; the kernel answers for the loopback at once

_log = structlog.get_logger("network")


def loopback_servers(lines: Iterable[str]) -> list[str]:
    """The addresses in 127.0.0.0/8 among a resolv.conf's name servers, as they stand there."""
    found: list[str] = []
    for line in lines:
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            address = ipaddress.IPv4Address(words[1])
        except ValueError:
            continue
        if address.is_loopback and str(address) not in found:
            found.append(str(address))
    return found[:SERVERS]


class ResolverAgent(Protocol):
    """What is asked of the guest's agent. Each raises KataError."""

    async def has_loopback(self) -> bool:
        """Whether it can do the other one."""
        ...

    async def resolve(self, addresses: Sequence[str], stream: int) -> None:
        """Have what the guest asks these addresses come by the stream of this number."""
        ...


async def set_up(
    pid: int, addresses: Sequence[str], agent: ResolverAgent, open_stream: OpenStream
) -> Coroutine[Any, Any, None] | None:
    """Have the guest ask us instead of those addresses that answer in the namespace of the process `pid`.
    What answers it, to be run until the pod ends; None where there is nothing to do. Never raises
    KataError."""
    try:
        netns = Netns.open(f"/proc/{pid}/ns/net")
    except KataError as error:
        _log.warning("names are not resolved for the guest", error=str(error))
        return None
    if netns is None:
        return None
    stream = None
    try:
        there = await answering(netns, addresses)
        if there and await agent.has_loopback():
            stream, number = await open_stream()
            await agent.resolve(there, number)
            _log.info("names are resolved for the guest", servers=there)
            work = _resolve(netns, there, stream)
            netns = stream = None  # which has them now
            return work
    except (KataError, OSError) as error:
        _log.warning("names are not resolved for the guest", servers=addresses, error=str(error))
    finally:
        if stream is not None:
            stream.close()
        if netns is not None:
            netns.close()
    return None


async def _resolve(netns: Netns, addresses: Sequence[str], stream: socket.socket) -> None:
    try:
        await resolve(netns, addresses, stream)
    finally:
        netns.close()


async def answering(netns: Netns, addresses: Sequence[str]) -> list[str]:
    """Those at whose port 53 somebody listens, by TCP as every name server does. Raises OSError,
    HostError."""
    return await netns.run(lambda: [address for address in addresses if _answers(address)])


def _answers(address: str) -> bool:
    try:
        socket.create_connection((address, _PORT), _PROBE).close()
    except OSError:
        return False
    return True


async def resolve(netns: Netns, addresses: Sequence[str], stream: socket.socket) -> None:
    """Answer what comes on `stream` until it ends or this is cancelled. `stream` is owned."""
    loop, turn, sending = asyncio.get_running_loop(), asyncio.Semaphore(QUESTIONS), asyncio.Lock()

    async def answer(number: int, address: str, tcp: bool, question: bytes) -> None:
        try:
            try:
                async with asyncio.timeout(PATIENCE):
                    said = await (_by_tcp if tcp else _by_udp)(netns, address, question)
            except (OSError, KataError) as error:  # TimeoutError is one of the former
                _log.debug("a name server did not answer", address=address, error=str(error))
                said = b""
            async with sending:
                await loop.sock_sendall(
                    stream, HEAD.pack(HEAD.size - _LENGTH + len(said), number, 0, tcp) + said
                )
        finally:
            turn.release()

    try:
        async with asyncio.TaskGroup() as answers:
            while True:
                asked = await read_question(stream, addresses)
                await turn.acquire()
                answers.create_task(answer(*asked))
    except* OSError as errors:
        _log.debug("names are not resolved for the guest any more", error=str(errors.exceptions[0]))
    finally:
        stream.close()


async def read_question(stream: socket.socket, addresses: Sequence[str]) -> tuple[int, str, bool, bytes]:
    """Its number, whom it is for, whether by TCP, and the question. Raises OSError at the end, and for what
    is no question."""
    length, number, index, tcp = HEAD.unpack(await _exactly(stream, HEAD.size))
    size = length - (HEAD.size - _LENGTH)
    if not 0 < size <= MESSAGE or index >= len(addresses):
        raise ConnectionAbortedError("the guest's agent asked what is no question")
    return number, addresses[index], bool(tcp), await _exactly(stream, size)


async def _socket(netns: Netns, kind: int) -> socket.socket:
    made: list[socket.socket] = []
    try:
        await netns.run(lambda: made.append(socket.socket(socket.AF_INET, kind)))
    except BaseException:
        for sock in made:
            sock.close()
        raise
    made[0].setblocking(False)
    return made[0]


async def _by_udp(netns: Netns, address: str, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with await _socket(netns, socket.SOCK_DGRAM) as sock:
        await loop.sock_connect(sock, (address, _PORT))
        await loop.sock_sendall(sock, question)
        return await loop.sock_recv(sock, MESSAGE)


async def _by_tcp(netns: Netns, address: str, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with await _socket(netns, socket.SOCK_STREAM) as sock:
        await loop.sock_connect(sock, (address, _PORT))
        await loop.sock_sendall(sock, struct.pack("!H", len(question)) + question)
        (size,) = struct.unpack("!H", await _exactly(sock, 2))
        return await _exactly(sock, size)


async def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise ConnectionResetError("it has ended")
        data += piece
    return bytes(data)
