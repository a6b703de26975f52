"""The protocol without input and output: bytes in, events out; calls in, bytes out.

What: `ClientConnection` and `ServerConnection`. They read no socket, know no clock and start no task;
`_client` and `_server` are the asyncio shells around them, and another shell would do as well.
Invariants: the peer's bytes raise `RemoteProtocolError` or nothing; a `send_*` method either returns the
bytes to write, or raises `LocalProtocolError` and has changed nothing. Finished streams are forgotten:
memory is bounded by the streams that are open, not by those that were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.message import DecodeError

from ._errors import LocalProtocolError, RemoteProtocolError
from ._events import DataReceived, EndReceived, Event, RequestReceived, ResponseReceived, StreamFailed
from ._frames import (
    FLAG_NO_DATA,
    FLAG_REMOTE_CLOSED,
    FLAG_REMOTE_OPEN,
    MAX_MESSAGE,
    TYPE_DATA,
    TYPE_REQUEST,
    TYPE_RESPONSE,
    FrameReader,
    encode_frame,
)
from ._state import CLIENT, SERVER, Action, State, Table
from ._status import Code
from ._wire_pb2 import KeyValue, Request, Response, Status

__all__ = ["ClientConnection", "MessageTooLarge", "Metadata", "ServerConnection"]

Metadata = Mapping[str, Sequence[str] | str]
"""Names with one value or several."""

MAX_STREAM_ID = 0xFFFFFFFF
MAX_STATUS_TEXT = 32 << 10
"""Characters of a status message: an exception's text may quote whatever it was about."""
MAX_METADATA = 1024
"""Values in the metadata of one request; a 4 MiB message has room for two million."""
MAX_REORDERED = 1024
"""How many stream ids that were jumped over are remembered as still unused."""


class MessageTooLarge(LocalProtocolError):  # noqa: N818  (says what is the matter)
    """A message of ours is above the limit; it was not sent."""


def _too_large(length: int, limit: int) -> str:
    return f"message length {length} exceeds maximum message size of {limit}"


class _Connection:
    """What both roles share: the frame reader, the table and the state of each open stream."""

    __slots__ = ("_limit", "_reader", "_streams", "_table")

    _misuse = Code.INVALID_ARGUMENT
    """What a stream ends with whose rules the peer has broken."""

    def __init__(self, table: Table, max_message: int) -> None:
        self._table = table
        self._limit = max_message
        self._reader = FrameReader(max_message)
        self._streams: dict[int, State] = {}  # open streams; all others are IDLE or DONE by their id

    @property
    def held(self) -> int:
        """Bytes that wait for the rest of their frame."""
        return self._reader.held

    def receive_eof(self) -> None:
        """The peer closed its side. Raises RemoteProtocolError if it did so inside a frame."""
        if self._reader.in_frame:
            raise RemoteProtocolError("the connection ended in the middle of a frame")

    def send_data(self, stream_id: int, payload: bytes) -> bytes:
        """One message of a stream; returns the bytes to write."""
        self._check_size(payload)
        self._send(stream_id, Action.SEND_DATA)
        return encode_frame(stream_id, TYPE_DATA, 0, payload)

    def send_end(self, stream_id: int) -> bytes:
        """No more messages from this side; returns the bytes to write."""
        self._send(stream_id, Action.SEND_END)
        return encode_frame(stream_id, TYPE_DATA, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, b"")

    def state(self, stream_id: int) -> State:
        """Where a stream is."""
        return self._streams.get(stream_id) or (State.DONE if self._was_used(stream_id) else State.IDLE)

    def _was_used(self, stream_id: int) -> bool:
        raise NotImplementedError

    def _check_size(self, data: bytes) -> None:
        if len(data) > self._limit:
            raise MessageTooLarge(_too_large(len(data), self._limit))

    def _send(self, stream_id: int, action: Action) -> None:
        """Move a stream by an action of ours, or raise LocalProtocolError."""
        state = self.state(stream_id)
        after = self._table[state].get(action)
        if after is None:
            raise LocalProtocolError(f"{action.name} is not possible on stream {stream_id}: {state.name}")
        self._set(stream_id, after)

    def _receive(self, stream_id: int, action: Action) -> bool:
        """Move a stream by an action of the peer; False if the table forbids it."""
        after = self._table[self.state(stream_id)].get(action)
        if after is None:
            return False
        self._set(stream_id, after)
        return True

    def _set(self, stream_id: int, state: State) -> None:
        if state is State.DONE:
            self._streams.pop(stream_id, None)
        else:
            self._streams[stream_id] = state

    def _receive_data(self, stream_id: int, flags: int, data: bytes) -> Iterator[Event]:
        """A data frame on a stream that is open or done."""
        state = self.state(stream_id)
        if state is State.DONE:
            return
        if data or not flags & FLAG_NO_DATA:
            if not self._receive(stream_id, Action.RECEIVE_DATA):
                yield self._fail(stream_id, self._misuse, f"data on a stream that is {state.name}")
                return
            yield DataReceived(stream_id, data)
        if flags & FLAG_REMOTE_CLOSED:
            if not self._receive(stream_id, Action.RECEIVE_END):
                yield self._fail(stream_id, self._misuse, f"the end of a stream that is {state.name}")
                return
            yield EndReceived(stream_id)

    def _fail(self, stream_id: int, code: Code, message: str) -> StreamFailed:
        """The stream ends here, so that what follows on it does not depend on when the shell answers."""
        self._streams.pop(stream_id, None)
        return StreamFailed(stream_id, code, message)


