"""The asyncio client: any number of calls at once over one connected socket.

What: `Client`, its calls by method descriptor, `Stub`, which names them, and `ClientStream`.
Invariants: every call ends: with its response, its deadline, its cancellation, or the connection's end.
A call that is given up leaves nothing behind but a stream id; its late answer is dropped.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ._connection import ClientConnection, MessageTooLarge, Metadata
from ._endpoint import Endpoint, Inbox
from ._errors import ConnectionClosed, LocalProtocolError, RemoteProtocolError, RpcError
from ._events import DataReceived, EndReceived, Event, ResponseReceived, StreamFailed
from ._frames import MAX_MESSAGE
from ._names import snake_case
from ._state import Action, State
from ._status import Code

__all__ = ["Client", "ClientStream", "Stub"]


FLUSH_SECONDS = 1.0
BACKLOG_SECONDS = 0.005
"""Between two attempts to connect to a server whose backlog is full, of which nothing announces the end."""


class _Method:
    """What is looked up once per method instead of at each call."""

    __slots__ = ("client_streaming", "decode", "name", "server_streaming", "service")

    def __init__(self, method: MethodDescriptor) -> None:
        assert method.containing_service is not None
        self.service = method.containing_service.full_name
        self.name = method.name
        self.client_streaming = method.client_streaming
        self.server_streaming = method.server_streaming
        self.decode: Callable[[bytes], Any] = GetMessageClass(method.output_type).FromString


class Client:
    """A ttrpc client on `sock`, a connected stream socket of any family, which it then owns.

    To be made where an event loop runs. `max_message`: bytes of one message, of both directions.
    """

    def __init__(self, sock: socket.socket, *, max_message: int = MAX_MESSAGE) -> None:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._endpoint = _Connection(max_message)
        self._methods: dict[MethodDescriptor, _Method] = {}
        self._connecting: asyncio.Task[Any] = loop.create_task(
            loop.create_connection(lambda: self._endpoint, sock=sock)
        )
        self._connecting.add_done_callback(self._endpoint.connecting_ended)

    @classmethod
    async def connect_unix(
        cls, path: str, *, timeout: float | None = None, max_message: int = MAX_MESSAGE
    ) -> Client:
        """Connect to a unix socket within `timeout` seconds. Raises OSError, of which TimeoutError is one."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(timeout):
                while not _connected(sock, path):  # noqa: ASYNC110  (nothing announces it)
                    await asyncio.sleep(BACKLOG_SECONDS)
        except BaseException:
            sock.close()
            raise
        return cls(sock, max_message=max_message)

    @property
    def closed(self) -> Awaitable[None]:
        """Resolves when the connection is gone, from whichever side."""
        return asyncio.shield(self._endpoint.lost)

    async def close(self) -> None:
        """Close the connection; calls in progress raise ConnectionClosed. Idempotent.

        What is written already goes out first, if the server reads it within a second.
        """
        await asyncio.wait([self._connecting])
        self._endpoint.close()
        await asyncio.wait([self._endpoint.lost], timeout=FLUSH_SECONDS)
        self._endpoint.abort()
        await self.closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def call(
        self,
        method: MethodDescriptor,
        request: Message,
        *,
        timeout: float | None,
        metadata: Metadata | None = None,
        max_response: int = MAX_MESSAGE,
    ) -> Any:
        """A unary call; returns the response message.

        `timeout` in seconds goes to the server as well; None waits for ever. Raises RpcError with the
        server's status, or with DEADLINE_EXCEEDED; ConnectionClosed when there is no answer to come. A
        response of more than `max_response` bytes, from a server that is not trusted to be brief, is not
        decoded: RpcError RESOURCE_EXHAUSTED.
        Cancelling it gives the call up here; the server is not told, the protocol has no way.
        """
        known = self._methods.get(method) or self._learn(method)
        if known.client_streaming or known.server_streaming:
            raise LocalProtocolError(f"{known.service}/{known.name} streams: use stream()")
        endpoint = self._endpoint
        deadline = None if timeout is None else self._loop.time() + timeout
        if not endpoint.is_ready:
            timeout = await self._until_ready(known, deadline)
        if timeout is not None and timeout <= 0:
            raise _deadline_exceeded(known)
        stream_id = self._begin(known, request, Action.SEND_UNARY_REQUEST, timeout, metadata)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        endpoint.answers[stream_id] = answer
        timer = None if deadline is None else self._loop.call_at(deadline, _expire, answer, known)
        try:
            payload = await answer
        finally:
            if timer is not None:
                timer.cancel()
            if endpoint.answers.pop(stream_id, None) is not None:
                endpoint.wire.abandon(stream_id)
        if len(payload) > max_response:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED,
                f"{known.name}: a response of {len(payload)} bytes, where {max_response} are the most",
            )
        return _decode(known, payload)

    async def stream(
        self,
        method: MethodDescriptor,
        request: Message | None = None,
        *,
        timeout: float | None,
        metadata: Metadata | None = None,
    ) -> ClientStream:
        """A call that streams in one or both directions; use it as a context manager.

        `request` is the request of a server-streaming call; where the client streams it is None, and
        messages go by `ClientStream.send`. `timeout` is for the whole call. Raises as `call` does.
        """
        known = self._methods.get(method) or self._learn(method)
        if not (known.client_streaming or known.server_streaming):
            raise LocalProtocolError(f"{known.service}/{known.name} is unary: use call()")
        if known.client_streaming != (request is None):
            raise LocalProtocolError(
                f"{known.service}/{known.name}: messages of a client stream go by send()"
            )
        deadline = None if timeout is None else self._loop.time() + timeout
        if not self._endpoint.is_ready:
            timeout = await self._until_ready(known, deadline)
        if timeout is not None and timeout <= 0:
            raise _deadline_exceeded(known)
        action = Action.SEND_OPEN_REQUEST if known.client_streaming else Action.SEND_REQUEST
        stream_id = self._begin(known, request, action, timeout, metadata)
        stream = ClientStream(self._endpoint, known, stream_id, deadline)
        self._endpoint.streams[stream_id] = stream
        return stream

    def stub(self, service: ServiceDescriptor, *, default_timeout: float | None = None) -> Stub:
        """The calls of `service` as methods: `stub.create_container(request, timeout=5)`."""
        return Stub(self, service, default_timeout)

    def _learn(self, method: MethodDescriptor) -> _Method:
        known = self._methods[method] = _Method(method)
        return known

    def _begin(
        self,
        method: _Method,
        request: Message | None,
        action: Action,
        timeout: float | None,
        metadata: Metadata | None,
    ) -> int:
        """Write the request; returns its stream id."""
        try:
            stream_id, data = self._endpoint.wire.send_request(
                method.service,
                method.name,
                b"" if request is None else request.SerializeToString(),
                action=action,
                timeout_nano=0 if timeout is None else _nanoseconds(timeout),
                metadata=metadata,
            )
        except MessageTooLarge as error:
            raise RpcError(Code.RESOURCE_EXHAUSTED, str(error)) from error
        self._endpoint.write(data)
        return stream_id

    async def _until_ready(self, method: _Method, deadline: float | None) -> float | None:
        """Wait until the connection is made and has room for a request; returns the seconds left."""
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait([self._connecting])
                await self._endpoint.drain()
        except TimeoutError:
            raise _deadline_exceeded(method) from None
        return None if deadline is None else deadline - self._loop.time()


