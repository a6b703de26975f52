"""Promised: every form of call works over a socket, with metadata, deadlines, statuses and limits, and
every call ends: by its answer, its deadline, its cancellation or the connection's end.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue

from tests.unit.ttrpc.conftest import MakePair, Pair
from tests.unit.ttrpc.echo import ECHO, Echo
from ttrpc import (
    MAX_MESSAGE,
    CallContext,
    Client,
    Code,
    ConnectionClosed,
    LocalProtocolError,
    RpcError,
    Server,
)
from ttrpc._frames import encode_frame
from ttrpc._wire_pb2 import Request, Response

M = ECHO.methods_by_name
BIG = 100_000


class Broken(Exception):  # noqa: N818
    """An error with a code by name, as the shim's errors have it."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


async def turns(count: int) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


async def turns_until(condition: Callable[[], object]) -> None:
    """Let the loop go round until something is so."""
    while not condition():  # noqa: ASYNC110  (there is no event to wait for, and no time passes)
        await asyncio.sleep(0)


async def turns_until_still(value: Callable[[], int]) -> None:
    """Let the loop go round until a value does not change for a hundred rounds."""
    before = -1
    while before != value():
        before = value()
        await turns(100)


async def test_a_unary_call(pair: Pair) -> None:
    client = await pair.client()
    reply = await client.call(M["Echo"], BytesValue(value=b"hello"), timeout=5)

    assert reply == BytesValue(value=b"hello")
    (ctx,) = pair.echo.contexts
    assert (ctx.service, ctx.method, ctx.peer_uid) == ("ttrpc.test.Echo", "Echo", os.getuid())
    assert ctx.deadline is not None
    assert 0 < ctx.deadline - asyncio.get_running_loop().time() <= 5


async def test_a_stub_names_calls_like_handlers(pair: Pair) -> None:
    stub = (await pair.client()).stub(ECHO, default_timeout=0.01)

    assert (await stub.close_io(BytesValue(), timeout=None)).value == b"closed"
    with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
        await stub.wait(Int64Value(value=60_000))
    with pytest.raises(AttributeError):
        _ = stub.no_such_call


async def test_metadata_arrives_in_order(pair: Pair) -> None:
    stub = (await pair.client()).stub(ECHO)
    metadata = {"a": ["1", "2"], "b": "x"}

    assert (await stub.metadata(StringValue(value="a"), metadata=metadata)).value == "1|2"
    assert (await stub.metadata(StringValue(value="b"), metadata=metadata)).value == "x"
    assert (await stub.metadata(StringValue(value="c"), metadata=metadata)).value == ""


async def test_a_status_arrives_with_code_and_text(pair: Pair) -> None:
    stub = (await pair.client()).stub(ECHO)
    with pytest.raises(RpcError) as caught:
        await stub.fail(StringValue(value="5:container: not found"))

    assert (caught.value.code, caught.value.message) == (Code.NOT_FOUND, "container: not found")
    assert str(caught.value) == "NOT_FOUND: container: not found"
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED: no memory is left: MemoryError"):
        await stub.fail(StringValue(value="memory:"))


@pytest.mark.parametrize(
    ("error", "code", "text", "reported"),
    [
        (ValueError("bad"), Code.UNKNOWN, "bad", True),
        (KeyError(), Code.UNKNOWN, "KeyError", True),
        (Broken("NOT_FOUND", "gone"), Code.NOT_FOUND, "gone", False),
        (Broken("NO_SUCH_CODE", "odd"), Code.UNKNOWN, "odd", True),
        (Broken("OK", "lie"), Code.UNKNOWN, "lie", True),
        (RpcError(Code.OK, "lie"), Code.UNKNOWN, "lie", False),
        (OSError(2, "No such file", "\udcff"), Code.UNKNOWN, "[Errno 2] No such file: '\\udcff'", True),
        (ValueError("\udcff"), Code.UNKNOWN, "?", True),
        (ConnectionClosed("the other one"), Code.UNAVAILABLE, "the other one", False),
        (asyncio.CancelledError(), Code.CANCELLED, "the call was cancelled", False),
    ],
    ids=repr,
)
async def test_what_a_handler_raises_becomes_a_status(
    make_pair: MakePair, error: BaseException, code: Code, text: str, reported: bool
) -> None:
    class Raises:
        async def echo(self, ctx: CallContext, request: BytesValue) -> BytesValue:
            raise error

    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
    stub = (await (await make_pair(impl=Raises())).client()).stub(ECHO)
    with pytest.raises(RpcError) as caught:
        await stub.echo(BytesValue(), timeout=5)

    assert (caught.value.code, caught.value.message) == (code, text)
    assert [report["exception"] for report in reports] == ([error] if reported else [])


