"""A guest says what it likes of its ports and sends what it likes: it gets no more of the pod's localhost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from shim.resources.network import loopback
from shim.resources.network.loopback import PORTS, Ports, mirror
from shim.resources.network.relay import relay
from tests.netlab import NetLab
from tests.unit.turns import LIMIT, turns

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

LOOPBACK = {"0100007F", "0" * 24 + "01000000"}


class Hostile:
    """Answers at once, with other ports each time."""

    def __init__(self) -> None:
        self.asked = 0

    async def has_loopback(self) -> bool:
        return True

    async def listening(self, known: Ports, wait: float) -> Ports:
        self.asked += 1
        first = self.asked * 1000 % 40_000
        return frozenset({0, 1 << 31, *range(first, first + 20_000)}), frozenset(range(first, 1 << 17))

    async def dial(self, port: int, v6: bool, stream: int) -> None:
        raise AssertionError("nobody has dialled")

    async def open_stream(self) -> tuple[socket.socket, int]:
        raise AssertionError("nobody has dialled")


def _listeners(lab: NetLab) -> list[tuple[str, int]]:
    lines = lab.sh("pod", "cat /proc/net/tcp /proc/net/tcp6").splitlines()
    places = [line.split()[1].split(":") for line in lines if line.split()[3] == "0A"]
    return [(address, int(port, 16)) for address, port in places]


async def test_ports_that_change_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more listeners than there may be, never at another address, and the loop goes on."""
    monkeypatch.setattr(loopback, "PACE", 0.01)
    guest = Hostile()
    with NetLab() as lab:
        pid = lab.pod_pid
        work = asyncio.create_task(mirror(pid, guest, guest.open_stream))
        async with turns() as longest, asyncio.timeout(60):
            while guest.asked < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for _ in range(5):
            found = await asyncio.to_thread(_listeners, lab)
            assert {address for address, _ in found} <= LOOPBACK
            assert len(found) <= 2 * PORTS
        work.cancel()
        await asyncio.wait([work])
        assert _listeners(lab) == []
    assert longest.seconds < LIMIT


async def test_the_guest_is_asked_at_our_pace() -> None:
    guest = Hostile()
    with NetLab() as lab:
        pid = lab.pod_pid
        before = asyncio.get_running_loop().time()
        work = asyncio.create_task(mirror(pid, guest, guest.open_stream))
        async with asyncio.timeout(60):
            while guest.asked < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - before >= 2 * loopback.PACE
        work.cancel()
        await asyncio.wait([work])


def _drops() -> Iterator[bytes]:
    while True:
        yield b"\0\0\0\1x" * 10_000


def _ends() -> Iterator[bytes]:
    yield bytes(4)
    while True:
        yield bytes(1 << 16)


def _large() -> Iterator[bytes]:
    while True:
        yield b"\x7f" * (1 << 16)


@pytest.mark.parametrize("attack", [_drops, _ends, _large])
async def test_streams_of_nonsense_hold_nobody_up(attack: object) -> None:
    """One-byte frames without end, ends without end, a frame of two GiB: the loop goes on, and it is over as
    soon as either side is."""
    assert callable(attack)
    outer, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = socket.create_connection(listener.getsockname())
        client, _ = listener.accept()
    for one in (outer, client):
        one.setblocking(False)
    over = threading.Event()

    def attacking() -> None:
        with contextlib.suppress(OSError):
            for data in attack():
                if over.is_set():
                    return
                theirs.sendall(data)

    def reading() -> None:
        with contextlib.suppress(OSError):
            while reader.recv(1 << 16) and not over.is_set():
                pass

    threads = [threading.Thread(target=work, daemon=True) for work in (attacking, reading)]
    work = asyncio.create_task(relay(client, outer))
    async with turns() as longest:
        for thread in threads:
            thread.start()
        async with asyncio.timeout(60):
            while longest.count < 300:  # noqa: ASYNC110
                await asyncio.sleep(0)
    over.set()
    for one in (reader, theirs):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        await asyncio.to_thread(thread.join, 60)
        assert not thread.is_alive()
    async with asyncio.timeout(60):
        await work
    reader.close()
    theirs.close()
    assert longest.seconds < LIMIT
