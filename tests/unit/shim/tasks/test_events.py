"""Events reach containerd in order, survive its absence, and never make a container wait."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from google.protobuf.empty_pb2 import Empty

from proto import events_pb2, events_ttrpc_pb2
from shim.tasks import events
from shim.tasks.events import EventPublisher
from tests.unit.turns import LIMIT, turns
from ttrpc import Code, RpcError, Server

_SERVICE = events_ttrpc_pb2.DESCRIPTOR.services_by_name["Events"]


class _Containerd:
    """The events service of a containerd that can go away and come back."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.envelopes: list[Any] = []
        self.failures: list[RpcError] = []
        self.metadata: list[dict[str, list[str]]] = []
        self.stall: asyncio.Event | None = None
        self._server: Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Condition()

    async def forward(self, context: Any, request: Any) -> Empty:
        if self.stall is not None:
            await self.stall.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.metadata.append(context.metadata)
        async with self._arrived:
            self.envelopes.append(request.envelope)
            self._arrived.notify_all()
        return Empty()

    async def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()
        listener.bind(self.path)
        listener.listen()
        listener.setblocking(False)
        self._server = Server()
        self._server.register(_SERVICE, self)
        self._task = asyncio.create_task(self._server.serve(listener))

    async def stop(self) -> None:
        if self._server is not None and self._task is not None:
            await self._server.close(0.0)
            await self._task
            Path(self.path).unlink()
            self._server = None

    async def received(self, count: int) -> list[int]:
        """The pids of the first `count` events, as soon as they have come."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: len(self.envelopes) >= count)
        return [events_pb2.TaskStart.FromString(item.event.value).pid for item in self.envelopes]


@pytest.fixture
async def containerd(tmp_path: Path) -> AsyncIterator[_Containerd]:
    fake = _Containerd(tmp_path / "c.sock")
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def publisher(containerd: _Containerd) -> AsyncIterator[EventPublisher]:
    sink = EventPublisher("k8s.io", containerd.path)
    yield sink
    await sink.close()


def _start(pid: int) -> events_pb2.TaskStart:
    return events_pb2.TaskStart(container_id="c1", pid=pid)


async def test_envelope(containerd: _Containerd, publisher: EventPublisher) -> None:
    """The envelope is as containerd 1.6 wants it: a time, the namespace, a bare type name."""
    publisher.publish("/tasks/start", _start(7))

    assert await containerd.received(1) == [7]
    (envelope,) = containerd.envelopes
    assert (envelope.namespace, envelope.topic) == ("k8s.io", "/tasks/start")
    assert envelope.event.type_url == "containerd.events.TaskStart"
    assert envelope.timestamp.seconds > 1_700_000_000
    assert containerd.metadata[0]["containerd-namespace-ttrpc"] == ["k8s.io"]


async def test_order(containerd: _Containerd, publisher: EventPublisher) -> None:
    """A burst arrives in the order of publishing."""
    for pid in range(500):
        publisher.publish("/tasks/start", _start(pid))

    assert await containerd.received(500) == list(range(500))
    assert await publisher.flush(5)
    assert publisher.pending == 0


async def test_redelivery_after_absence(
    containerd: _Containerd, publisher: EventPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published while containerd is away arrives when it is back, in order, once."""
    monkeypatch.setattr(events, "_LAST_DELAY", 0.1)
    publisher.publish("/tasks/start", _start(0))
    await containerd.received(1)
    await containerd.stop()
    for pid in range(1, 20):
        publisher.publish("/tasks/start", _start(pid))
    assert not await publisher.flush(0.3)
    assert publisher.pending == 19

    await containerd.start()

    assert await containerd.received(20) == list(range(20))
    assert await publisher.flush(5)


class _Jumping(selectors.DefaultSelector):
    """A selector that never waits: when nothing is ready, the loop's clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Both ends of each connection live on this loop, so what is on its way is ready at once. Only
        # threads (none here) could make it wait in earnest.
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout is not None and timeout > 0:
            self.now += timeout
        return ready


def _loop_with_a_jumping_clock() -> asyncio.AbstractEventLoop:
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    return loop


@pytest.mark.parametrize("away", [60.0, 3600.0])
def test_an_absence_of_any_length(tmp_path: Path, away: float) -> None:
    """Events of the whole absence arrive within seconds of the return, in order and once; by a fake clock."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        containerd = _Containerd(tmp_path / "c.sock")
        await containerd.start()
        publisher = EventPublisher("n", containerd.path)
        publisher.publish("/tasks/start", _start(0))
        await containerd.received(1)
        await containerd.stop()
        for pid in range(1, 31):
            publisher.publish("/tasks/start", _start(pid))
            await asyncio.sleep(away / 30)
        assert publisher.pending == 30
        await containerd.start()
        back = loop.time()
        assert await containerd.received(31) == list(range(31))
        assert loop.time() - back <= 2.1
        await publisher.close()
        await containerd.stop()

    with asyncio.Runner(loop_factory=_loop_with_a_jumping_clock) as runner:
        runner.run(scenario())


