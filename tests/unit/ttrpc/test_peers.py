"""Whoever may connect cannot take the server from others: by connections, halves of frames or calls."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from tests.unit.ttrpc.conftest import MakePair, Pair
from tests.unit.ttrpc.echo import ECHO
from tests.unit.turns import LIMIT, turns
from ttrpc import Client, Code, RpcError, _connection, _peers, _server
from ttrpc._frames import MAX_MESSAGE, encode_frame
from ttrpc._wire_pb2 import Request

M = ECHO.methods_by_name
HALF_A_HEADER = b"\0\0\0\4\0"


class Crowd:
    """Raw connections, their ends watched."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.socks: list[socket.socket] = []

    async def join(self, count: int, said: bytes = b"") -> None:
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            await asyncio.to_thread(sock.connect, self._path)  # waits while the backlog is full
            sock.setblocking(False)
            self.socks.append(sock)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(sock, said)

    def open(self) -> list[bool]:
        """Of each connection, whether the server keeps it."""
        found = []
        for sock in self.socks:
            try:
                found.append(sock.recv(1, socket.MSG_PEEK) != b"")
            except BlockingIOError:
                found.append(True)
            except ConnectionError:
                found.append(False)
        return found

    async def until_open(self, count: int) -> list[bool]:
        async with asyncio.timeout(20):
            while sum(found := self.open()) != count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return found


@pytest.fixture
async def crowd(pair: Pair) -> AsyncIterator[Crowd]:
    made = Crowd(pair.path)
    yield made
    for sock in made.socks:
        sock.close()


async def test_a_crowd_of_silent_peers_keeps_nobody_out(
    pair: Pair, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half headers and of nothing; the newest stay, and whoever has said something stays."""
    monkeypatch.setattr(_peers, "MAX_CONNECTIONS", 20)
    old = await pair.client()
    assert (await old.call(M["Echo"], BytesValue(value=b"1"), timeout=5)).value == b"1"
    async with turns() as longest:
        for number in range(20):
            await crowd.join(10, HALF_A_HEADER if number % 2 else b"")
        found = await crowd.until_open(19)
    assert found == [False] * 181 + [True] * 19
    assert longest.seconds < LIMIT
    new = await pair.client()
    for client in (old, new):
        assert (await client.call(M["Echo"], BytesValue(value=b"2"), timeout=5)).value == b"2"
    assert len(pair.server.connections) == 20


async def test_peers_that_speak_are_not_closed_for_newer_ones(
    pair: Pair, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_peers, "MAX_CONNECTIONS", 3)
    clients = [await pair.client() for _ in range(3)]
    for client in clients:
        await client.call(M["Echo"], BytesValue(), timeout=5)
    await crowd.join(5)
    await crowd.until_open(0)
    for client in clients:
        await client.call(M["Echo"], BytesValue(), timeout=5)
    await clients.pop().close()
    await crowd.join(1)
    assert await crowd.until_open(1) == [False] * 5 + [True]


async def test_halves_of_frames_are_held_up_to_a_bound(
    pair: Pair, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_peers, "MAX_HELD", 1 << 20)
    speaker = await pair.client()
    await speaker.call(M["Echo"], BytesValue(), timeout=5)
    half = struct.pack(">IIBB", MAX_MESSAGE, 1, 1, 0) + bytes(200_000)
    for _ in range(12):
        await crowd.join(1, half)
    found = await crowd.until_open(5)
    assert found == [False] * 7 + [True] * 5
    answer = await speaker.call(M["Echo"], BytesValue(value=bytes(2 << 20)), timeout=20)
    assert len(answer.value) == 2 << 20, "who has spoken may send what is larger than the bound"
    await speaker.call(M["Echo"], BytesValue(), timeout=5)


async def test_calls_of_all_peers_are_bounded(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "MAX_CALLS", 10)
    pair = await make_pair()
    clients = [await pair.client() for _ in range(4)]
    waiting = [
        asyncio.create_task(clients[number % 4].call(M["Wait"], Int64Value(value=60_000), timeout=None))
        for number in range(10)
    ]
    async with asyncio.timeout(10):
        while pair.server.peers.calls < 10:  # noqa: ASYNC110
            await asyncio.sleep(0)
    with pytest.raises(RpcError, match="10 calls are in progress") as caught:
        await clients[0].call(M["Echo"], BytesValue(), timeout=5)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    for call in waiting[:5]:
        call.cancel()
    await clients[1].close()
    async with asyncio.timeout(10):
        while pair.server.peers.calls >= 10:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await clients[0].call(M["Echo"], BytesValue(), timeout=5)
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_metadata_is_bounded(pair: Pair) -> None:
    """A message of 4 MiB has room for two million values; to sort them would take the loop for a second."""
    reader, writer = await pair.raw()
    pairs = b"\x2a\x00" * (MAX_MESSAGE // 2 - 100)  # field 5 of a Request, empty
    request = Request(service=ECHO.full_name, method="Echo").SerializeToString() + pairs
    assert len(Request.FromString(request).metadata) > 2_000_000
    async with turns() as longest:
        writer.write(encode_frame(1, 1, 0, request))
        header = await reader.readexactly(10)
        answer = await reader.readexactly(int.from_bytes(header[:4], "big"))
    assert b"more than 1024 values of metadata" in answer
    assert longest.seconds < 3 * LIMIT  # most of it is protobuf's parser
    client = await pair.client()
    many = {f"k{number}": "v" for number in range(_connection.MAX_METADATA)}
    await client.call(M["Echo"], BytesValue(), timeout=5, metadata=many)


async def test_a_client_waits_while_the_backlog_is_full(tmp_path: Path) -> None:
    """It is not taken for connected, and not refused, but by its deadline."""
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        first.connect(path)
        with pytest.raises(TimeoutError):
            await Client.connect_unix(path, timeout=0.05)
        connecting = asyncio.create_task(Client.connect_unix(path, timeout=20))
        await asyncio.sleep(0.02)
        assert not connecting.done()
        stack.enter_context(listener.accept()[0])
        client = await connecting
        stack.enter_context(listener.accept()[0])
        await client.close()
