"""The guest asks name servers on the loopback of the pod's namespace: its resolv.conf's and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from agent.network import resolver as guest_side
from agent.network.redirect import redirect
from devices.errors import GuestError
from shim.resources.network import resolver
from shim.resources.network.netns import Netns
from shim.resources.network.resolver import HEAD, MESSAGE, QUESTIONS, loopback_servers, resolve, set_up
from tests.netlab import NetLab
from tests.unit.turns import LIMIT, turns

SERVER = "127.0.0.11"


class NameServer:
    """In the pod's namespace, by UDP and TCP: it answers with what it was asked, backwards, and notes it.
    What begins with "silence" it does not answer."""

    def __init__(self, lab: NetLab, address: str = SERVER, port: int = 53) -> None:
        self.asked: list[bytes] = []
        self._udp = lab.inside("pod", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._udp.bind((address, port))
        self._tcp = lab.inside("pod", lambda: socket.create_server((address, port)))
        self._threads = [threading.Thread(target=work) for work in (self._datagrams, self._connections)]
        for thread in self._threads:
            thread.start()

    def _datagrams(self) -> None:
        while True:
            question, peer = self._udp.recvfrom(MESSAGE)
            if not question:
                return
            self.asked.append(question)
            if not question.startswith(b"silence"):
                self._udp.sendto(question[::-1], peer)

    def _connections(self) -> None:
        while True:
            try:
                connection, _ = self._tcp.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as file:
                head = file.read(2)
                if len(head) == 2:  # whoever only looks whether we are there says nothing
                    question = file.read(struct.unpack("!H", head)[0])
                    self.asked.append(question)
                    connection.sendall(head + question[::-1])

    def close(self, lab: NetLab) -> None:
        with lab.inside("pod", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as last:
            last.sendto(b"", self._udp.getsockname())
        self._tcp.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
        self._udp.close()
        self._tcp.close()


@pytest.fixture
def server(lab: NetLab) -> Iterator[NameServer]:
    made = NameServer(lab)
    yield made
    made.close(lab)


class Agent:
    """The real agent's end, in the test's own namespace: without rules, who asks knows its ports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.able = True
        self.ports: list[int] = []
        self.addresses: list[str] = []
        self._streams: list[socket.socket] = []
        self._made: list[guest_side.Resolver] = []
        monkeypatch.setattr(guest_side, "redirect", self._redirect)

    def _redirect(self, pairs: list[tuple[str, int]]) -> None:
        self.addresses = [address for address, _ in pairs]
        self.ports = [port for _, port in pairs]

    async def has_loopback(self) -> bool:
        return self.able

    async def open_stream(self) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        for one in (ours, theirs):
            one.setblocking(False)
        self._streams.append(theirs)
        return ours, len(self._streams) - 1

    async def resolve(self, addresses: Sequence[str], stream: int) -> None:
        made = guest_side.Resolver()
        self._made.append(made)
        await made.start(addresses, self._streams[stream])

    async def udp(self, question: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", self.ports[0]))
            await loop.sock_sendall(sock, question)
            async with asyncio.timeout(60):
                return await loop.sock_recv(sock, MESSAGE)

    async def tcp(self, *questions: bytes) -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[0])
        found = []
        async with asyncio.timeout(60):
            for question in questions:
                writer.write(struct.pack("!H", len(question)) + question)
                (size,) = struct.unpack("!H", await reader.readexactly(2))
                found.append(await reader.readexactly(size))
        writer.close()
        await writer.wait_closed()
        return found

    async def over(self) -> None:
        for one in self._made:
            await one.ended()


@pytest.fixture
async def agent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    made = Agent(monkeypatch)
    yield made
    await made.over()


async def test_both_ways_to_ask(lab: NetLab, server: NameServer, agent: Agent) -> None:
    """Of two servers that resolv.conf names only one is there; the other is the guest's own matter."""
    pid = lab.pod_pid
    work = await set_up(pid, ["127.0.0.53", SERVER], agent, agent.open_stream)
    assert work is not None
    assert agent.addresses == [SERVER]
    answering = asyncio.create_task(work)
    try:
        many = [f"question {number}".encode() for number in range(3 * QUESTIONS)]
        assert await asyncio.gather(*map(agent.udp, many)) == [one[::-1] for one in many]
        large = bytes(range(256)) * 255
        assert await agent.tcp(b"one", large, b"three") == [b"eno", large[::-1], b"eerht"]
    finally:
        answering.cancel()
        await asyncio.wait([answering])
    await agent.over()
    with pytest.raises(ConnectionRefusedError):
        await agent.tcp(b"after the end")


