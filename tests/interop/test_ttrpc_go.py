"""Promised: our ttrpc and Go's understand each other, as client and as server: unary with ttrpc 1.1
(Debian 12's, that of containerd 1.6), streams with ttrpc 1.2 (containerd 1.7 and later).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue

from tests.interop import build
from tests.unit.ttrpc.conftest import MakePair, Pair, make_pair, pair
from tests.unit.ttrpc.echo import ECHO
from ttrpc import MAX_MESSAGE, Client, Code, ConnectionClosed, RpcError

__all__ = ["make_pair", "pair"]  # fixtures

pytestmark = pytest.mark.skipif(
    shutil.which("go") is None,
    reason="Go is not installed (apt install golang-go golang-github-containerd-ttrpc-dev)",
)

M = ECHO.methods_by_name

UNARY = """\
echo: hello
big: 4194204
fail: 5 not there
no method: 12 method Nothing
no service: 12 service no.Service
deadline: true
metadata: a|b
concurrent: 200
"""
STREAMS = """\
count: 45
repeat: 50
repeat nothing: 0
repeat less: 11 less than nothing
chat: 20
chat ends: EOF
chat fails: 10 as asked
"""


@pytest.fixture(params=[False, True], ids=["ttrpc-1.1", "ttrpc-1.2"])
async def program(request: pytest.FixtureRequest) -> Path:
    """The Go peer with either version of ttrpc."""
    try:
        return await asyncio.to_thread(build.peer, streams=request.param)
    except build.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
async def go_server(program: Path, tmp_path: Path) -> AsyncIterator[Client]:
    """Our client, connected to a server in Go."""
    path = str(tmp_path / "go.sock")
    process = await asyncio.create_subprocess_exec(program, "serve", path, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"ready\n"
        async with await Client.connect_unix(path, timeout=5) as client:
            yield client
    finally:
        process.kill()
        await process.wait()


async def test_gos_client_and_our_server(program: Path, pair: Pair) -> None:
    process = await asyncio.create_subprocess_exec(
        program, "call", pair.path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)

    # Our DEADLINE_EXCEEDED may come after Go's client gave up by itself; then it says so, and goes on.
    assert [line for line in errors.decode().splitlines() if "inactive stream" not in line] == []
    assert output.decode() == (UNARY + STREAMS if program.name == "peer-streams" else UNARY)
    await asyncio.wait_for(pair.echo.until("cancelled", 1), 5)  # Go's deadline came with the request


async def test_our_unary_calls_and_gos_server(go_server: Client) -> None:
    client = go_server
    stub = client.stub(ECHO, default_timeout=20)

    assert (await stub.echo(BytesValue(value=b"hello"))).value == b"hello"
    assert (await stub.echo(BytesValue())).value == b""
    big = bytes(MAX_MESSAGE - 100)
    assert (await stub.echo(BytesValue(value=big))).value == big
    metadata = {"key": ["a", "b"]}
    assert (await stub.metadata(StringValue(value="key"), metadata=metadata)).value == "a|b"
    with pytest.raises(RpcError) as caught:
        await stub.fail(StringValue(value="5:not there"))
    assert (caught.value.code, caught.value.message) == (Code.NOT_FOUND, "not there")
    with pytest.raises(RpcError, match="UNIMPLEMENTED"):
        await stub.close_io(BytesValue())
    with pytest.raises(RpcError, match="DEADLINE_EXCEEDED"):
        await stub.wait(Int64Value(value=60_000), timeout=0.05)
    replies = await asyncio.gather(*(stub.wait(Int64Value(value=n % 10)) for n in range(200)))
    assert [reply.value for reply in replies] == [n % 10 for n in range(200)]


async def test_go_refuses_an_oversize_request_and_the_connection_lives(go_server: Client) -> None:
    client = go_server
    client._endpoint.wire._limit = 2 * MAX_MESSAGE
    with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED"):
        await client.call(M["Echo"], BytesValue(value=bytes(MAX_MESSAGE + 1)), timeout=20)

    assert (await client.call(M["Echo"], BytesValue(value=b"x"), timeout=20)).value == b"x"


async def test_our_streams_and_gos_server(program: Path, go_server: Client) -> None:
    client = go_server
    if program.name != "peer-streams":
        with pytest.raises(RpcError, match="UNIMPLEMENTED"):
            async with await client.stream(M["Repeat"], Int64Value(value=3), timeout=20) as stream:
                await anext(stream)
        return
    async with await client.stream(M["Repeat"], Int64Value(value=50), timeout=20) as stream:
        assert [message.value async for message in stream] == [b"%d" % n for n in range(50)]
    async with await client.stream(M["Repeat"], Int64Value(value=-1), timeout=20) as stream:
        with pytest.raises(RpcError, match="OUT_OF_RANGE: less than nothing"):
            await anext(stream)
    async with await client.stream(M["Count"], timeout=20) as stream:
        for size in range(10):
            await stream.send(BytesValue(value=bytes(size)))
        await stream.end()
        assert (await stream.response()).value == 45
    async with await client.stream(M["Chat"], timeout=20) as stream:
        for number in range(20):
            await stream.send(BytesValue(value=b"%d" % number))
            assert (await anext(stream)).value == b"%d" % number
        await stream.end()
        assert [message async for message in stream] == []
    async with await client.stream(M["Chat"], timeout=20) as stream:
        await stream.send(BytesValue(value=b"fail"))
        with pytest.raises(RpcError, match="ABORTED: as asked"):
            await anext(stream)


async def test_gos_client_sees_our_server_close(program: Path, make_pair: MakePair) -> None:
    pair = await make_pair()
    process = await asyncio.create_subprocess_exec(
        program,
        "bench",
        pair.path,
        "100000000",
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        while not pair.echo.contexts:  # noqa: ASYNC110  (the handler records, it does not signal)
            await asyncio.sleep(0.001)
        await pair.server.close(5)
        _, errors = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert b"closed" in errors or b"server is closing" in errors
    with pytest.raises((OSError, ConnectionClosed)):
        await Client.connect_unix(pair.path, timeout=5)