class Stub:
    """The methods of one service, with the names that its handlers have (`snake_case`).

    Unary: `await stub.name(request, timeout=..., metadata=...)` is `Client.call`; streaming:
    `await stub.name(request_or_nothing, ...)` is `Client.stream`. Without `timeout` the default of the
    stub holds; `timeout=None` waits for ever.
    """

    def __init__(self, client: Client, service: ServiceDescriptor, default_timeout: float | None) -> None:
        self._client = client
        self._service = service.full_name
        self._default_timeout = default_timeout
        self._by_name = {snake_case(method.name): method for method in service.methods}

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = self._by_name.get(name)
        if method is None:
            raise AttributeError(f"{self._service} has no RPC {name}")
        bound = self._bind(method)
        setattr(self, name, bound)  # found without __getattr__ from now on
        return bound

    def _bind(self, method: MethodDescriptor) -> Callable[..., Coroutine[Any, Any, Any]]:
        client = self._client
        default = self._default_timeout

        def unary(
            request: Message, *, timeout: float | None = default, metadata: Metadata | None = None
        ) -> Coroutine[Any, Any, Any]:
            return client.call(method, request, timeout=timeout, metadata=metadata)

        def stream(
            request: Message | None = None,
            *,
            timeout: float | None = default,
            metadata: Metadata | None = None,
        ) -> Coroutine[Any, Any, ClientStream]:
            return client.stream(method, request, timeout=timeout, metadata=metadata)

        return stream if method.client_streaming or method.server_streaming else unary


