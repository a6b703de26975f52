"""The service that ttrpc is tested with: every form of call, made of protobuf's well-known types.

Its descriptor is built here instead of by protoc, so that Go programs can serve and call the same
methods with nothing but their protobuf library.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue

from ttrpc import CallContext, Code, RpcError

BYTES, STRING, INT = (f".google.protobuf.{name}Value" for name in ("Bytes", "String", "Int64"))

METHODS = {
    # name: (input, output, client streams, server streams)
    "Echo": (BYTES, BYTES, False, False),
    "Fail": (STRING, BYTES, False, False),  # "5:text" -> NOT_FOUND, "text"
    "Wait": (INT, INT, False, False),  # answers after so many milliseconds
    "Metadata": (STRING, STRING, False, False),  # the values of this key, joined by "|"
    "CloseIO": (BYTES, BYTES, False, False),
    "Count": (BYTES, INT, True, False),  # bytes of all messages
    "Repeat": (INT, BYTES, False, True),  # so many messages: b"0", b"1", ...
    "Chat": (BYTES, BYTES, True, True),  # each message back
}


def _build() -> ServiceDescriptor:
    file = descriptor_pb2.FileDescriptorProto(
        name="tests/ttrpc_echo.proto",
        package="ttrpc.test",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    service = file.service.add(name="Echo")
    for name, (takes, gives, client, server) in METHODS.items():
        service.method.add(
            name=name, input_type=takes, output_type=gives, client_streaming=client, server_streaming=server
        )
    pool = descriptor_pool.Default()
    try:
        return pool.FindServiceByName("ttrpc.test.Echo")
    except KeyError:
        return pool.AddSerializedFile(file.SerializeToString()).services_by_name["Echo"]


ECHO = _build()


class Echo:
    """Its handlers. `started` and `ended` record calls of Wait, `cancelled` those that were cancelled."""

    def __init__(self) -> None:
        self.contexts: list[CallContext] = []
        self.started = 0
        self.ended = 0
        self.cancelled = 0
        self.changed = asyncio.Event()

    async def echo(self, ctx: CallContext, request: BytesValue) -> BytesValue:
        self.contexts.append(ctx)
        return request

    async def fail(self, ctx: CallContext, request: StringValue) -> BytesValue:
        code, _, text = request.value.partition(":")
        if code == "memory":
            raise MemoryError
        raise RpcError(Code(int(code)), text)

    async def wait(self, ctx: CallContext, request: Int64Value) -> Int64Value:
        self.started += 1
        self.changed.set()
        try:
            await asyncio.sleep(request.value / 1000)
        except asyncio.CancelledError:
            self.cancelled += 1
            self.changed.set()
            raise
        self.ended += 1
        self.changed.set()
        return request

    async def metadata(self, ctx: CallContext, request: StringValue) -> StringValue:
        return StringValue(value="|".join(ctx.metadata.get(request.value, [])))

    async def close_io(self, ctx: CallContext, request: BytesValue) -> BytesValue:
        return BytesValue(value=b"closed")

    async def count(self, ctx: CallContext, requests: AsyncIterator[BytesValue]) -> Int64Value:
        return Int64Value(value=sum([len(request.value) async for request in requests]))

    async def repeat(self, ctx: CallContext, request: Int64Value) -> AsyncIterator[BytesValue]:
        if request.value < 0:
            raise RpcError(Code.OUT_OF_RANGE, "less than nothing")
        for number in range(request.value):
            yield BytesValue(value=b"%d" % number)

    async def chat(self, ctx: CallContext, requests: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
        async for request in requests:
            if request.value == b"fail":
                raise RpcError(Code.ABORTED, "as asked")
            yield request

    async def until(self, condition: str, value: int) -> None:
        """Wait until an attribute has this value."""
        while getattr(self, condition) != value:
            self.changed.clear()
            await self.changed.wait()
