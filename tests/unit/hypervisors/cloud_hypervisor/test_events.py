"""Events are cut out of a stream in which one takes several lines, whatever pieces it comes in."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator

import pytest

from hypervisors.cloud_hypervisor.events import LIMIT, Events


class Stream:
    """Events and the other end of their pipe."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        self.seen: list[tuple[str, str]] = []
        self.events = Events(reader, lambda name, device: self.seen.append((name, device)))

    def say(self, data: bytes) -> None:
        os.write(self.writer, data)
        self.events.read()


@pytest.fixture
async def stream() -> Iterator[Stream]:  # type: ignore[misc]
    made = Stream()
    yield made
    made.events.close()
    made.events.close()
    os.close(made.writer)


def _event(source: str, event: str, **properties: str) -> bytes:
    content = {"timestamp": {"secs": 1}, "source": source, "event": event, "properties": properties or None}
    return json.dumps(content, indent=2).encode() + b"\n\n"


async def test_an_event_in_pieces(stream: Stream) -> None:
    data = _event("vm", "booting") + _event("vm", "device-removed", id="disk", bdf="0000:00:05.0")
    for byte in data:
        stream.say(bytes([byte]))
    assert stream.seen == [("vm/booting", ""), ("vm/device-removed", "disk")]


async def test_who_waits_for_a_removal_is_told_once(stream: Stream) -> None:
    gone = stream.events.removal("disk")
    assert stream.events.removal("disk") is gone
    stream.say(_event("vm", "device-removed", id="other"))
    assert not gone.done()
    stream.say(_event("vm", "device-removed", id="disk") * 2)
    await asyncio.wait_for(gone, 5)
    stream.events.forget("disk")
    assert stream.events.removal("disk") is not gone


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\n}\n",
        b"[\n]\n}\n",
        b'{"n": 1e999\n}\n',
        b"{\n" * 500 + b"\n}\n",
        b"7\n}",
        b'{"properties": 7\n}',
    ],
)
async def test_what_is_no_event_is_passed_over(stream: Stream, data: bytes) -> None:
    stream.say(data)
    stream.say(b"\n" + _event("vm", "booted"))
    assert stream.seen[-1] == ("vm/booted", "")


async def test_an_event_without_an_end_is_not_kept(stream: Stream) -> None:
    for _ in range(4):
        stream.say(b" " * (LIMIT // 2))
    assert len(stream.events._partial) <= LIMIT
    stream.say(b"\n}\n" + _event("vm", "booted"))
    assert stream.seen == [("vm/booted", "")]
