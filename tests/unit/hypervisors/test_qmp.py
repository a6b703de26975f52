"""The QMP client pairs replies with commands; a peer that breaks the protocol ends it, no more."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from devices.errors import HypervisorError
from hypervisors.qemu.qmp import LINE_LIMIT, QmpClient, QmpError, QmpEvent, sensible
from tests.unit.turns import LIMIT, turns

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n'


class Peer:
    """QEMU's side of a socket pair, driven by the test."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        ours.setblocking(False)
        self.client_sock = theirs
        self._sock = ours
        self._buffer = b""
        self.events: list[QmpEvent] = []

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def reply(self, message: dict[str, Any]) -> None:
        await self.send(json.dumps(message).encode() + b"\r\n")

    async def receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
            assert data, "the client hung up"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._sock.close()

    async def greet(self) -> QmpClient:
        connecting = asyncio.create_task(
            QmpClient.connect(self.client_sock, timeout=5, on_event=self.events.append)
        )
        await self.send(GREETING)
        command = await self.receive()
        assert command["execute"] == "qmp_capabilities"
        await self.reply({"return": {}, "id": command["id"]})
        return await connecting


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    made = Peer()
    yield made
    made.close()
    made.client_sock.close()


async def test_a_command_gets_its_return_value(peer: Peer) -> None:
    client = await peer.greet()
    asking = asyncio.create_task(client.execute("query-status", {"deep": True}))
    command = await peer.receive()
    await peer.reply({"return": {"status": "running"}, "id": command["id"]})

    assert command == {"execute": "query-status", "arguments": {"deep": True}, "id": command["id"]}
    assert await asking == {"status": "running"}
    await client.close()


async def test_replies_out_of_order_and_between_events(peer: Peer) -> None:
    client = await peer.greet()
    first, second = (asyncio.create_task(client.execute(name)) for name in ("one", "two"))
    commands = [await peer.receive(), await peer.receive()]
    burst = b"".join(
        json.dumps(message).encode() + b"\n"
        for message in (
            {"event": "RESUME", "timestamp": {}},
            {"return": 2, "id": commands[1]["id"]},
            {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}},
            {"return": 1, "id": commands[0]["id"]},
        )
    )
    for start in range(0, len(burst), 7):  # in pieces that respect no line
        await peer.send(burst[start : start + 7])
        await asyncio.sleep(0)

    assert (await first, await second) == (1, 2)
    assert [event["event"] for event in peer.events] == ["RESUME", "SHUTDOWN"]
    await client.close()


async def test_a_refusal_carries_qemus_words(peer: Peer) -> None:
    client = await peer.greet()
    asking = asyncio.create_task(client.execute("device_add"))
    command = await peer.receive()
    await peer.reply({"error": {"class": "GenericError", "desc": "no such bus"}, "id": command["id"]})
    with pytest.raises(QmpError, match="QEMU refused device_add: no such bus") as caught:
        await asking

    assert caught.value.kind == "GenericError"
    await client.close()


async def test_a_command_that_timed_out_is_not_the_end(peer: Peer) -> None:
    client = await peer.greet()
    with pytest.raises(HypervisorError, match=r"did not answer slow within 0.02 s") as caught:
        await client.execute("slow", timeout=0.02)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    late = await peer.receive()
    await peer.reply({"return": "late", "id": late["id"]})
    asking = asyncio.create_task(client.execute("quick"))
    command = await peer.receive()
    await peer.reply({"return": "quick", "id": command["id"]})

    assert await asking == "quick"
    await client.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no json at all\n", "no JSON"),
        (b"[1, 2]\n", "no object"),
        (b"[" * 100_000 + b"\n", "no JSON"),
        (b'{"error": {"class": "GenericError", "desc": "what?"}}\n', "reply to nothing"),
        (b"\xff\xfe\n", "no JSON"),
        (b'{"event": "X", "data": {"n": Infinity}}\n', "no JSON"),
        (b'{"event": "X", "data": {"n": 1e999}}\n', "no JSON"),
        (b'{"event": "X", "data": {"n": 18446744073709551616}}\n', "no JSON"),
        (b'{"event": "X", "data": ' + b"[" * 500 + b"]" * 500 + b"}\n", "no JSON"),
    ],
)
async def test_garbage_fails_what_waits_and_what_comes(peer: Peer, data: bytes, reason: str) -> None:
    client = await peer.greet()
    asking = asyncio.create_task(client.execute("query-status"))
    await peer.receive()
    await peer.send(data)
    with pytest.raises(HypervisorError, match=reason):
        await asking
    with pytest.raises(HypervisorError, match=reason):
        await client.execute("query-status")
    await client.close()


