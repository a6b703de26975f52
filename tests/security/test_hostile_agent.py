"""An agent that a tenant has taken over: whatever it sends, calls end in time, and our loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.errors import GuestError
from shim.protocols import Deadlines
from shim.sandbox.agent_client import GuestAgent
from shim.state.trace import Trace
from tests.unit.turns import LIMIT, turns
from ttrpc import Client
from ttrpc._frames import TYPE_DATA, TYPE_REQUEST, TYPE_RESPONSE

_DEADLINE = 0.5  # seconds of each call here
_GROWTH = 64 << 20  # bytes; what is held is 4 MiB at most

Attack = Callable[[], Iterator[bytes]]


def _frame(stream: int, kind: int, body: bytes = b"", length: int | None = None, flags: int = 0) -> bytes:
    return struct.pack(">IIBB", len(body) if length is None else length, stream, kind, flags) + body


def _silence() -> Iterator[bytes]:
    yield b""


def _half_a_header() -> Iterator[bytes]:
    yield b"\0\0\0\4\0"


def _drip() -> Iterator[bytes]:
    """A response of 4 MiB, a byte at a time."""
    yield _frame(1, TYPE_RESPONSE, length=4 << 20)
    while True:
        threading.Event().wait(0.01)
        yield b"\0"


def _endless_frame() -> Iterator[bytes]:
    """Of 4 GiB, as fast as it goes."""
    yield _frame(1, TYPE_RESPONSE, length=0xFFFFFFFF)
    while True:
        yield bytes(1 << 20)


def _endless_type() -> Iterator[bytes]:
    """Frames of a type that there is not."""
    while True:
        yield _frame(1, 99) * 10_000


def _endless_data() -> Iterator[bytes]:
    """On a call that has ended, and on none."""
    yield _frame(1, TYPE_RESPONSE, b"\xff")
    while True:
        yield _frame(1, TYPE_DATA, b"x") * 10_000


def _endless_answers() -> Iterator[bytes]:
    while True:
        yield _frame(1, TYPE_RESPONSE) * 10_000


ATTACKS: dict[str, Attack] = {
    "silence": _silence,
    "half a header": _half_a_header,
    "a drip": _drip,
    "an endless frame": _endless_frame,
    "an endless type": _endless_type,
    "endless data": _endless_data,
    "endless answers": _endless_answers,
    "no protobuf": lambda: iter([_frame(1, TYPE_RESPONSE, b"\xff" * 100)]),
    "deep protobuf": lambda: iter([_frame(1, TYPE_RESPONSE, b"\x0a\x80\x01" * 100_000)]),
    "an even stream": lambda: iter([_frame(2, TYPE_RESPONSE, b"")]),
    "a stream that is none": lambda: iter([_frame(4001, TYPE_RESPONSE, b"")]),
    "a request": lambda: iter([_frame(1, TYPE_REQUEST, b"")]),
    "data for a call": lambda: iter([_frame(1, TYPE_DATA, b"x")]),
    "garbage": lambda: iter([b"\xff" * 100_000]),
    "its end": lambda: iter([]),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_calls_end_and_the_loop_goes_on(attack: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def attacking() -> None:
        with theirs, contextlib.suppress(OSError):
            theirs.recv(1 << 16)  # the first call is there
            for data in ATTACKS[attack]():
                if over.is_set():
                    return
                theirs.sendall(data)
            if attack != "its end":
                over.wait(60)

    thread = threading.Thread(target=attacking, daemon=True)
    thread.start()
    agent = GuestAgent(Client(ours), Deadlines(request=_DEADLINE), Trace("s", str(tmp_path)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    try:
        async with turns() as longest, asyncio.timeout(30):
            waiting = asyncio.create_task(agent.wait_process("c", ""))  # which has no deadline
            await asyncio.sleep(0)
            answers = await asyncio.gather(
                agent.signal_process("c", "", 9),
                agent.stats_container("c"),
                agent.list_processes("c"),
                return_exceptions=True,
            )
            await asyncio.sleep(_DEADLINE)  # the flood goes on
        assert all(isinstance(answer, GuestError) for answer in answers), answers
        assert longest.seconds < LIMIT
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < _GROWTH
    finally:
        over.set()
        await agent.close()
    with contextlib.suppress(GuestError):
        assert await asyncio.wait_for(waiting, 10) in range(256)
    thread.join(10)
    assert not thread.is_alive()
