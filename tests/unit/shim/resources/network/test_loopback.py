"""What dials localhost in a pod's namespace reaches the guest's, where something listens, and only there."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from agent.network import relay as guest_relay
from devices.errors import GuestError
from devices.frames import END, FRAME_MAX
from shim.resources.network import loopback
from shim.resources.network.loopback import CONNECTIONS, PORTS, Ports, mirror
from shim.resources.network.relay import Frames
from tests.netlab import NetLab

NONE: Ports = (frozenset(), frozenset())
SIZE = 1 << 20


class Guest:
    """An agent with the real agent's relay; behind each of its ports is a server of the test's."""

    def __init__(self) -> None:
        self.able = True
        self.ports = NONE
        self.servers: dict[int, tuple[str, int]] = {}
        self.asked = 0
        self._changed = asyncio.Event()
        self._streams: dict[int, socket.socket] = {}
        self._relays: set[asyncio.Task[None]] = set()

    def listens(self, *ports: int, v6: tuple[int, ...] = ()) -> None:
        self.ports = frozenset(ports), frozenset(v6)
        self._changed.set()

    async def has_loopback(self) -> bool:
        return self.able

    async def listening(self, known: Ports, wait: float) -> Ports:
        assert wait > 0
        self.asked += 1
        while known == self.ports:
            self._changed.clear()
            await self._changed.wait()
        return self.ports

    async def open_stream(self) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._streams[len(self._streams)] = theirs
        return ours, len(self._streams) - 1

    async def dial(self, port: int, v6: bool, stream: int) -> None:
        if port not in self.servers:
            self._streams[stream].close()
            raise GuestError(f"port {port} of the loopback: refused")
        inner = socket.socket()
        inner.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(inner, self.servers[port])
        except BaseException:
            inner.close()
            self._streams[stream].close()
            raise
        self._relays.add(asyncio.create_task(guest_relay.relay(self._streams[stream], inner)))

    async def over(self) -> None:
        """All its connections have ended."""
        if self._relays:
            await asyncio.wait(self._relays)


class Pod:
    """The namespace: who dials there, and who listens."""

    def __init__(self, lab: NetLab, guest: Guest) -> None:
        self.lab = lab
        self.guest = guest
        self.work: asyncio.Task[None] | None = None

    def start(self) -> None:
        pid = self.lab.pod_pid
        self.work = asyncio.create_task(mirror(pid, self.guest, self.guest.open_stream))

    async def stop(self) -> None:
        if self.work is not None:
            self.work.cancel()
            await asyncio.wait([self.work])

    def listeners(self) -> set[tuple[str, int]]:
        """Address and port of each."""
        text = self.lab.sh("pod", "cat /proc/net/tcp /proc/net/tcp6")
        words = [line.split() for line in text.splitlines()]
        found = (word[1].split(":") for word in words if word[3] == "0A")
        return {(address, int(port, 16)) for address, port in found}

    async def until(self, count: int) -> set[tuple[str, int]]:
        """There are so many listeners."""
        async with asyncio.timeout(60):
            while len(found := await asyncio.to_thread(self.listeners)) != count:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return found

    async def dial(self, port: int, address: str = "127.0.0.1") -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        client = self.lab.inside("pod", lambda: socket.socket(family))
        client.setblocking(False)
        try:
            async with asyncio.timeout(60):
                await asyncio.get_running_loop().sock_connect(client, (address, port))
        except BaseException:
            client.close()
            raise
        return client


@pytest.fixture
async def pod(lab: NetLab, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pod]:
    monkeypatch.setattr(loopback, "PACE", 0.01)
    made = Pod(lab, Guest())
    yield made
    await made.stop()


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, int]]:
    """Reads to the end, then says how much it was and its hash, and sends as much back."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(-1)
        writer.write(hashlib.sha256(data).digest() + data[::-1])
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield listening.sockets[0].getsockname()
    listening.close()


async def _all(client: socket.socket) -> bytes:
    found = bytearray()
    async with asyncio.timeout(60):
        while piece := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            found += piece
    return bytes(found)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_megabyte_each_way_and_a_half_close(pod: Pod, server: tuple[str, int], address: str) -> None:
    pod.guest.servers[8080] = server
    pod.guest.listens(8080, v6=(8080,))
    pod.start()
    await pod.until(2)
    data = os.urandom(SIZE)
    with await pod.dial(8080, address) as client:
        await asyncio.get_running_loop().sock_sendall(client, data)
        client.shutdown(socket.SHUT_WR)
        assert await _all(client) == hashlib.sha256(data).digest() + data[::-1]
    await pod.guest.over()


async def test_nothing_listens_where_nobody_does(pod: Pod, server: tuple[str, int]) -> None:
    """A port that comes is had, one that goes is refused again; who is connected stays it."""
    pod.guest.servers[80] = server
    pod.start()
    assert await pod.until(0) == set()
    pod.guest.listens(80)
    assert await pod.until(1) == {("0100007F", 80)}
    with pytest.raises(ConnectionRefusedError):
        await pod.dial(81)
    with await pod.dial(80) as client:
        await asyncio.get_running_loop().sock_sendall(client, b"before")
        pod.guest.listens()
        await pod.until(0)
        with pytest.raises(ConnectionRefusedError):
            await pod.dial(80)
        await asyncio.get_running_loop().sock_sendall(client, b" and after")
        client.shutdown(socket.SHUT_WR)
        assert (await _all(client)).endswith(b"retfa dna erofeb")