async def test_a_handler_that_returns_the_wrong_message_is_a_bug(make_pair: MakePair) -> None:
    class Wrong:
        async def echo(self, ctx: CallContext, request: BytesValue) -> object:
            return StringValue(value="x")

        def repeat(self, ctx: CallContext, request: Int64Value) -> object:
            return [BytesValue()]

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    client = await (await make_pair(impl=Wrong())).client()
    with pytest.raises(RpcError, match="StringValue instead of google"):
        await client.call(M["Echo"], BytesValue(), timeout=5)
    async with await client.stream(M["Repeat"], Int64Value(), timeout=5) as stream:
        with pytest.raises(RpcError, match="not an async generator"):
            await anext(stream)


async def test_unknown_services_and_methods_are_unimplemented(make_pair: MakePair) -> None:
    class OnlyEcho:
        async def echo(self, ctx: CallContext, request: BytesValue) -> BytesValue:
            return request

    pair = await make_pair(impl=OnlyEcho())
    stub = (await pair.client()).stub(ECHO)
    with pytest.raises(RpcError, match="UNIMPLEMENTED: method CloseIO"):
        await stub.close_io(BytesValue(), timeout=5)
    reader, writer = await pair.raw()
    writer.write(encode_frame(1, 1, 0, Request(service="no.Such", method="M").SerializeToString()))
    header = await reader.readexactly(10)
    answer = Response.FromString(await reader.readexactly(int.from_bytes(header[:4], "big")))

    assert (answer.status.code, answer.status.message) == (Code.UNIMPLEMENTED, "service no.Such")


async def test_calls_on_one_connection_do_not_wait_for_each_other(pair: Pair) -> None:
    stub = (await pair.client()).stub(ECHO)
    blocked = asyncio.create_task(stub.wait(Int64Value(value=60_000)))
    await pair.echo.until("started", 1)
    replies = await asyncio.gather(*(stub.echo(BytesValue(value=b"%d" % n), timeout=20) for n in range(500)))

    assert [reply.value for reply in replies] == [b"%d" % n for n in range(500)]
    assert not blocked.done()
    blocked.cancel()
    with suppress(asyncio.CancelledError):
        await blocked


