"""The agent tells the ports of its loopback, and joins the host's streams with connections to them."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path

import pytest

from agent.network import loopback
from agent.network.loopback import OFTEN, PORTS, SELDOM, Dialler, Ports, Watch, listening, pause
from agent.network.relay import END, FRAME_MAX, RESET, relay
from tests.unit.agent.conftest import Host
from ttrpc import Code, RpcError

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def _line(address: str, port: int, state: str = "0A") -> str:
    return f"   0: {address}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0\n"


def _ports(v4: set[int], v6: set[int]) -> Ports:
    return frozenset(v4), frozenset(v6)


def _tables(directory: Path, four: str, six: str = "") -> tuple[str, str]:
    (directory / "tcp").write_text(HEADER + four)
    if six:
        (directory / "tcp6").write_text(HEADER + six)
    return str(directory / "tcp"), str(directory / "tcp6")


def test_what_localhost_reaches_is_told(tmp_path: Path) -> None:
    """Not what listens at another address; not what stands behind the listeners, which is much."""
    four = _line("0100007F", 80) + _line("00000000", 81) + _line("0200007F", 82) + _line("0100000A", 83)
    six = _line("0" * 32, 90) + _line("0" * 24 + "01000000", 91) + _line("B80D0120" + "0" * 24, 92)
    connection = _line("0100007F", 84, "01") + _line("0100007F", 85)

    assert listening(_tables(tmp_path, four + connection, six)) == _ports({80, 81, 90}, {90, 91})


def test_without_ipv6(tmp_path: Path) -> None:
    assert listening(_tables(tmp_path, "")) == _ports(set(), set())
    assert listening(_tables(tmp_path, _line("0100007F", 80))) == _ports({80}, set())


def test_many_are_cut_to_the_lowest(tmp_path: Path) -> None:
    four = "".join(_line("00000000", port) for port in range(20_000, 10_000, -1))
    v4, _ = listening(_tables(tmp_path, four))

    assert len(v4) == PORTS
    assert max(v4) < 20_000


async def test_a_port_that_comes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this kernel's own tables."""
    monkeypatch.setattr(loopback, "PORTS", 1 << 16)
    monkeypatch.setattr(loopback, "OFTEN", 0.01)
    with socket.socket() as one, socket.socket(socket.AF_INET6) as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("::", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
        known = listening()
        assert not known[0] & set(ports)
        waiting = asyncio.create_task(Watch().wait(known, 60))
        await asyncio.sleep(0)
        one.listen()
        two.listen()
        v4, v6 = await waiting
        if ports[1] not in v6:  # it looked between the two
            v4, v6 = listening()
        assert set(ports) <= v4
        assert ports[1] in v6
        assert ports[0] not in v6


async def test_waiting_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "listening", lambda own: (frozenset({1}), frozenset()))
    known = frozenset({1}), frozenset[int]()

    assert await Watch().wait(known, 0.01) == known


def test_the_longer_nothing_happens_the_seldomer_it_is_looked() -> None:
    assert [pause(quiet) for quiet in (0, 3, 8, 24, 40, 3600)] == [OFTEN, OFTEN, 1, 3, SELDOM, SELDOM]


async def test_what_happens_has_it_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And often from then on."""
    ports = [_ports({1}, set())]
    monkeypatch.setattr(loopback, "listening", lambda own: ports[0])
    monkeypatch.setattr(loopback, "OFTEN", 0.01)
    monkeypatch.setattr(loopback, "pause", lambda quiet: 3600)
    watch = Watch()
    waiting = asyncio.create_task(watch.wait(ports[0], 3600))
    await asyncio.sleep(0)
    ports[0] = _ports({1, 2}, set())
    watch.stir()

    async with asyncio.timeout(60):
        assert await waiting == _ports({1, 2}, set())


# --- connections


class Server:
    """Listens, and has the connections that were made."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]

    async def accept(self) -> socket.socket:
        async with asyncio.timeout(60):
            connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        connection.setblocking(False)
        return connection


async def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    async with asyncio.timeout(60):
        while len(data) < size and (piece := await asyncio.get_running_loop().sock_recv(sock, size)):
            data += piece
    return data