async def test_with_the_pod_all_of_it_ends(pod: Pod, server: tuple[str, int]) -> None:
    pod.guest.servers[80] = server
    pod.guest.listens(80)
    pod.start()
    await pod.until(1)
    with await pod.dial(80) as client:
        await asyncio.get_running_loop().sock_sendall(client, b"x")
        await pod.stop()
        assert await asyncio.to_thread(pod.listeners) == set()
        with pytest.raises(ConnectionResetError):
            await _all(client)
    await pod.guest.over()


async def test_what_the_guest_refuses_is_reset(pod: Pod) -> None:
    """It listened when we looked."""
    pod.guest.listens(80)
    pod.start()
    await pod.until(1)
    with pytest.raises(ConnectionResetError), await pod.dial(80) as client:
        await _all(client)


async def test_a_reset_comes_through_both_ways(pod: Pod) -> None:
    ends: asyncio.Queue[str] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word = await reader.readexactly(5)
        try:
            if word == b"reset":
                writer.write(b"last words")
                await writer.drain()
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                await reader.read()
        except OSError as error:
            ends.put_nowait(errno.errorcode[error.errno or 0])
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    pod.guest.servers[80] = listening.sockets[0].getsockname()
    pod.guest.listens(80)
    pod.start()
    await pod.until(1)
    loop = asyncio.get_running_loop()
    with await pod.dial(80) as client:
        await loop.sock_sendall(client, b"reset")
        with pytest.raises(ConnectionResetError):
            await _all(client)
    client = await pod.dial(80)
    await loop.sock_sendall(client, b"other")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    async with asyncio.timeout(60):
        assert await ends.get() == "ECONNRESET"
    await pod.guest.over()
    listening.close()


async def test_a_port_of_somebody_elses_stays_his(pod: Pod, server: tuple[str, int]) -> None:
    pod.guest.servers |= {80: server, 81: server}
    with pod.lab.inside("pod", socket.socket) as other:
        other.bind(("127.0.0.1", 80))
        other.listen()
        pod.guest.listens(80, 81)
        pod.start()
        await pod.until(2)
        with await pod.dial(80):
            other.settimeout(60)
            accepted, _ = await asyncio.to_thread(other.accept)
            accepted.close()


async def test_there_is_a_most_of_connections(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is reset, and those that are there go on."""
    monkeypatch.setattr(loopback, "CONNECTIONS", 2)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0)
    pod.guest.servers[80] = listening.sockets[0].getsockname()
    pod.guest.listens(80)
    pod.start()
    await pod.until(1)
    loop = asyncio.get_running_loop()
    with await pod.dial(80) as one, await pod.dial(80) as two:
        for client in (one, two):
            await loop.sock_sendall(client, b"here")
            assert await loop.sock_recv(client, 4) == b"here"
        with pytest.raises(ConnectionResetError), await pod.dial(80) as three:
            await _all(three)
        await loop.sock_sendall(one, b"still")
        assert await loop.sock_recv(one, 5) == b"still"
    await pod.guest.over()
    listening.close()


async def test_a_hostile_guest_has_few_ports_and_no_address(pod: Pod) -> None:
    """Whatever numbers it says, however often: the loopback's address only, so many ports and no more, and it
    is asked no faster."""
    pod.guest.ports = frozenset(range(1 << 17)), frozenset({0, 1 << 16, 1 << 31, *range(5000, 7000)})
    pod.start()
    found = await pod.until(2 * PORTS)
    assert {address for address, _ in found} == {"0100007F", "0" * 24 + "01000000"}
    assert {port for _, port in found} == {*range(1, PORTS + 1), *range(5000, 5000 + PORTS)}


async def test_the_hosts_own_namespace_and_a_stock_agent_get_nothing(pod: Pod) -> None:
    pod.guest.listens(80)
    await mirror(os.getpid(), pod.guest, pod.guest.open_stream)
    assert pod.guest.asked == 0
    pod.guest.able = False
    pod.start()
    assert pod.work is not None
    await pod.work
    assert pod.guest.asked == 0


def _taken(stream: bytes, cut: int) -> tuple[bytes, int, bool]:
    frames, found = Frames(), b""
    for at in range(0, len(stream), cut):
        found += b"".join(frames.payloads(memoryview(stream[at : at + cut])))
    return found, frames.ends, frames.broken


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 1000])
def test_frames_may_be_cut_anywhere(cut: int) -> None:
    def frame(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    end, reset = guest_relay.END, guest_relay.RESET
    assert _taken(frame(b"a" * 9) + frame(b"b") + end, cut) == (b"a" * 9 + b"b", 1, False)
    assert _taken(frame(b"a") + end + end, cut) == (b"a", 2, False)
    assert _taken(frame(b"a") + reset + frame(b"b"), cut) == (b"a", 0, True)
    assert _taken(end + reset, cut) == (b"", 1, True)
    assert _taken(end + frame(b"late"), cut)[2], "nothing comes after an end"
    assert _taken((FRAME_MAX + 1).to_bytes(4, "big"), cut)[2]


def test_both_ends_speak_of_the_same() -> None:
    from shim.resources.network import relay

    assert (END, relay.RESET, FRAME_MAX) == (
        guest_relay.END,
        guest_relay.RESET,
        guest_relay.FRAME_MAX,
    )
    assert guest_relay.CHUNK <= FRAME_MAX
    assert relay.CHUNK <= guest_relay.FRAME_MAX
    assert CONNECTIONS <= 256