async def test_temporary_failure_is_repeated(containerd: _Containerd, publisher: EventPublisher) -> None:
    """An answer that promises better times keeps the event, and its place."""
    containerd.failures = [RpcError(Code.UNAVAILABLE, "later"), RpcError(Code.UNKNOWN, "oops")]
    for pid in range(3):
        publisher.publish("/tasks/start", _start(pid))

    assert await containerd.received(3) == [0, 1, 2]


async def test_refused_event_blocks_nobody(containerd: _Containerd, publisher: EventPublisher) -> None:
    """An event that containerd will never take is given up; those behind it go on."""
    containerd.failures = [RpcError(Code.INVALID_ARGUMENT, "bad topic")]
    publisher.publish("bad", _start(0))
    publisher.publish("/tasks/start", _start(1))

    assert await containerd.received(1) == [1]
    assert await publisher.flush(5)


async def test_hanging_containerd(
    containerd: _Containerd, publisher: EventPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call without an answer is given up after its time, and the event sent again."""
    monkeypatch.setattr(events, "_CALL_TIMEOUT", 0.2)
    containerd.stall = asyncio.Event()
    publisher.publish("/tasks/start", _start(1))
    assert not await publisher.flush(0.5)

    containerd.stall.set()
    assert set(await containerd.received(1)) == {1}


async def test_ooms_push_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest floods them while containerd is away: one of a container waits, and all the rest is there."""
    sink = EventPublisher("n", str(tmp_path / "nobody.sock"))
    sink.publish("/tasks/oom", events_pb2.TaskOOM(container_id="c0"))  # on its way, again and again
    monkeypatch.setattr(events, "_LAST_DELAY", 0.01)
    async with turns() as longest:
        for number in range(2400):
            sink.publish("/tasks/oom", events_pb2.TaskOOM(container_id=f"c{number % 3}"))
            if number % 24 == 0:
                sink.publish("/tasks/exit", events_pb2.TaskExit(container_id="c", pid=number))
                await asyncio.sleep(0.001)
    assert longest.seconds < LIMIT
    assert sink.pending == 1 + 3 + 100
    fake = _Containerd(tmp_path / "nobody.sock")
    await fake.start()

    await fake.received(104)
    topics = Counter(envelope.topic for envelope in fake.envelopes)
    assert topics == {"/tasks/exit": 100, "/tasks/oom": 1 + 3}
    await sink.close()
    await fake.stop()


async def test_merged_ooms_are_told_once(containerd: _Containerd) -> None:
    """And one that happens while an earlier one is on its way follows it."""
    sink = EventPublisher("n", containerd.path)
    containerd.stall = asyncio.Event()
    sink.publish("/tasks/oom", events_pb2.TaskOOM(container_id="c1"))
    async with asyncio.timeout(20):
        while sink._ooms:  # noqa: ASYNC110  (the first is on its way)
            await asyncio.sleep(0)
    with structlog.testing.capture_logs() as logged:
        for _ in range(41):
            sink.publish("/tasks/oom", events_pb2.TaskOOM(container_id="c1"))
        assert sink.pending == 2
        containerd.stall.set()
        assert await sink.flush(20)
    assert len(containerd.envelopes) == 2
    told = [line for line in logged if "merged" in line["event"]]
    assert [(line["event"], line["container"]) for line in told] == [("40 OOM events merged into one", "c1")]
    await sink.close()


async def test_whatever_else_waits_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many as calls and processes; that they pile up is told now and then."""
    monkeypatch.setattr(events, "_MANY", 10)
    sink = EventPublisher("n", str(tmp_path / "nobody.sock"))
    with structlog.testing.capture_logs() as logged:
        for pid in range(25):
            sink.publish("/tasks/start", _start(pid))
    assert sink.pending == 25
    assert [line["count"] for line in logged if "wait for containerd" in line["event"]] == [10, 20]
    fake = _Containerd(tmp_path / "nobody.sock")
    await fake.start()

    assert await fake.received(25) == list(range(25))
    await sink.close()
    await fake.stop()


async def test_flush_gives_up_in_time(tmp_path: Path) -> None:
    """Shutdown waits as long as it says, and says that events are left."""
    sink = EventPublisher("n", str(tmp_path / "nobody.sock"))
    sink.publish("/tasks/exit", _start(1))
    loop = asyncio.get_running_loop()
    before = loop.time()

    assert not await sink.flush(0.3)

    assert 0.2 < loop.time() - before < 3
    await sink.close()
    assert sink.pending == 0


async def test_without_address() -> None:
    """CRI-O gives no address: events are only logged, and nothing is pending."""
    sink = EventPublisher("n", "")
    sink.publish("/tasks/start", _start(1))

    assert sink.pending == 0
    assert await sink.flush(1)
    await sink.close()
