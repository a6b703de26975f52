"""Stdio over the shim's own socket: containerd 2.x's `io_type = "streaming"`.

What: a stdio URL `ttrpc+unix://SOCKET?streaming_id=ID` names a stream of the service
containerd.services.streaming.v1.Streaming, which the client opens before or after the process is made.
`STREAMS` holds, for each ID, a pipe: the process's pumps have one end, whoever has opened the stream the
other, so that everything that holds for FIFOs holds here (a client that goes away breaks nothing, unread
output stays, an input ends with CloseIO only).
Why a registry of the process: the ends meet by name, like FIFOs in a directory; a shim has one socket.
Invariants: what was not asked for by a window is never sent, and of the client's bytes only what the
window allows is held: a pipe and one message. A stream that nobody's stdio names waits, and ends with
its connection.
Source: containerd's core/streaming and core/transfer/streaming; facts/containerd-shim.md 2, 3.1.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from devices.errors import CallerError
from proto import streaming_pb2, transfer_streams_pb2
from shim.stdio.ends import InputEnd, OutputEnd
from shim.stdio.pump import readable, write_all

__all__ = ["STREAMS", "StreamingService", "Streams", "stream_id_of"]

#: Bytes in one message, and the window that is granted for input: a pipe's worth.
_CHUNK = 32 << 10
_WINDOW = 64 << 10
_MAX_ID = 1024  # characters

EndT = TypeVar("EndT", InputEnd, OutputEnd)
MessageT = TypeVar("MessageT", transfer_streams_pb2.Data, transfer_streams_pb2.WindowUpdate)


def stream_id_of(url: str) -> str:
    """The stream that a `ttrpc+unix://` URL names. Raises CallerError."""
    name = parse_qs(urlsplit(url).query).get("streaming_id", [""])[0]
    if not 0 < len(name) <= _MAX_ID:
        raise CallerError(
            f"{url[:200]!r} needs a streaming_id of at most {_MAX_ID} characters",
            phase="stdio",
            code="INVALID_ARGUMENT",
        )
    return name


class Streams:
    """The streams of this shim by their ids."""

    def __init__(self) -> None:
        self._ends: dict[str, InputEnd | OutputEnd] = {}
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def output(self, url: str) -> OutputEnd:
        """What a process's output is written to."""
        return self._add(url, lambda read, write: OutputEnd(write, read))

    def input(self, url: str) -> InputEnd:
        """What a process's input is read from."""
        return self._add(url, InputEnd)

    def _add(self, url: str, make: Callable[[int, int], EndT]) -> EndT:
        name = stream_id_of(url)
        self._ends = {key: end for key, end in self._ends.items() if end.keeper >= 0}
        if name in self._ends:
            raise CallerError(f"the stream {name} is in use already", phase="stdio", code="ALREADY_EXISTS")
        end = make(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        self._ends[name] = end
        for waiter in self._waiting.pop(name, []):
            if not waiter.done():
                waiter.set_result(None)
        return end

    async def attach(self, name: str) -> tuple[int, bool]:
        """(a descriptor for the client's side of the pipe, whether it is an input), once a stdio has it.

        The descriptor is the caller's own. Raises CallerError NOT_FOUND if the stdio goes meanwhile.
        """
        while (end := self._ends.get(name)) is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(name, []).append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                others = self._waiting.get(name, [])
                if waiter in others:
                    others.remove(waiter)
                if not others:
                    self._waiting.pop(name, None)
                raise
        if end.keeper < 0:
            raise CallerError(f"the stream {name} has ended: not found", code="NOT_FOUND")
        return os.dup(end.keeper), isinstance(end, InputEnd)


STREAMS = Streams()


class StreamingService:
    """The service: one RPC, which a client calls for each stream."""

    def __init__(self, streams: Streams = STREAMS) -> None:
        self._streams = streams

    async def stream(self, _ctx: object, requests: AsyncIterator[AnyMessage]) -> AsyncIterator[AnyMessage]:
        """The first message names the stream; what follows are Data and WindowUpdate."""
        try:
            name = streaming_pb2.StreamInit.FromString((await anext(requests)).value).id
        except (DecodeError, StopAsyncIteration) as error:
            raise CallerError("a stream begins with a StreamInit", code="INVALID_ARGUMENT") from error
        yield _any(Empty())  # the client waits for this before it goes on
        fd, is_input = await self._streams.attach(name)
        try:
            copy = _to_pipe(requests, fd) if is_input else _from_pipe(fd, requests)
            async with aclosing(copy):
                async for message in copy:
                    yield message
        finally:
            os.close(fd)


async def _to_pipe(requests: AsyncIterator[AnyMessage], fd: int) -> AsyncGenerator[AnyMessage, None]:
    """The client's bytes to the process: a window for it at the beginning, and for all that was taken."""
    yield _window(_WINDOW)
    async for message in requests:
        data = _parse(message, transfer_streams_pb2.Data).data
        try:
            await write_all(fd, memoryview(data))
        except BrokenPipeError:  # the process has closed its stdin, or is gone
            return
        yield _window(len(data))


async def _from_pipe(fd: int, requests: AsyncIterator[AnyMessage]) -> AsyncGenerator[AnyMessage, None]:
    """The process's bytes to the client, as far as its window reaches, to their end."""
    windows = _Windows(requests)
    try:
        while (room := await windows.room()) > 0:
            try:
                data = os.read(fd, min(room, _CHUNK))
            except BlockingIOError:
                await windows.until(readable(fd))
                continue
            if not data:
                return
            windows.left -= len(data)
            yield _any(transfer_streams_pb2.Data(data=data))
    finally:
        await windows.close()


class _Windows:
    """What a client still takes: `left` bytes, 0 room after it has gone."""

    def __init__(self, requests: AsyncIterator[AnyMessage]) -> None:
        self.left = 0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._take(requests))

    async def _take(self, requests: AsyncIterator[AnyMessage]) -> None:
        async for message in requests:
            update = _parse(message, transfer_streams_pb2.WindowUpdate).update
            self.left = min(self.left + max(0, update), 1 << 31)
            self._changed.set()

    async def room(self) -> int:
        """How many bytes may be sent, at least one; 0 if the client is gone."""
        while self.left <= 0 and not self._task.done():
            self._changed.clear()
            await self.until(self._changed.wait())
        return 0 if self._task.done() else self.left

    async def until(self, work: Coroutine[Any, Any, Any]) -> None:
        """Wait for `work`, or for the client's end."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Stop listening; what the client said wrong is said back. Raises CallerError."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()


def _any(message: Message) -> AnyMessage:
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def _window(size: int) -> AnyMessage:
    return _any(transfer_streams_pb2.WindowUpdate(update=size))


def _parse(message: AnyMessage, kind: type[MessageT]) -> MessageT:
    name = kind.DESCRIPTOR.full_name
    if message.type_url.rsplit("/", 1)[-1] != name:
        raise CallerError(f"{name} expected, not {message.type_url[:80]!r}", code="INVALID_ARGUMENT")
    try:
        return kind.FromString(message.value)
    except DecodeError as error:
        raise CallerError(f"a {name} that cannot be read", code="INVALID_ARGUMENT") from error
