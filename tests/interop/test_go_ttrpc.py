"""Our ttrpc and containerd's own (Go) understand each other, either way round: values, errors, metadata,
deadlines, the size limit and concurrent calls.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import wrappers_pb2

import ttrpc
from tests.interop.echo import ROOT, SERVICE, build_go


@pytest.fixture(scope="module")
def go() -> str:
    try:
        return build_go()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s") / "s")


@pytest.fixture
def go_server(go: str, path: str) -> Iterator[str]:
    with subprocess.Popen([go, "server", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"listening\n"
        yield path
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.fixture
def our_server(path: str) -> Iterator[str]:
    argv = [sys.executable, "-m", "tests.interop.echo", path]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield path
        process.kill()


def test_their_client_calls_our_server(go: str, our_server: str) -> None:
    done = subprocess.run([go, "client", our_server], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)

    assert out["echo"] is True
    assert out["fail"] == {"code": 5, "message": "x: not found"}
    assert out["meta"] == "green"
    assert out["unknown method"]["code"] == 12
    assert out["unknown service"]["code"] == 12
    assert out["oversize answer"]["code"] == 8
    assert out["deadline"] is True
    assert out["concurrent"] == 200


async def test_our_client_calls_their_server(go_server: str) -> None:
    client = await ttrpc.Client.connect_unix(go_server, timeout=10)
    methods = SERVICE.methods_by_name
    text = wrappers_pb2.StringValue

    big = bytes(range(256)) * (3 << 12)
    answer = await client.call(methods["Echo"], wrappers_pb2.BytesValue(value=big), timeout=20)
    assert answer.value == big

    with pytest.raises(ttrpc.RpcError) as caught:
        await client.call(methods["Fail"], text(value="y"), timeout=10)
    assert (caught.value.code, caught.value.message) == (ttrpc.Code.NOT_FOUND, "y: not found")

    found = await client.call(methods["Meta"], text(value="a"), timeout=10, metadata={"a": ["b"]})
    assert found.value == "b"

    with pytest.raises(ttrpc.RpcError) as caught:
        await client.call(methods["Grow"], text(value="1"), timeout=10)
    assert caught.value.code == ttrpc.Code.UNIMPLEMENTED, "the Go service has no such method"

    begin = time.monotonic()
    with pytest.raises(ttrpc.RpcError) as caught:
        await client.call(methods["Wait"], text(), timeout=0.3)
    assert caught.value.code == ttrpc.Code.DEADLINE_EXCEEDED
    assert time.monotonic() - begin < 5, "the deadline ended the call, not the handler"

    with pytest.raises(ttrpc.RpcError) as caught:
        await client.call(methods["Echo"], wrappers_pb2.BytesValue(value=bytes(5 << 20)), timeout=10)
    assert caught.value.code == ttrpc.Code.RESOURCE_EXHAUSTED

    async def one(number: int) -> bool:
        sent = str(number).encode()
        got = await client.call(methods["Echo"], wrappers_pb2.BytesValue(value=sent), timeout=20)
        return bool(got.value == sent)

    assert all(await asyncio.gather(*(one(number) for number in range(200)))), "the connection lives on"
    await client.close()


def test_the_go_program_is_built_from_this_tree(go: str) -> None:
    assert Path(go).is_relative_to(ROOT / "build")