async def test_a_server_behind_rules_as_dockers_is(lab: NetLab, agent: Agent) -> None:
    """It listens at another port, and rules of the namespace lead there."""
    there = NameServer(lab, "127.0.0.1", 5353)
    answering = None
    try:
        lab.inside("pod", lambda: redirect([(SERVER, 5353)]))
        work = await set_up(lab.pod_pid, [SERVER], agent, agent.open_stream)
        assert work is not None
        answering = asyncio.create_task(work)
        assert await agent.udp(b"udp") == b"pdu"
        assert await agent.tcp(b"tcp") == [b"pct"]
    finally:
        if answering is not None:
            answering.cancel()
            await asyncio.wait([answering])
        there.close(lab)


async def test_a_server_that_does_not_answer_is_no_standstill(
    lab: NetLab, server: NameServer, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "PATIENCE", 0.2)
    work = await set_up(lab.pod_pid, [SERVER], agent, agent.open_stream)
    assert work is not None
    answering = asyncio.create_task(work)
    silent = [asyncio.create_task(agent.udp(b"silence")) for _ in range(2 * QUESTIONS)]
    await asyncio.sleep(0)
    assert await agent.udp(b"hello") == b"olleh"
    for one in (*silent, answering):
        one.cancel()
    await asyncio.wait([*silent, answering])


async def test_who_asks_while_the_shim_goes_is_not_left_waiting(agent: Agent) -> None:
    """By TCP: the connection ends."""
    ours, number = await agent.open_stream()
    await agent.resolve([SERVER], number)
    reader, writer = await asyncio.open_connection("127.0.0.1", agent.ports[0])
    writer.write(b"\0\5hello")
    async with asyncio.timeout(60):
        asked = await asyncio.get_running_loop().sock_recv(ours, 100)
        assert asked.endswith(b"\0\1hello")
        ours.close()
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_who_gets_nothing(
    lab: NetLab, server: NameServer, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own network, servers that are not there, a stock agent, an agent that fails."""
    pid = lab.pod_pid
    assert await set_up(1, [SERVER], agent, agent.open_stream) is None
    assert await set_up(pid, ["127.0.0.12"], agent, agent.open_stream) is None
    agent.able = False
    assert await set_up(pid, [SERVER], agent, agent.open_stream) is None

    class Failing(Agent):
        async def resolve(self, addresses: Sequence[str], stream: int) -> None:
            self._streams[stream].close()
            raise GuestError("no rules")

    failing = Failing(monkeypatch)
    assert await set_up(pid, [SERVER], failing, failing.open_stream) is None
    assert server.asked == []


def test_what_a_resolv_conf_names() -> None:
    lines = [
        "# nameserver 127.0.0.1",
        "nameserver 127.0.0.11",
        "nameserver 10.0.0.2",
        "nameserver",
        "search x",
    ]
    lines += ["nameserver ::1", "nameserver 127.0.0.11", "nameserver 127.1", "nameserver 127.0.0.1 # one"]
    assert loopback_servers(lines) == [SERVER, "127.0.0.1"]
    assert (
        len(loopback_servers(f"nameserver 127.0.0.{number}" for number in range(1, 99))) == resolver.SERVERS
    )


def _question(data: bytes, *, index: int = 0, size: int | None = None) -> bytes:
    length = HEAD.size - 4 + (len(data) if size is None else size)
    return HEAD.pack(length, 1, index, 0) + data


@pytest.mark.parametrize(
    "said",
    [
        _question(b"x", index=1),
        _question(b"x", index=255),
        _question(b""),
        _question(b"x", size=MESSAGE + 1),
        _question(b"x", size=-1),
        b"\xff" * 100,
        _question(b"cut", size=100),
    ],
    ids=["next index", "last index", "empty", "too long", "too short", "garbage", "cut off"],
)
async def test_a_hostile_guest_reaches_nobody_else(lab: NetLab, server: NameServer, said: bytes) -> None:
    """An address that was not given to it, or what is no question, ends the stream."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    netns = Netns.open(lab.pod)
    assert netns is not None
    with theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(60):
            await resolve(netns, [SERVER], ours)
        with contextlib.suppress(ConnectionResetError):  # it has not read all of it
            assert theirs.recv(100) == b""
    netns.close()
    assert server.asked == []


async def test_a_flood_of_questions_holds_nobody_up(lab: NetLab, server: NameServer) -> None:
    """Whose answers nobody reads: they wait in the guest."""
    ours, theirs = socket.socketpair()
    for one in (ours, theirs):
        one.setblocking(False)
    netns = Netns.open(lab.pod)
    assert netns is not None
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(resolve(netns, [SERVER], ours))
    flood = asyncio.create_task(loop.sock_sendall(theirs, _question(bytes(20_000)) * 2000))
    async with turns() as longest, asyncio.timeout(60):
        while len(server.asked) < QUESTIONS // 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not flood.done()
    for task in (flood, work):
        task.cancel()
    await asyncio.wait([flood, work])
    theirs.close()
    netns.close()
    assert longest.seconds < LIMIT


def test_both_ends_speak_of_the_same() -> None:
    assert HEAD.format == guest_side.HEAD.format
    assert guest_side.MESSAGE == MESSAGE
    assert guest_side.PATIENCE > resolver.PATIENCE
