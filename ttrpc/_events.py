"""What `Connection.receive` returns: one object per thing that the peer said.

Plain slotted classes: one is made per message on the hot path, and the package starts in guests where
each generated class costs milliseconds.
"""

from __future__ import annotations

from ._status import Code

__all__ = [
    "DataReceived",
    "EndReceived",
    "Event",
    "RequestReceived",
    "ResponseReceived",
    "StreamFailed",
]


class Event:
    """Root of the events. `stream_id` says which call it belongs to."""

    __slots__ = ("stream_id",)
    stream_id: int

    def _values(self) -> tuple[object, ...]:
        return tuple(
            getattr(self, name) for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())
        )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Event) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        names = [name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class RequestReceived(Event):
    """Server: a call begins. `is_open`: data frames follow. `timeout_nano` <= 0 means no deadline."""

    __slots__ = ("is_open", "metadata", "method", "payload", "service", "timeout_nano")

    def __init__(
        self,
        stream_id: int,
        service: str,
        method: str,
        payload: bytes,
        timeout_nano: int,
        metadata: dict[str, list[str]],
        is_open: bool,
    ) -> None:
        self.stream_id = stream_id
        self.service = service
        self.method = method
        self.payload = payload
        self.timeout_nano = timeout_nano
        self.metadata = metadata
        self.is_open = is_open


class DataReceived(Event):
    """One message of a stream."""

    __slots__ = ("data",)

    def __init__(self, stream_id: int, data: bytes) -> None:
        self.stream_id = stream_id
        self.data = data


class EndReceived(Event):
    """The peer sends no more messages. For a client this is the end of the call, with success."""

    __slots__ = ()

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


class ResponseReceived(Event):
    """Client: the call ended with this status. `payload` is the response message if `code` is OK."""

    __slots__ = ("code", "message", "payload")

    def __init__(self, stream_id: int, code: Code, message: str, payload: bytes) -> None:
        self.stream_id = stream_id
        self.code = code
        self.message = message
        self.payload = payload


class StreamFailed(Event):
    """The peer broke a rule that concerns one stream only: the stream has ended, the connection lives.

    A server answers it with `ServerConnection.reject`; for a client the call has ended with `code`.
    """

    __slots__ = ("code", "message")

    def __init__(self, stream_id: int, code: Code, message: str) -> None:
        self.stream_id = stream_id
        self.code = code
        self.message = message