async def test_requests_in_progress_are_limited_per_connection(make_pair: MakePair) -> None:
    pair = await make_pair(max_concurrent=2)
    stub = (await pair.client()).stub(ECHO)
    tasks = [asyncio.create_task(stub.wait(Int64Value(value=60_000))) for _ in range(2)]
    await pair.echo.until("started", 2)
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
        await stub.echo(BytesValue(), timeout=5)
    other = (await pair.client()).stub(ECHO)
    await other.echo(BytesValue(), timeout=5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# Deadlines and cancellation.


async def test_the_server_keeps_the_deadline_and_cancels_the_handler(pair: Pair) -> None:
    """The client here does not watch the clock: the answer is the server's."""
    reader, writer = await pair.raw()
    payload = Int64Value(value=60_000).SerializeToString()
    request = Request(service=ECHO.full_name, method="Wait", payload=payload, timeout_nano=20_000_000)
    writer.write(encode_frame(1, 1, 0, request.SerializeToString()))
    header = await reader.readexactly(10)
    answer = Response.FromString(await reader.readexactly(int.from_bytes(header[:4], "big")))

    assert answer.status.code == Code.DEADLINE_EXCEEDED
    await pair.echo.until("cancelled", 1)


async def test_a_handler_may_run_to_its_end(make_pair: MakePair) -> None:
    pair = await make_pair(run_to_end={"Wait"})
    client = await pair.client()
    with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
        await client.call(M["Wait"], Int64Value(value=100), timeout=0.02)
    await client.call(M["Echo"], BytesValue(), timeout=5)
    await client.close()
    await pair.echo.until("ended", 1)

    assert pair.echo.cancelled == 0


async def test_the_client_keeps_the_deadline_of_a_silent_server() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with Client(ours) as client:
            with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
                await client.call(M["Echo"], BytesValue(), timeout=0.02)
            async with await client.stream(M["Repeat"], Int64Value(), timeout=0.02) as stream:
                with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
                    await anext(stream)
            with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
                await client.call(M["Echo"], BytesValue(), timeout=0)
            with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
                await client.stream(M["Chat"], timeout=-1)


async def test_the_deadline_holds_while_the_server_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with Client(ours) as client:
            big = BytesValue(value=bytes(MAX_MESSAGE - 1000))
            calls = [asyncio.create_task(client.call(M["Echo"], big, timeout=0.05)) for _ in range(4)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)

            assert [getattr(outcome, "code", outcome) for outcome in outcomes] == [Code.DEADLINE_EXCEEDED] * 4
            assert client._endpoint.wire._next_id < 9  # not all of them were written


async def test_a_late_answer_is_dropped(pair: Pair) -> None:
    client = await pair.client()
    call = asyncio.create_task(client.call(M["Wait"], Int64Value(value=30), timeout=None))
    await pair.echo.until("started", 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await pair.echo.until("ended", 1)

    assert (await client.call(M["Echo"], BytesValue(value=b"x"), timeout=5)).value == b"x"
    assert not client._endpoint.answers
    assert not client._endpoint.wire._streams


async def test_handlers_are_cancelled_when_the_peer_goes(pair: Pair) -> None:
    client = await pair.client()
    call = asyncio.create_task(client.call(M["Wait"], Int64Value(value=60_000), timeout=None))
    await pair.echo.until("started", 1)
    await client.close()
    await pair.echo.until("cancelled", 1)
    with pytest.raises(ConnectionClosed):
        await call


async def test_handlers_that_run_to_their_end_do_so_when_the_peer_goes(make_pair: MakePair) -> None:
    pair = await make_pair(run_to_end=True)
    client = await pair.client()
    call = asyncio.create_task(client.call(M["Wait"], Int64Value(value=50), timeout=None))
    await pair.echo.until("started", 1)
    await client.close()
    await pair.echo.until("ended", 1)
    with pytest.raises(ConnectionClosed):
        await call


# Limits.


async def test_an_oversize_request_is_refused_here(pair: Pair) -> None:
    stub = (await pair.client()).stub(ECHO)
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED: message length 4194"):
        await stub.echo(BytesValue(value=bytes(MAX_MESSAGE)), timeout=5)

    assert (await stub.echo(BytesValue(value=b"x"), timeout=5)).value == b"x"


async def test_an_oversize_request_is_refused_there_and_the_connection_lives(make_pair: MakePair) -> None:
    pair = await make_pair(max_message=BIG)
    stub = (await pair.client()).stub(ECHO)
    small = asyncio.create_task(stub.wait(Int64Value(value=50), timeout=5))
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
        await stub.echo(BytesValue(value=bytes(3 * BIG)), timeout=5)

    assert (await stub.echo(BytesValue(value=bytes(BIG // 2)), timeout=5)).value == bytes(BIG // 2)
    assert (await small).value == 50


async def test_an_oversize_response_is_refused_by_the_server(make_pair: MakePair) -> None:
    class Big:
        async def echo(self, ctx: CallContext, request: BytesValue) -> BytesValue:
            return BytesValue(value=bytes(MAX_MESSAGE))

        async def repeat(self, ctx: CallContext, request: Int64Value) -> AsyncIterator[BytesValue]:
            yield BytesValue(value=b"first")
            yield BytesValue(value=bytes(MAX_MESSAGE))

    client = await (await make_pair(impl=Big())).client()
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
        await client.call(M["Echo"], BytesValue(), timeout=5)
    async with await client.stream(M["Repeat"], Int64Value(), timeout=5) as stream:
        assert (await anext(stream)).value == b"first"
        with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
            await anext(stream)


async def test_an_oversize_response_fails_its_call_only(pair: Pair) -> None:
    client = await pair.client(max_message=BIG)
    client._endpoint.wire._limit = MAX_MESSAGE  # send more than we take
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
        await client.call(M["Echo"], BytesValue(value=bytes(2 * BIG)), timeout=5)

    assert (await client.call(M["Echo"], BytesValue(value=b"x"), timeout=5)).value == b"x"


async def test_messages_at_the_limit_pass_whole(pair: Pair) -> None:
    stub = (await pair.client()).stub(ECHO)
    data = os.urandom(MAX_MESSAGE - 100)

    assert (await stub.echo(BytesValue(value=data), timeout=20)).value == data


async def test_a_peer_that_does_not_read_its_replies_is_not_read_from(pair: Pair) -> None:
    """What is buffered for it stays bounded: its requests wait in the socket."""
    reader, writer = await pair.raw()
    payload = BytesValue(value=bytes(BIG)).SerializeToString()
    request = Request(service=ECHO.full_name, method="Echo", payload=payload).SerializeToString()
    reader._limit = 1  # type: ignore[attr-defined]  # asyncio then stops reading after three bytes
    count = 100
    for number in range(count):
        writer.write(encode_frame(2 * number + 1, 1, 0, request))
    # The server reads until its own write buffer is above the mark, and no further.
    await turns_until(lambda: pair.server.connections)
    (connection,) = pair.server.connections
    await turns_until(lambda: connection._write_paused)
    await turns(1000)

    assert len(pair.echo.contexts) < 40
    reader._limit = 1 << 20  # type: ignore[attr-defined]
    answers = 0
    while answers < count:
        header = await reader.readexactly(10)
        await reader.readexactly(int.from_bytes(header[:4], "big"))
        answers += 1
    assert len(pair.echo.contexts) == count


# Streams.


async def test_the_server_streams(pair: Pair) -> None:
    client = await pair.client()
    async with await client.stream(M["Repeat"], Int64Value(value=1000), timeout=10) as stream:
        assert [message.value async for message in stream] == [b"%d" % n for n in range(1000)]
    async with await client.stream(M["Repeat"], Int64Value(value=0), timeout=10) as stream:
        assert [message async for message in stream] == []
    async with await client.stream(M["Repeat"], Int64Value(value=-1), timeout=10) as stream:
        with pytest.raises(RpcError, match="OUT_OF_RANGE: less than nothing"):
            await anext(stream)


async def test_the_client_streams(pair: Pair) -> None:
    client = await pair.client()
    async with await client.stream(M["Count"], timeout=10) as stream:
        for size in (0, 1, 10_000, 100_000):
            await stream.send(BytesValue(value=bytes(size)))
        await stream.end()
        await stream.end()

        assert (await stream.response()).value == 110_001
        with pytest.raises(LocalProtocolError):
            await stream.send(BytesValue())


async def test_both_stream(pair: Pair) -> None:
    client = await pair.client()
    async with await client.stream(M["Chat"], timeout=10) as stream:
        for number in range(100):
            await stream.send(BytesValue(value=b"%d" % number))
            assert (await anext(stream)).value == b"%d" % number
        await stream.end()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_stream_fails_with_the_handlers_status_for_both_halves(pair: Pair) -> None:
    client = await pair.client()
    async with await client.stream(M["Chat"], timeout=10) as stream:
        await stream.send(BytesValue(value=b"x"))
        await stream.send(BytesValue(value=b"fail"))
        assert (await anext(stream)).value == b"x"
        with pytest.raises(RpcError, match="ABORTED: as asked"):
            await anext(stream)
        with pytest.raises(RpcError, match="ABORTED: as asked"):
            await stream.send(BytesValue())


async def test_a_stream_that_is_left_early_ends_its_handler(make_pair: MakePair) -> None:
    ended = asyncio.Event()

    class Endless:
        async def chat(
            self, ctx: CallContext, requests: AsyncIterator[BytesValue]
        ) -> AsyncIterator[BytesValue]:
            async for request in requests:
                yield request
            ended.set()

    client = await (await make_pair(impl=Endless())).client()
    async with await client.stream(M["Chat"], timeout=10) as stream:
        await stream.send(BytesValue(value=b"x"))
        await anext(stream)
    await asyncio.wait_for(ended.wait(), 5)

    assert not client._endpoint.streams
    with pytest.raises(RpcError, match="CANCELLED"):
        await anext(stream)


async def test_a_slow_reader_of_a_stream_slows_the_server_down(make_pair: MakePair) -> None:
    produced = 0

    class Fast:
        async def repeat(self, ctx: CallContext, request: Int64Value) -> AsyncIterator[BytesValue]:
            nonlocal produced
            for _ in range(request.value):
                produced += 1
                yield BytesValue(value=bytes(BIG))

    count = 200
    client = await (await make_pair(impl=Fast())).client()
    async with await client.stream(M["Repeat"], Int64Value(value=count), timeout=20) as stream:
        await anext(stream)
        await turns_until_still(lambda: produced)
        assert produced < 60  # 2 MB here, 1 MB there, and the socket between
        received = 1 + len([message async for message in stream])

    assert received == produced == count


async def test_a_slow_handler_slows_its_client_down(make_pair: MakePair) -> None:
    go = asyncio.Event()

    class Slow:
        async def count(self, ctx: CallContext, requests: AsyncIterator[BytesValue]) -> Int64Value:
            await go.wait()
            return Int64Value(value=len([request async for request in requests]))

    sent = 0
    count = 200
    client = await (await make_pair(impl=Slow())).client()
    async with await client.stream(M["Count"], timeout=20) as stream:

        async def send() -> None:
            nonlocal sent
            for _ in range(count):
                await stream.send(BytesValue(value=bytes(BIG)))
                sent += 1
            await stream.end()

        sending = asyncio.create_task(send())
        await turns_until_still(lambda: sent)
        assert sent < 60
        go.set()

        assert (await stream.response()).value == count
        await sending


async def test_a_message_that_cannot_be_decoded_fails_its_stream(pair: Pair) -> None:
    client = await pair.client()
    async with await client.stream(M["Count"], timeout=10) as stream:
        client._endpoint.write(client._endpoint.wire.send_data(1, b"\xff"))
        with pytest.raises(RpcError, match="INVALID_ARGUMENT: a message cannot be decoded"):
            await stream.response()


async def test_one_task_at_a_time_receives(pair: Pair) -> None:
    client = await pair.client()
    async with await client.stream(M["Chat"], timeout=10) as stream:
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await anext(stream)
        await stream.send(BytesValue(value=b"x"))
        assert (await first).value == b"x"


async def test_call_and_stream_check_the_form_of_the_method(pair: Pair) -> None:
    client = await pair.client()
    with pytest.raises(LocalProtocolError):
        await client.call(M["Chat"], BytesValue(), timeout=5)
    with pytest.raises(LocalProtocolError):
        await client.stream(M["Echo"], BytesValue(), timeout=5)
    with pytest.raises(LocalProtocolError):
        await client.stream(M["Count"], BytesValue(), timeout=5)
    with pytest.raises(LocalProtocolError):
        await client.stream(M["Repeat"], timeout=5)


# Connections.


async def test_strangers_are_turned_away(make_pair: MakePair) -> None:
    pair = await make_pair(allowed_uids={os.getuid() + 1})
    client = await pair.client()
    with pytest.raises(ConnectionClosed):
        await client.call(M["Echo"], BytesValue(), timeout=5)
    friendly = await make_pair(allowed_uids=[os.getuid()])
    await (await friendly.client()).call(M["Echo"], BytesValue(), timeout=5)


async def test_a_uid_check_needs_a_unix_socket() -> None:
    server = Server(allowed_uids={0})
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ValueError, match="unix socket"):
        await server.serve(listener)


async def test_calls_over_other_sockets_have_no_peer_uid() -> None:
    """Stands in for AF_VSOCK, which needs a guest."""
    server, echo = Server(), Echo()
    server.register(ECHO, echo)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(listener))
    async with Client(socket.create_connection(listener.getsockname())) as client:
        await client.call(M["Echo"], BytesValue(), timeout=5)
    await server.close(1)
    await serving

    assert echo.contexts[0].peer_uid is None


async def test_one_server_on_two_sockets(pair: Pair, tmp_path: Any) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "second"))
    listener.listen()
    serving = asyncio.create_task(pair.server.serve(listener))
    second = await Client.connect_unix(str(tmp_path / "second"), timeout=5)
    async with second:
        await second.call(M["Echo"], BytesValue(), timeout=5)
        await (await pair.client()).call(M["Echo"], BytesValue(), timeout=5)
        await pair.server.close(1)
        await asyncio.wait_for(serving, 5)
        await asyncio.wait_for(second.closed, 5)


async def test_closing_lets_replies_be_written(pair: Pair) -> None:
    client = await pair.client()
    call = asyncio.create_task(client.call(M["Wait"], Int64Value(value=50), timeout=5))
    await pair.echo.until("started", 1)
    closing = asyncio.create_task(pair.server.close(5))
    await asyncio.sleep(0)
    with pytest.raises(RpcError, match="UNAVAILABLE: the server is closing"):
        await client.call(M["Echo"], BytesValue(), timeout=5)

    assert (await call).value == 50
    await closing
    with pytest.raises(OSError):  # noqa: PT011  (ECONNREFUSED: nobody listens any more)
        await Client.connect_unix(pair.path, timeout=5)


async def test_closing_cancels_what_lasts_longer_than_its_grace(pair: Pair) -> None:
    client = await pair.client()
    call = asyncio.create_task(client.call(M["Wait"], Int64Value(value=60_000), timeout=None))
    await pair.echo.until("started", 1)
    began = time.monotonic()
    await pair.server.close(0.05)

    assert time.monotonic() - began < 2
    assert pair.echo.cancelled == 1
    with pytest.raises(RpcError, match="UNAVAILABLE"):
        await call


async def test_a_handler_may_close_its_server(make_pair: MakePair) -> None:
    class Shutdown:
        async def echo(self, ctx: CallContext, request: BytesValue) -> BytesValue:
            await pair.server.close(30)
            return request

    pair = await make_pair(impl=Shutdown())
    client = await pair.client()
    with pytest.raises(ConnectionClosed):
        await client.call(M["Echo"], BytesValue(), timeout=10)


@pytest.mark.parametrize("half_a_frame", [b"", b"\0\0\0\5\0\0\0\1"])
async def test_calls_end_when_the_server_goes(half_a_frame: bytes) -> None:
    ours, theirs = socket.socketpair()
    async with Client(ours) as client:
        call = asyncio.create_task(client.call(M["Echo"], BytesValue(), timeout=None))
        stream = await client.stream(M["Chat"], timeout=None)
        await turns_until(lambda: client._endpoint.answers)
        theirs.recv(4096)  # both requests: what is left unread would make the close a reset
        theirs.sendall(half_a_frame)
        theirs.close()
        with pytest.raises(ConnectionClosed, match="middle of a frame" if half_a_frame else "closed"):
            await call
        with pytest.raises(ConnectionClosed):
            await anext(stream)
        await asyncio.wait_for(client.closed, 5)
        with pytest.raises(ConnectionClosed):
            await client.call(M["Echo"], BytesValue(), timeout=None)


async def test_a_server_that_speaks_something_else() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with Client(ours) as client:
            call = asyncio.create_task(client.call(M["Echo"], BytesValue(), timeout=None))
            await turns_until(lambda: client._endpoint.answers)
            theirs.sendall(encode_frame(99, 2, 0, b""))
            with pytest.raises(ConnectionClosed, match="does not speak ttrpc"):
                await call


async def test_a_client_that_speaks_something_else_is_dropped(pair: Pair) -> None:
    reader, writer = await pair.raw()
    writer.write(encode_frame(1, 2, 0, b""))

    assert await reader.read() == b""


async def test_waiting_for_the_end_may_be_cancelled(pair: Pair) -> None:
    client = await pair.client()
    waiting = asyncio.ensure_future(client.closed)
    waiting.cancel()
    await client.call(M["Echo"], BytesValue(), timeout=5)
    await client.close()
    await client.close()
    await client.closed


async def test_a_socket_that_is_not_connected() -> None:
    client = Client(socket.socket(socket.AF_UNIX))
    with pytest.raises(ConnectionClosed):
        await client.call(M["Echo"], BytesValue(), timeout=5)
    await client.close()


async def test_connecting_fails_without_leaks(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError):
        await Client.connect_unix(str(tmp_path / "none"), timeout=5)
    gc.collect()  # an unclosed socket would warn here, and warnings are errors


async def test_a_service_is_loaded_with_its_first_call(make_pair: MakePair) -> None:
    loads: list[str] = []

    def load() -> None:
        loads.append("once")
        pair.server.register(ECHO, Echo())

    pair = await make_pair()
    methods = pair.server.methods.pop(ECHO.full_name)
    assert methods
    pair.server.register_later(ECHO.full_name, load)
    stub = (await pair.client()).stub(ECHO)
    assert loads == []
    for value in (b"1", b"2"):
        assert (await stub.echo(BytesValue(value=value), timeout=5)).value == value
    assert loads == ["once"]


def test_registering_wrong_things() -> None:
    server = Server()
    with pytest.raises(ValueError, match="handles no RPC"):
        server.register(ECHO, object())
    with pytest.raises(ValueError, match="has no Nothing"):
        server.register(ECHO, Echo(), run_to_end={"Echo", "Nothing"})
    server.register(ECHO, Echo())
    with pytest.raises(ValueError, match="registered already"):
        server.register(ECHO, Echo())
