"""Stream connections find who asks for them, in any order, and unclaimed ones do not pile up."""

from __future__ import annotations

import asyncio

import pytest

from agent.stdio import streams
from tests.unit.agent.conftest import Host


async def test_arrived_before_it_is_asked_for(host: Host) -> None:
    ours = host.open(7)
    await asyncio.sleep(0.01)
    taken = await host.listener.take(7, 5)
    taken.send(b"hi")

    assert await asyncio.get_running_loop().sock_recv(ours, 10) == b"hi"
    taken.close()


async def test_asked_for_before_it_arrives(host: Host) -> None:
    taking = asyncio.ensure_future(host.listener.take(8, 5))
    await asyncio.sleep(0.01)
    host.open(8)

    (await asyncio.wait_for(taking, 5)).close()


async def test_an_id_in_pieces(host: Host) -> None:
    ours = host.connect()
    for byte in (99).to_bytes(4, "big"):
        ours.send(bytes([byte]))
        await asyncio.sleep(0.005)

    (await host.listener.take(99, 5)).close()


async def test_what_follows_the_id_is_kept(host: Host) -> None:
    host.connect().send((5).to_bytes(4, "big") + b"data")
    taken = await host.listener.take(5, 5)

    assert taken.recv(10) == b"data"
    taken.close()


async def test_one_that_never_comes(host: Host) -> None:
    with pytest.raises(TimeoutError):
        await host.listener.take(1, 0.01)


async def test_the_same_id_twice_is_refused(host: Host) -> None:
    host.open(3)
    await asyncio.sleep(0.01)
    second = host.open(3)

    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(second, 1), 5) == b""


async def test_nobody_asks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WAITING_TIME", 0.02)
    loop = asyncio.get_running_loop()
    named, silent = host.open(4), host.connect()

    assert await asyncio.wait_for(loop.sock_recv(named, 1), 5) == b""
    assert await asyncio.wait_for(loop.sock_recv(silent, 1), 5) == b""


async def test_who_would_have_asked_cannot_be_made(host: Host) -> None:
    ours = host.open(4)
    await asyncio.sleep(0.01)
    host.listener.forget(4)
    host.listener.forget(4)
    host.listener.forget(0)

    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1), 5) == b""


async def test_too_many_wait(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WAITING_MAX", 2)
    first = [host.connect(), host.connect()]
    await asyncio.sleep(0.01)
    third = host.connect()

    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(third, 1), 5) == b""
    for one in first:
        with pytest.raises(BlockingIOError):
            one.recv(1)