async def test_a_stream_is_joined_with_a_connection(host: Host) -> None:
    dialler, loop = Dialler(host.listener), asyncio.get_running_loop()
    with Server().listener as listener:
        listener.setblocking(False)
        dialling = asyncio.create_task(dialler.dial(listener.getsockname()[1], False, 7))
        outer = host.open(7)
        connection, _ = await loop.sock_accept(listener)
        await dialling
        with connection:
            connection.setblocking(False)
            await loop.sock_sendall(outer, b"\0\0\0\x02hi" + END)
            assert await _read(connection, 100) == b"hi"
            await loop.sock_sendall(connection, b"and back")
            assert await _read(outer, 12) == b"\0\0\0\x08and back"
            connection.shutdown(socket.SHUT_WR)
            assert await _read(outer, 8) == END + END
        outer.close()
        await asyncio.wait(dialler.relays)


async def test_nobody_listens(host: Host) -> None:
    """It is an error, the stream does not wait for anybody, and whoever looks for ports hears of it."""
    refused: list[bool] = []
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        outer = host.open(7)
        await asyncio.sleep(0)
        with pytest.raises(RpcError, match="Connection refused") as caught:
            await Dialler(host.listener, lambda: refused.append(True)).dial(bound.getsockname()[1], False, 7)
        assert caught.value.code == Code.FAILED_PRECONDITION
        assert await _read(outer, 1) == b""
        assert refused == [True]


@pytest.mark.parametrize("port", [0, 1 << 16])
async def test_what_is_no_port(host: Host, port: int) -> None:
    with pytest.raises(RpcError) as caught:
        await Dialler(host.listener).dial(port, True, 7)
    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_there_is_a_most_of_connections(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "CONNECTIONS", 1)
    dialler, server = Dialler(host.listener), Server()
    with server.listener:
        outer = host.open(1)
        await dialler.dial(server.port, False, 1)
        with await server.accept():
            with pytest.raises(RpcError) as caught:
                await dialler.dial(server.port, False, 2)
            assert caught.value.code == Code.RESOURCE_EXHAUSTED
            outer.close()
            await asyncio.wait(dialler.relays)


# --- bytes


class Joined:
    """Both far ends of a relay: `host` speaks frames, `program` is whoever listens in the guest."""

    def __init__(self) -> None:
        self.host, outer = socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            inner = socket.create_connection(listener.getsockname())
            self.program, _ = listener.accept()
        for one in (self.host, outer, inner, self.program):
            one.setblocking(False)
        self.work = asyncio.create_task(relay(outer, inner))

    async def close(self) -> None:
        self.host.close()
        self.program.close()
        await self.work


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def test_much_goes_both_ways_at_once() -> None:
    joined, loop = Joined(), asyncio.get_running_loop()
    data = os.urandom(1 << 20)
    framed = b"".join(
        len(part).to_bytes(4, "big") + part
        for part in (data[at : at + FRAME_MAX] for at in range(0, len(data), FRAME_MAX))
    )

    async def from_host() -> bytes:
        found = b""
        while size := int.from_bytes(await _read(joined.host, 4), "big"):
            found += await _read(joined.host, size)
        return found

    async def send(sock: socket.socket, what: bytes) -> None:
        await loop.sock_sendall(sock, what)
        if sock is joined.program:
            sock.shutdown(socket.SHUT_WR)

    got = await asyncio.gather(
        from_host(),
        _read(joined.program, len(data)),
        send(joined.host, framed + END),
        send(joined.program, data),
    )
    assert got[0] == data
    assert got[1] == data
    assert await _read(joined.host, 4) == END, "it has read ours"
    assert not joined.work.done(), "the host closes first"
    await joined.close()


async def test_a_reset_of_the_program_is_said() -> None:
    joined = Joined()
    await asyncio.get_running_loop().sock_sendall(joined.program, b"x")
    assert await _read(joined.host, 5) == b"\0\0\0\1x"
    _reset(joined.program)
    assert await _read(joined.host, 4) == RESET
    await joined.close()


@pytest.mark.parametrize("last", [b"", b"\0\0\0\5ab", b"\0\1\0\1", b"\xff" * 4])
async def test_a_host_that_closes_too_early_is_a_reset(last: bytes) -> None:
    """Before its end, within a frame, or after what is no frame."""
    joined = Joined()
    await asyncio.get_running_loop().sock_sendall(joined.host, b"\0\0\0\1x" + last)
    assert await _read(joined.program, 1) == b"x"
    joined.host.close()
    with pytest.raises(ConnectionResetError):
        await _read(joined.program, 3)
    await joined.close()


async def test_a_host_that_does_not_close_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.network.relay.LINGER", 0.05)
    joined = Joined()
    joined.program.shutdown(socket.SHUT_WR)
    await asyncio.get_running_loop().sock_sendall(joined.host, END)
    async with asyncio.timeout(60):
        await joined.work
    await joined.close()