class ClientConnection(_Connection):
    """The side that opens streams."""

    __slots__ = ("_next_id",)

    _misuse = Code.INTERNAL  # the server's fault, while an invalid argument would be its caller's

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        super().__init__(CLIENT, max_message)
        self._next_id = 1

    def send_request(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        action: Action = Action.SEND_UNARY_REQUEST,
        timeout_nano: int = 0,
        metadata: Metadata | None = None,
    ) -> tuple[int, bytes]:
        """Begin a call; returns its stream id and the bytes to write.

        `action` is SEND_UNARY_REQUEST, SEND_REQUEST (the server streams) or SEND_OPEN_REQUEST (the
        client streams; a payload that is not empty is its first message). `timeout_nano` 0 is none.
        """
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise LocalProtocolError("all stream ids of this connection are used")
        request = Request(service=service, method=method, payload=payload, timeout_nano=timeout_nano)
        if metadata:
            for key, values in metadata.items():
                for value in (values,) if isinstance(values, str) else values:
                    request.metadata.append(KeyValue(key=key, value=value))
        data = request.SerializeToString()
        self._check_size(data)
        after = CLIENT[State.IDLE].get(action)
        if after is None:
            raise LocalProtocolError(f"{action.name} does not begin a call")
        self._next_id += 2
        self._streams[stream_id] = after
        return stream_id, encode_frame(stream_id, TYPE_REQUEST, _REQUEST_FLAGS[after], data)

    def abandon(self, stream_id: int) -> bytes:
        """Wait no longer for this call; what still comes for it is dropped.

        Returns bytes to write (none in most cases): a server that waits for our messages is told that
        none will come. ttrpc has no way of telling it more.
        """
        data = self.send_end(stream_id) if self._streams.get(stream_id) is State.OPEN else b""
        self._send(stream_id, Action.ABANDON)
        return data

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Take the next bytes from the peer; to be iterated to its end. Raises RemoteProtocolError."""
        for stream_id, kind, flags, body, length in self._reader.feed(data):
            if kind not in (TYPE_RESPONSE, TYPE_DATA):
                if kind == TYPE_REQUEST:
                    raise RemoteProtocolError("the server sent a request")
                continue  # later versions of the protocol may have more types
            if not self._was_used(stream_id):
                raise RemoteProtocolError(f"an answer on stream {stream_id}, which was never opened")
            if body is None:
                if stream_id in self._streams:
                    yield self._fail(stream_id, Code.RESOURCE_EXHAUSTED, _too_large(length, self._limit))
            elif kind == TYPE_DATA:
                yield from self._receive_data(stream_id, flags, body)
            elif stream_id in self._streams:
                yield self._receive_response(stream_id, body)

    def _receive_response(self, stream_id: int, body: bytes) -> Event:
        try:
            response = Response.FromString(body)
        except DecodeError as error:
            return self._fail(stream_id, Code.INTERNAL, f"the response cannot be decoded: {error}")
        self._receive(stream_id, Action.RECEIVE_RESPONSE)
        status = response.status
        return ResponseReceived(stream_id, Code.of(status.code), status.message, response.payload)

    def _was_used(self, stream_id: int) -> bool:
        return stream_id % 2 == 1 and stream_id < self._next_id


_REQUEST_FLAGS = {
    State.UNARY: 0,
    State.HALF_CLOSED: FLAG_REMOTE_CLOSED,
    State.OPEN: FLAG_REMOTE_OPEN,
}


_OK = Status()


class ServerConnection(_Connection):
    """The side that answers.

    Stream ids are used once. They need not come in order: some clients number their calls before they
    queue them, so ids that were jumped over stay usable (the latest `MAX_REORDERED` of them).
    """

    __slots__ = ("_last_id", "_skipped")

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        super().__init__(SERVER, max_message)
        self._last_id = -1
        self._skipped: dict[int, None] = {}  # ids below `_last_id` that were not used, oldest first

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Take the next bytes from the peer; to be iterated to its end. Raises RemoteProtocolError."""
        for stream_id, kind, flags, body, length in self._reader.feed(data):
            if kind == TYPE_REQUEST:
                yield self._receive_request(stream_id, flags, body, length)
            elif kind == TYPE_DATA:
                if not self._was_used(stream_id):
                    yield self._fail(stream_id, Code.INVALID_ARGUMENT, "data before a request")
                elif body is not None:
                    yield from self._receive_data(stream_id, flags, body)
                elif stream_id in self._streams:
                    yield self._fail(stream_id, Code.RESOURCE_EXHAUSTED, _too_large(length, self._limit))
            elif kind == TYPE_RESPONSE:
                raise RemoteProtocolError("the client sent a response")

    def _receive_request(self, stream_id: int, flags: int, body: bytes | None, length: int) -> Event:
        if stream_id % 2 == 0:
            return self._fail(
                stream_id, Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams"
            )
        if self._was_used(stream_id):
            return self._fail(stream_id, Code.INVALID_ARGUMENT, "StreamID cannot be re-used")
        self._use(stream_id)
        if body is None:
            return self._fail(stream_id, Code.RESOURCE_EXHAUSTED, _too_large(length, self._limit))
        try:
            request = Request.FromString(body)
        except DecodeError as error:
            return self._fail(stream_id, Code.INVALID_ARGUMENT, f"the request cannot be decoded: {error}")
        if len(request.metadata) > MAX_METADATA:
            return self._fail(
                stream_id, Code.RESOURCE_EXHAUSTED, f"more than {MAX_METADATA} values of metadata"
            )
        metadata: dict[str, list[str]] = {}
        for pair in request.metadata:
            metadata.setdefault(pair.key, []).append(pair.value)
        is_open = bool(flags & FLAG_REMOTE_OPEN)
        action = Action.RECEIVE_OPEN_REQUEST if is_open else Action.RECEIVE_REQUEST
        self._streams[stream_id] = SERVER[State.IDLE][action]
        return RequestReceived(
            stream_id,
            request.service,
            request.method,
            request.payload,
            request.timeout_nano,
            metadata,
            is_open,
        )

    def send_response(self, stream_id: int, payload: bytes) -> bytes:
        """End a call with success and its response message; returns the bytes to write."""
        data = Response(status=_OK, payload=payload).SerializeToString()
        self._check_size(data)
        self._send(stream_id, Action.SEND_RESPONSE)
        return encode_frame(stream_id, TYPE_RESPONSE, 0, data)

    def send_error(self, stream_id: int, code: Code, message: str) -> bytes:
        """End a call with a status that is not OK; returns the bytes to write.

        The message is cut so that it fits; what UTF-8 cannot carry becomes a question mark.
        """
        self._send(stream_id, Action.SEND_RESPONSE)
        return self._status_frame(stream_id, code, message)

    def reject(self, failed: StreamFailed) -> bytes:
        """The answer to a `StreamFailed`; returns the bytes to write."""
        return self._status_frame(failed.stream_id, failed.code, failed.message)

    def _status_frame(self, stream_id: int, code: Code, message: str) -> bytes:
        text = message[: min(MAX_STATUS_TEXT, self._limit // 8)].encode(errors="replace").decode()
        data = Response(status=Status(code=code, message=text)).SerializeToString()
        return encode_frame(stream_id, TYPE_RESPONSE, 0, data)

    def _use(self, stream_id: int) -> None:
        if stream_id < self._last_id:
            del self._skipped[stream_id]
            return
        first = max(self._last_id + 2, stream_id - 2 * MAX_REORDERED)
        for skipped in range(first, stream_id, 2):
            self._skipped[skipped] = None
        while len(self._skipped) > MAX_REORDERED:
            del self._skipped[next(iter(self._skipped))]
        self._last_id = stream_id

    def _was_used(self, stream_id: int) -> bool:
        return stream_id % 2 == 1 and stream_id <= self._last_id and stream_id not in self._skipped