class ClientStream:
    """One streaming call.

        async with await client.stream(method, timeout=10) as call:
            await call.send(message)           # where the client streams
            await call.end()
            async for message in call: ...     # where the server streams
            reply = await call.response()      # where it does not

    Leaving the block gives the call up if it has not ended. One task may send while another receives.
    """

    def __init__(
        self, endpoint: _Connection, method: _Method, stream_id: int, deadline: float | None
    ) -> None:
        self._endpoint = endpoint
        self._method = method
        self._id = stream_id
        self._inbox = Inbox(endpoint)
        self._error: Exception | None = None
        self._timer = None if deadline is None else endpoint.loop.call_at(deadline, self._expire)

    async def send(self, message: Message) -> None:
        """Send one message; waits while the connection's write buffer is full.

        Raises the call's error if it has failed, LocalProtocolError if it has ended or `end` was called,
        RpcError(RESOURCE_EXHAUSTED) if the message is above the limit.
        """
        if self._error is not None:
            raise self._error
        try:
            data = self._endpoint.wire.send_data(self._id, message.SerializeToString())
        except MessageTooLarge as error:
            raise RpcError(Code.RESOURCE_EXHAUSTED, str(error)) from error
        self._endpoint.write(data)
        if not self._endpoint.is_ready:
            await self._endpoint.drain()

    async def end(self) -> None:
        """Tell the server that no more messages come. Nothing happens if the call has ended."""
        if self._endpoint.wire.state(self._id) is State.OPEN:
            self._endpoint.write(self._endpoint.wire.send_end(self._id))

    def __aiter__(self) -> ClientStream:
        return self

    async def __anext__(self) -> Any:
        """The next message. Raises as `Client.call` does."""
        data = await self._inbox.get()
        if data is None:
            raise StopAsyncIteration
        return _decode(self._method, data)

    async def response(self) -> Any:
        """The one response of a call in which only the client streams. Raises as `Client.call` does."""
        data = await self._inbox.get()
        if data is None:
            raise RpcError(Code.INTERNAL, f"{self._method.name} ended without a response")
        return _decode(self._method, data)

    def cancel(self) -> None:
        """Give the call up. Idempotent; `async with` does it at its end."""
        self._stop(RpcError(Code.CANCELLED, "the call was given up"))
        self._inbox.discard()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def on_event(self, event: Event) -> None:
        """What the server says."""
        if type(event) is DataReceived:
            if self._method.server_streaming:
                self._inbox.put(event.data)
            else:
                self._stop(
                    RpcError(Code.INTERNAL, f"{self._method.name}: data from a server that does not stream")
                )
        elif type(event) is ResponseReceived and event.code is Code.OK:
            if event.payload or not self._method.server_streaming:
                self._inbox.put(event.payload)
            self._stop(None)
        elif isinstance(event, (ResponseReceived, StreamFailed)):
            self._stop(RpcError(event.code, event.message))
        elif type(event) is EndReceived:
            self._stop(None)

    def on_lost(self, reason: str) -> None:
        """The connection is gone."""
        self._stop(ConnectionClosed(reason))

    def _expire(self) -> None:
        self._stop(_deadline_exceeded(self._method))

    def _stop(self, error: Exception | None) -> None:
        """The call has ended, or is given up."""
        if self._endpoint.streams.pop(self._id, None) is None:
            return
        self._error = error
        self._inbox.finish(error)
        self._endpoint.write(self._endpoint.wire.abandon(self._id))
        if self._timer is not None:
            self._timer.cancel()


class _Connection(Endpoint):
    """Brings what the server says to the calls that wait for it."""

    def __init__(self, max_message: int) -> None:
        super().__init__()
        self.wire = ClientConnection(max_message)
        self.answers: dict[int, asyncio.Future[bytes]] = {}
        self.streams: dict[int, ClientStream] = {}

    def connecting_ended(self, task: asyncio.Task[Any]) -> None:
        """A transport could not be made."""
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self.connection_lost(error if isinstance(error, Exception) else None)

    def received(self, data: memoryview) -> None:
        """See Endpoint.received."""
        try:
            for event in self.wire.receive(data):
                self._handle(event)
        except RemoteProtocolError as error:
            self.ended(f"the server does not speak ttrpc: {error}")
            self.abort()

    def _handle(self, event: Event) -> None:
        answer = self.answers.pop(event.stream_id, None)
        if answer is None:
            stream = self.streams.get(event.stream_id)
            if stream is not None:
                stream.on_event(event)
        elif answer.done():
            pass  # it was cancelled or has expired, and its task has not run yet
        elif type(event) is ResponseReceived and event.code is Code.OK:
            answer.set_result(event.payload)
        elif isinstance(event, (ResponseReceived, StreamFailed)):
            answer.set_exception(RpcError(event.code, event.message))

    def eof_received(self) -> bool:
        """See asyncio.BufferedProtocol."""
        try:
            self.wire.receive_eof()
        except RemoteProtocolError as error:
            self.ended(str(error))
        return False  # and the transport closes itself

    def ended(self, reason: str) -> None:
        """See Endpoint.ended."""
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(ConnectionClosed(reason))
        for stream in list(self.streams.values()):
            stream.on_lost(reason)


def _connected(sock: socket.socket, path: str) -> bool:
    """False while the server's backlog is full. The loop's own sock_connect takes EAGAIN, which a unix socket
    says then, for a connection that is under way, and the socket for connected a moment later."""
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


def _nanoseconds(timeout: float) -> int:
    """For the wire, where 0 would mean no deadline."""
    return min(max(int(timeout * 1e9), 1), (1 << 63) - 1)


def _deadline_exceeded(method: _Method) -> RpcError:
    return RpcError(Code.DEADLINE_EXCEEDED, f"{method.name}: no answer before the deadline of the call")


def _expire(answer: asyncio.Future[bytes], method: _Method) -> None:
    if not answer.done():
        answer.set_exception(_deadline_exceeded(method))


def _decode(method: _Method, payload: bytes) -> Any:
    try:
        return method.decode(payload)
    except DecodeError as error:
        raise RpcError(Code.INTERNAL, f"{method.name}: the response cannot be decoded: {error}") from error
