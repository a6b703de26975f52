"""Stdio over ttrpc streams: windows are kept, clients may leave and come back, and an end is an end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage

from proto import streaming_pb2, transfer_streams_pb2
from shim.stdio import stream as stdio_stream
from shim.stdio.stream import StreamingService, Streams, stream_id_of
from tests.unit.shim.fakes import TaskClient, open_descriptors
from ttrpc import Client, RpcError, Server

_SERVICE = streaming_pb2.DESCRIPTOR.services_by_name["Streaming"]


def url(name: str) -> str:
    return f"ttrpc+unix:///run/containerd/s/abc?streaming_id={name}"


class Shim(TaskClient):
    """The Task service, and a client of the Streaming service."""

    client: Client

    async def open(self, name: str, window: int = 0) -> Any:
        """Open a stream as containerd does, up to its acknowledgement."""
        stream = await self.client.stub(_SERVICE).stream()
        await stream.__aenter__()
        init = streaming_pb2.StreamInit(id=name)
        await stream.send(_any(init))
        assert (await anext(stream)).type_url == "google.protobuf.Empty"
        if window:
            await stream.send(_any(transfer_streams_pb2.WindowUpdate(update=window)))
        return stream


def _any(message: Any) -> AnyMessage:
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def _data(message: AnyMessage) -> bytes:
    assert message.type_url == "containerd.types.transfer.Data"
    return transfer_streams_pb2.Data.FromString(message.value).data


@pytest_asyncio.fixture
async def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shim]:
    streams = Streams()
    monkeypatch.setattr(stdio_stream, "STREAMS", streams)
    async with asyncio.timeout(30):
        shim = Shim(tmp_path)
        server = Server()
        server.register(_SERVICE, StreamingService(streams))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        listener.setblocking(False)
        serving = asyncio.create_task(server.serve(listener))
        shim.client = await Client.connect_unix(str(tmp_path / "sock"), timeout=5)
        yield shim
        await shim.client.close()
        await server.close(0)
        await serving
        await shim.close()


async def test_output_comes_by_the_window_and_ends(shim: Shim) -> None:
    out = await shim.open("c-stdout", window=5)  # before the process exists, as CRI does
    await shim.create(stdout=url("c-stdout"))
    await shim.start()
    await shim.guest().write(b"hello world")
    assert _data(await anext(out)) == b"hello"
    await out.send(_any(transfer_streams_pb2.WindowUpdate(update=100)))
    assert _data(await anext(out)) == b" world"
    shim.guest().exit(0)
    await shim.wait()
    await shim.delete()
    with pytest.raises(StopAsyncIteration):
        await anext(out)


async def test_what_a_client_has_not_taken_is_there_for_the_next(shim: Shim) -> None:
    """containerd is restarted: it opens the same streams again."""
    await shim.create(stdout=url("out"))
    await shim.start()
    first = await shim.open("out", window=3)
    await shim.guest().write(b"abcdef")
    assert _data(await anext(first)) == b"abc"
    await first.end()
    second = await shim.open("out", window=100)
    assert _data(await anext(second)) == b"def"
    shim.guest().exit(0)
    assert (await shim.wait()).exit_status == 0
    late = await shim.open("out", window=100)
    with pytest.raises(StopAsyncIteration):
        await anext(late)
    await shim.delete()


async def test_output_that_nobody_takes_stops_its_process(shim: Shim) -> None:
    await shim.create(stdout=url("out"))
    await shim.start()
    writing = asyncio.create_task(shim.guest().write(bytes(8 << 20)))
    out = await shim.open("out", window=1 << 20)
    taken = 0
    while taken < 1 << 20:
        taken += len(_data(await anext(out)))
    assert taken == 1 << 20, "not a byte more than the window"
    assert not writing.done()
    await out.send(_any(transfer_streams_pb2.WindowUpdate(update=7 << 20)))
    while taken < 8 << 20:
        taken += len(_data(await anext(out)))
    await writing
    shim.guest().exit(0)
    await shim.wait()
    await shim.delete()


async def test_input_flows_and_ends_with_close_io(shim: Shim) -> None:
    await shim.create(stdin=url("in"))
    await shim.start()
    stdin = await shim.open("in")
    granted = transfer_streams_pb2.WindowUpdate.FromString((await anext(stdin)).value).update
    assert granted == 64 << 10
    reading = asyncio.create_task(shim.guest().read_stdin())
    for piece in (b"one ", b"two"):
        await stdin.send(_any(transfer_streams_pb2.Data(data=piece)))
        assert transfer_streams_pb2.WindowUpdate.FromString((await anext(stdin)).value).update == len(piece)
    await stdin.end()
    await asyncio.sleep(0.05)
    assert not reading.done(), "a client that leaves ends nothing"
    await shim.call("CloseIO", id="c", stdin=True)
    assert await reading == b"one two"
    shim.guest().exit(0)
    await shim.wait()
    await shim.delete()


async def test_input_after_the_process_is_gone(shim: Shim) -> None:
    await shim.create(stdin=url("in"))
    await shim.start()
    stdin = await shim.open("in")
    await anext(stdin)
    shim.guest().exit(0)
    await shim.wait()
    await stdin.send(_any(transfer_streams_pb2.Data(data=b"too late")))
    with pytest.raises(StopAsyncIteration):
        await anext(stdin)
    await shim.delete()


@pytest.mark.parametrize(
    "messages",
    [
        [AnyMessage(type_url="containerd.services.streaming.v1.StreamInit", value=b"\xff\xff")],
        [_any(streaming_pb2.StreamInit(id="out")), _any(transfer_streams_pb2.Data(data=b"x"))],
        [
            _any(streaming_pb2.StreamInit(id="out")),
            AnyMessage(type_url="containerd.types.transfer.WindowUpdate", value=b"\xff"),
        ],
    ],
)
async def test_what_is_no_stream_is_refused(shim: Shim, messages: list[AnyMessage]) -> None:
    await shim.create(stdout=url("out"))
    stream = await shim.client.stub(_SERVICE).stream()
    async with stream:
        for message in messages:
            await stream.send(message)
        with pytest.raises(RpcError, match="INVALID_ARGUMENT"):
            while True:
                await anext(stream)


async def test_a_name_is_used_once_at_a_time(shim: Shim) -> None:
    await shim.create("c", stdout=url("same"))
    with pytest.raises(Exception, match="in use"):
        await shim.create("d", stdout=url("same"))
    await shim.delete("c")
    await shim.create("d", stdout=url("same"))


@pytest.mark.parametrize("query", ["", "?streaming_id=", "?other=1", "?streaming_id=" + "x" * 1025])
def test_a_url_without_a_name(query: str) -> None:
    with pytest.raises(Exception, match="streaming_id"):
        stream_id_of("ttrpc+unix:///s" + query)


async def test_many_processes_leave_no_descriptor_and_no_name(shim: Shim) -> None:
    await shim.create("c")
    await shim.start("c")
    before = open_descriptors()
    for number in range(20):
        await shim.exec(exec_id="e", stdout=url(f"out{number}"), stdin=url(f"in{number}"))
        out = await shim.open(f"out{number}", window=10)
        await shim.start(exec_id="e")
        await shim.guest(exec_id="e").write(b"x")
        assert _data(await anext(out)) == b"x"
        shim.guest(exec_id="e").exit(0)
        await shim.wait(exec_id="e")
        await shim.delete(exec_id="e")
        shim.agent.processes.pop(("c", "e"))
        with pytest.raises(StopAsyncIteration):
            await anext(out)
    assert len(stdio_stream.STREAMS._ends) <= 2
    assert not stdio_stream.STREAMS._waiting
    guest_side = {sock.fileno() for sock in shim.sandbox.opened}
    assert open_descriptors() - guest_side == before - guest_side
