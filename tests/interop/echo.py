"""The Python side of interop.Echo: descriptors, server (`python -m tests.interop.echo SOCKET`), Go build.

Used by the interop tests and by the bench. The Go program is built once for each state of its source.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2

import ttrpc

__all__ = ["SERVICE", "Echo", "build_go", "serve"]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "go" / "main.go"
_METHODS = {
    "Echo": ("BytesValue", "BytesValue"),
    "Fail": ("StringValue", "StringValue"),
    "Grow": ("StringValue", "BytesValue"),
    "Meta": ("StringValue", "StringValue"),
    "Wait": ("StringValue", "StringValue"),
}


def _service() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="tests/interop/echo.proto", package="interop", syntax="proto3"
    )
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    service = file.service.add(name="Echo")
    for name, (request, response) in _METHODS.items():
        service.method.add(
            name=name,
            input_type=f".google.protobuf.{request}",
            output_type=f".google.protobuf.{response}",
        )
    return file


descriptor_pool.Default().Add(_service())
SERVICE = descriptor_pool.Default().FindServiceByName("interop.Echo")


class Echo:
    """The service; `Grow` answers with as many bytes as it is told."""

    async def echo(self, _ctx: object, request: wrappers_pb2.BytesValue) -> wrappers_pb2.BytesValue:
        return request

    async def fail(self, _ctx: object, request: wrappers_pb2.StringValue) -> wrappers_pb2.StringValue:
        raise ttrpc.RpcError(ttrpc.Code.NOT_FOUND, f"{request.value}: not found")

    async def grow(self, _ctx: object, request: wrappers_pb2.StringValue) -> wrappers_pb2.BytesValue:
        return wrappers_pb2.BytesValue(value=bytes(int(request.value)))

    async def meta(
        self, ctx: ttrpc.CallContext, request: wrappers_pb2.StringValue
    ) -> wrappers_pb2.StringValue:
        return wrappers_pb2.StringValue(value=(ctx.metadata.get(request.value) or [""])[0])

    async def wait(self, _ctx: object, request: wrappers_pb2.StringValue) -> wrappers_pb2.StringValue:
        await asyncio.sleep(20)
        return request


async def serve(path: str) -> None:
    """Serve on a new unix socket until cancelled."""
    server = ttrpc.Server(allowed_uids={os.getuid()})
    server.register(SERVICE, Echo())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen()
    sock.setblocking(False)
    print("listening", flush=True)
    try:
        await server.serve(sock)
    finally:
        await server.close(0)


def build_go() -> str:
    """The path of the built Go program. Raises FileNotFoundError without a Go compiler."""
    go = shutil.which("go")
    if go is None:
        raise FileNotFoundError(
            "there is no go: apt-get install golang-go golang-github-containerd-ttrpc-dev"
        )
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = ROOT / "build" / "interop" / f"ttrpc-{digest}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        environment = {
            **os.environ,
            "GO111MODULE": "off",
            "GOPATH": "/usr/share/gocode",
            "GOCACHE": str(ROOT / "build" / "interop" / "cache"),
            "GOFLAGS": "",
        }
        subprocess.run(
            [go, "build", "-o", str(temporary), str(SOURCE)], check=True, env=environment, timeout=600
        )
        temporary.rename(target)
    return str(target)


async def bench(path: str, count: int) -> list[float]:
    """Round-trip times of `count` calls over the socket at `path`, in microseconds."""
    client = await ttrpc.Client.connect_unix(path, timeout=10)
    method = SERVICE.methods_by_name["Echo"]
    request = wrappers_pb2.BytesValue(value=b"0123456789abcdef")
    times = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        await client.call(method, request, timeout=10)
        times.append((time.perf_counter_ns() - begin) / 1000)
    await client.close()
    return times


if __name__ == "__main__":
    if len(sys.argv) == 2:
        asyncio.run(serve(sys.argv[1]))
    else:
        print("\n".join(f"{each * 1000:.0f}" for each in asyncio.run(bench(sys.argv[1], int(sys.argv[2])))))