async def test_an_endless_line_is_cut_off(peer: Peer) -> None:
    client = await peer.greet()
    asking = asyncio.create_task(client.execute("query-qmp-schema", timeout=60))
    await peer.receive()
    piece = b"x" * (1 << 20)

    async def flood() -> None:
        for _ in range((LINE_LIMIT >> 20) + 2):
            await peer.send(piece)

    flooding = asyncio.create_task(flood())
    with pytest.raises(HypervisorError, match="more than 1 MiB"):
        await asking
    await asyncio.gather(flooding, return_exceptions=True)
    await client.close()


async def test_a_peer_that_goes_away_mid_command(peer: Peer) -> None:
    client = await peer.greet()
    asking = asyncio.create_task(client.execute("query-status"))
    await peer.receive()
    await peer.send(b'{"return": ')
    peer.close()
    with pytest.raises(HypervisorError, match="closed its control socket"):
        await asking
    await client.close()


async def test_a_greeting_that_never_comes(peer: Peer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HypervisorError, match=r"did not answer within 0.05 s"):
        await QmpClient.connect(peer.client_sock, timeout=0.05)

    assert len(os.listdir("/proc/self/fd")) == before - 1


async def test_a_peer_that_is_gone_before_it_greets(peer: Peer) -> None:
    peer.close()
    with pytest.raises(HypervisorError, match="did not greet"):
        await QmpClient.connect(peer.client_sock, timeout=5)


async def test_unknown_and_absurd_ids_are_ignored(peer: Peer) -> None:
    client = await peer.greet()
    asking = asyncio.create_task(client.execute("query-status"))
    command = await peer.receive()
    for absurd in (999, "text", None, [1], {"a": 1}):
        await peer.reply({"return": "wrong", "id": absurd})
    await peer.reply({"return": "right", "id": command["id"]})

    assert await asking == "right"
    await client.close()


async def test_descriptors_go_along(peer: Peer) -> None:
    client = await peer.greet()
    reader, writer = os.pipe()
    try:
        asking = asyncio.create_task(client.execute("getfd", {"fdname": "tap"}, fds=[writer]))
        await asyncio.sleep(0.01)
        data, fds, _, _ = socket.recv_fds(peer._sock, 65536, 4)
        assert len(fds) == 1
        os.write(fds[0], b"through")
        os.close(fds[0])
        await peer.reply({"return": {}, "id": json.loads(data)["id"]})
        await asking

        assert os.read(reader, 10) == b"through"
    finally:
        os.close(reader)
        os.close(writer)
    await client.close()


async def test_close_is_idempotent(peer: Peer) -> None:
    client = await peer.greet()
    await client.close()
    await client.close()
    with pytest.raises(HypervisorError, match="closed"):
        await client.execute("query-status")


async def test_a_flood_of_events_holds_nobody_up(peer: Peer) -> None:
    """A VMM that a guest has taken over; somebody else's command is answered meanwhile."""
    client = await peer.greet()
    flood = b'{"event":"A"}\n' * 4096
    async with turns() as longest:
        sending = asyncio.create_task(peer.send(flood * 20))
        asking = asyncio.create_task(client.execute("query-status", timeout=60))
        command = await peer.receive()
        await sending
        await peer.reply({"return": "here", "id": command["id"]})
        assert await asking == "here"
    assert len(peer.events) == 20 * 4096
    assert longest.seconds < LIMIT / 4
    assert longest.count > 20 * 4096 / 64
    await client.close()


@pytest.mark.parametrize("answer", [None, 7, "text", [], {}, {"a": None}, [[]], [{"a": "x"}], [{"a": []}]])
def test_an_answer_of_another_shape_is_qemus_fault(answer: Any) -> None:
    with pytest.raises(HypervisorError, match="QEMU's answer to query-x makes no sense"), sensible("query-x"):
        next(int(each["a"]) for each in answer)
