"""The asyncio server: a task for each call, on any number of listening sockets.

What: `Server` with its registrations, and one `_Connection` per peer.
Invariants: a call is answered at most once, whatever races (its handler's end, its deadline, the peer
going). Calls per connection, unread messages and unwritten replies are bounded. A handler that may not
be cancelled runs to its end even if nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing
from typing import Any, Self

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ._connection import MessageTooLarge, ServerConnection
from ._endpoint import Endpoint, Inbox
from ._errors import ConnectionClosed, RemoteProtocolError, RpcError
from ._events import DataReceived, EndReceived, Event, RequestReceived, StreamFailed
from ._frames import MAX_MESSAGE
from ._names import snake_case
from ._peers import MAX_CALLS, Peers
from ._state import State
from ._status import Code

__all__ = ["CallContext", "Server"]

MAX_CONCURRENT = 1024
BACKLOG = 128
CLOSING = "the server is closing"
CANCEL_SECONDS = 1.0
"""How long `Server.close` waits for handlers that it has cancelled."""

_ucred = struct.Struct("3i")


class CallContext:
    """What a handler knows of its call besides the request.

    `deadline` is a time of the loop's clock, or None. `peer_uid` is the user of the process that
    connected, None if the socket is not a unix socket.
    """

    __slots__ = ("deadline", "metadata", "method", "peer_uid", "service")

    def __init__(
        self,
        service: str,
        method: str,
        metadata: dict[str, list[str]] | None = None,
        deadline: float | None = None,
        peer_uid: int | None = None,
    ) -> None:
        self.service = service
        self.method = method
        self.metadata = metadata or {}
        self.deadline = deadline
        self.peer_uid = peer_uid


class _Method:
    """A registered handler with all that is looked up once instead of at each call."""

    __slots__ = (
        "client_streaming",
        "decode",
        "handler",
        "name",
        "response_class",
        "run_to_end",
        "server_streaming",
        "service",
    )

    def __init__(
        self, service: str, method: MethodDescriptor, handler: Callable[..., Any], run_to_end: bool
    ) -> None:
        self.service = service
        self.name = method.name
        self.handler = handler
        self.run_to_end = run_to_end
        self.client_streaming = method.client_streaming
        self.server_streaming = method.server_streaming
        self.decode: Callable[[bytes], Message] = GetMessageClass(method.input_type).FromString
        self.response_class: type[Message] = GetMessageClass(method.output_type)

    def encode(self, message: object) -> bytes:
        """Serialize what the handler returned or yielded."""
        if not isinstance(message, self.response_class):
            raise TypeError(
                f"the handler of {self.service}/{self.name} gave {type(message).__name__}"
                f" instead of {self.response_class.DESCRIPTOR.full_name}"
            )
        return message.SerializeToString()


class Server:
    """A ttrpc server.

    `allowed_uids`: users that may connect (SO_PEERCRED); None for everybody, which is the only choice
    for sockets that are not unix sockets. `max_message`: bytes of one message, of both directions.
    `max_concurrent`: calls in progress per connection; one more is answered RESOURCE_EXHAUSTED. What all
    connections together may cost: see `_peers`.
    """

    def __init__(
        self,
        *,
        allowed_uids: Collection[int] | None = None,
        max_message: int = MAX_MESSAGE,
        max_concurrent: int = MAX_CONCURRENT,
    ) -> None:
        self.allowed_uids = None if allowed_uids is None else frozenset(allowed_uids)
        self.max_message = max_message
        self.max_concurrent = max_concurrent
        self.methods: dict[str, dict[str, _Method]] = {}
        self._loaders: dict[str, Callable[[], None]] = {}
        self.connections: set[_Connection] = set()
        self.peers = Peers()
        self.tasks: set[asyncio.Task[None]] = set()
        self.closing = False
        self._listeners: list[asyncio.Server] = []
        self._closed = asyncio.Event()

    def register(
        self, service: ServiceDescriptor, impl: object, *, run_to_end: bool | Collection[str] = False
    ) -> None:
        """Serve `service` by the methods of `impl`: RPC `CloseIO` by `impl.close_io(ctx, request)`.

        Handlers, by the form of the RPC:

        - unary: `async def (ctx, request) -> response`
        - client streaming: `async def (ctx, requests) -> response`; `requests` is an async iterator
        - server streaming: an async generator `(ctx, request)`
        - both: an async generator `(ctx, requests)`

        RPCs that `impl` lacks are answered UNIMPLEMENTED. A handler is cancelled at its call's deadline
        and when the peer is gone, except those that `run_to_end` names (RPC names, or True for all):
        their callers get DEADLINE_EXCEEDED in time as well, but what they do is done whole.

        Raises ValueError if the service is registered already, if `run_to_end` names an RPC that it does
        not have, or if `impl` handles none of its RPCs.
        """
        if service.full_name in self.methods:
            raise ValueError(f"service {service.full_name} is registered already")
        if not isinstance(run_to_end, bool):
            unknown = sorted(set(run_to_end) - set(service.methods_by_name))
            if unknown:
                raise ValueError(f"service {service.full_name} has no {', '.join(unknown)}")
        methods: dict[str, _Method] = {}
        for method in service.methods:
            handler = getattr(impl, snake_case(method.name), None)
            if handler is not None:
                to_end = run_to_end if isinstance(run_to_end, bool) else method.name in run_to_end
                methods[method.name] = _Method(service.full_name, method, handler, to_end)
        if not methods:
            raise ValueError(f"{type(impl).__name__} handles no RPC of {service.full_name}")
        self.methods[service.full_name] = methods

    def register_later(self, service: str, load: Callable[[], None]) -> None:
        """Serve a service that few peers call: `load` registers it, when its first call comes.

        `service` is its full name. `load` runs on the loop, once.
        """
        self._loaders[service] = load

    def find(self, service: str) -> dict[str, _Method] | None:
        """The methods of a service by their names, None if nobody serves it."""
        load = self._loaders.pop(service, None)
        if load is not None:
            load()
        return self.methods.get(service)

    async def serve(self, sock: socket.socket) -> None:
        """Accept connections on a listening stream socket; returns when `close` has ended.

        May run for several sockets at once. The socket is closed at the end, its file is not removed.
        Cancelling it stops accepting, no more.
        """
        if self.allowed_uids is not None and sock.family != socket.AF_UNIX:
            raise ValueError("allowed_uids needs a unix socket: other peers have no uid")
        if self.closing:
            sock.close()
            return
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: _Connection(self), sock=sock, backlog=BACKLOG)
        self._listeners.append(listener)
        try:
            await self._closed.wait()
        finally:
            listener.close()

    async def serve_connected(self, sock: socket.socket) -> None:
        """Serve the one peer of a connected stream socket, which is closed with the connection. Returns when
        that has begun. No more than `serve` once `close` was called."""
        if self.closing:
            sock.close()
            return
        await asyncio.get_running_loop().connect_accepted_socket(lambda: _Connection(self), sock)

    async def close(self, grace: float) -> None:
        """Stop accepting, let calls in progress end for up to `grace` seconds, write their replies, close.

        New calls on open connections are answered UNAVAILABLE. What lasts longer than `grace` is
        cancelled, except handlers that run to their end: those go on without a connection. Called from a
        handler, it does not wait for that handler, whose reply is then lost.
        """
        self.closing = True
        for listener in self._listeners:
            listener.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + grace
        current = asyncio.current_task()
        pending = {task for task in self.tasks if task is not current}
        if pending:
            await asyncio.wait(pending, timeout=grace)
        connections = list(self.connections)
        cancelled = {task for connection in connections for task in connection.cancel_calls(current)}
        if cancelled:
            await asyncio.wait(cancelled, timeout=CANCEL_SECONDS)
        for connection in connections:
            connection.close()
        lost = [connection.lost for connection in connections if not connection.lost.done()]
        if lost:
            await asyncio.wait(lost, timeout=max(0.0, until - loop.time()))
        for connection in connections:
            connection.abort()
        self._closed.set()


class _Connection(Endpoint):
    """One peer. While it does not read its replies, no more requests are read from it."""

    reads_while_unread = False

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.wire = ServerConnection(server.max_message)
        self.calls: dict[int, _Call] = {}
        self.running = 0  # handlers, those included whose call is answered already
        self.peer_uid: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check who it is."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
            self.peer_uid = _ucred.unpack(credentials)[1]
        allowed = self.server.allowed_uids
        refused = self.server.closing or (allowed is not None and self.peer_uid not in allowed)
        if refused or not self.server.peers.add(self):
            self.abort()
            return
        self.server.connections.add(self)

    def received(self, data: memoryview) -> None:
        """See Endpoint.received."""
        whole = False
        try:
            for event in self.wire.receive(data):
                whole = True
                self._handle(event)
        except RemoteProtocolError:
            self.abort()
        self.server.peers.heard(self, self.wire.held, whole=whole)

    def _handle(self, event: Event) -> None:
        if type(event) is RequestReceived:
            self._begin(event)
            return
        call = self.calls.get(event.stream_id)
        if type(event) is StreamFailed:
            self.write(self.wire.reject(event))
            if call is not None:
                call.give_up(RpcError(event.code, event.message))
        elif call is not None and call.inbox is not None:
            if type(event) is DataReceived:
                call.inbox.put(event.data)
            elif type(event) is EndReceived:
                call.inbox.finish()

    def ended(self, reason: str) -> None:
        """See Endpoint.ended."""
        self.server.connections.discard(self)
        self.server.peers.discard(self)
        for call in list(self.calls.values()):
            call.give_up(ConnectionClosed(reason))

    def cancel_calls(self, except_task: asyncio.Task[Any] | None) -> list[asyncio.Task[None]]:
        """The server closes: answer all calls, and end those that may be cancelled; returns their tasks."""
        cancelled: list[asyncio.Task[None]] = []
        for call in list(self.calls.values()):
            if call.task is not None and call.task is not except_task:
                call.answer_error(Code.UNAVAILABLE, CLOSING)
                if call.give_up(ConnectionClosed(CLOSING)):
                    cancelled.append(call.task)
        return cancelled

    def _begin(self, event: RequestReceived) -> None:
        methods = self.server.find(event.service)
        method = methods.get(event.method) if methods is not None else None
        refusal: tuple[Code, str]
        if self.server.closing:
            refusal = (Code.UNAVAILABLE, CLOSING)
        elif method is None:
            what = f"service {event.service}" if methods is None else f"method {event.method}"
            refusal = (Code.UNIMPLEMENTED, what)
        elif self.running >= self.server.max_concurrent:
            refusal = (Code.RESOURCE_EXHAUSTED, f"{self.running} calls are in progress on this connection")
        elif self.server.peers.calls >= MAX_CALLS:
            refusal = (Code.RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls are in progress")
        else:
            try:
                call = _Call(self, method, event)
            except DecodeError as error:
                refusal = (Code.INVALID_ARGUMENT, f"the request cannot be decoded: {error}")
            else:
                call.start()
                return
        self.write(self.wire.send_error(event.stream_id, *refusal))


class _Call:
    """One call: its task, its deadline, its answer."""

    __slots__ = (
        "_cancelled",
        "_connection",
        "_context",
        "_method",
        "_request",
        "_timer",
        "inbox",
        "stream_id",
        "task",
    )

    def __init__(self, connection: _Connection, method: _Method, event: RequestReceived) -> None:
        self._connection = connection
        self._method = method
        self.stream_id = event.stream_id
        self.inbox: Inbox | None = None
        self._request: Message | AsyncIterator[Message]
        if method.client_streaming:
            self.inbox = Inbox(connection)
            if event.payload:
                self.inbox.put(event.payload)
            if not event.is_open:
                self.inbox.finish()
            self._request = _Messages(self.inbox, method.decode)
        else:
            self._request = method.decode(event.payload)
        self._timer: asyncio.TimerHandle | None = None
        deadline = None
        if event.timeout_nano > 0:
            deadline = connection.loop.time() + event.timeout_nano / 1e9
            self._timer = connection.loop.call_at(deadline, self._expire)
        self._context = CallContext(
            event.service, event.method, event.metadata, deadline, connection.peer_uid
        )
        self._cancelled = False
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Run the handler."""
        connection = self._connection
        connection.calls[self.stream_id] = self
        connection.running += 1
        connection.server.peers.calls += 1
        self.task = task = connection.loop.create_task(self._run())
        connection.server.tasks.add(task)

    def answer_error(self, code: Code, message: str) -> None:
        """End the call with a status, if it is not ended yet."""
        wire = self._connection.wire
        if wire.state(self.stream_id) is not State.DONE:
            self._connection.write(wire.send_error(self.stream_id, code, message))

    def give_up(self, error: Exception) -> bool:
        """Nobody waits for the answer any more: cancel the handler unless it runs to its end.

        Returns whether it was cancelled, now or before. `error` is what its messages end with.
        """
        self._connection.calls.pop(self.stream_id, None)
        if self.inbox is not None:
            self.inbox.finish(error)
        if not self._method.run_to_end and self.task is not None and not self._cancelled:
            self._cancelled = True
            self.task.cancel()
        return self._cancelled

    def _expire(self) -> None:
        self.answer_error(Code.DEADLINE_EXCEEDED, f"{self._method.name}: the deadline of the call has passed")
        self.give_up(RpcError(Code.DEADLINE_EXCEEDED, "the deadline of the call has passed"))

    async def _run(self) -> None:
        method = self._method
        connection = self._connection
        try:
            if method.server_streaming:
                await self._send_stream(method.handler(self._context, self._request))
            else:
                payload = method.encode(await method.handler(self._context, self._request))
                if connection.wire.state(self.stream_id) is not State.DONE:
                    connection.write(connection.wire.send_response(self.stream_id, payload))
        except asyncio.CancelledError:
            self.answer_error(Code.CANCELLED, "the call was cancelled")
            if not self._cancelled:
                raise
        except Exception as error:  # noqa: BLE001  (whatever a handler raises is its caller's)
            self._answer_exception(error)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self.inbox is not None:
                self.inbox.discard()
            connection.calls.pop(self.stream_id, None)
            connection.running -= 1
            connection.server.peers.calls -= 1
            if self.task is not None:
                connection.server.tasks.discard(self.task)

    async def _send_stream(self, messages: AsyncGenerator[Message, None]) -> None:
        if not hasattr(messages, "aclose"):
            raise TypeError(f"the handler of {self._method.name} is not an async generator")
        connection, wire = self._connection, self._connection.wire
        async with aclosing(messages):
            async for message in messages:
                payload = self._method.encode(message)
                if wire.state(self.stream_id) is State.DONE:
                    continue
                connection.write(wire.send_data(self.stream_id, payload))
                await connection.drain()
        if wire.state(self.stream_id) is not State.DONE:
            connection.write(wire.send_end(self.stream_id))

    def _answer_exception(self, error: Exception) -> None:
        if isinstance(error, RpcError):
            code = Code.UNKNOWN if error.code is Code.OK else error.code
            self.answer_error(code, error.message)
            return
        if isinstance(error, MessageTooLarge):
            self.answer_error(Code.RESOURCE_EXHAUSTED, str(error))
            return
        if isinstance(error, MemoryError):  # no fault of the handler's, and its text is mostly empty
            text = str(error) or type(error).__name__
            self.answer_error(Code.RESOURCE_EXHAUSTED, f"no memory is left: {text}")
            return
        name = getattr(error, "code", None)
        if isinstance(name, str) and name in Code.__members__ and name != "OK":
            self.answer_error(Code[name], str(error))
            return
        self.answer_error(Code.UNKNOWN, str(error) or type(error).__name__)
        self._connection.loop.call_exception_handler(
            {
                "message": f"ttrpc: the handler of {self._method.service}/{self._method.name} failed",
                "exception": error,
            }
        )


class _Messages:
    """The request of a client-streaming handler. An iterator, not a generator: nothing to close."""

    __slots__ = ("_decode", "_inbox")

    def __init__(self, inbox: Inbox, decode: Callable[[bytes], Message]) -> None:
        self._inbox = inbox
        self._decode = decode

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        data = await self._inbox.get()
        if data is None:
            raise StopAsyncIteration
        try:
            return self._decode(data)
        except DecodeError as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"a message cannot be decoded: {error}") from error
