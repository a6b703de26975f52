"""What server and client connections share of asyncio: a receive buffer, and back-pressure both ways.

Invariants: what the peer does not read is bounded (`drain` waits), what we do not consume is bounded
(reading stops while an inbox is full). Everything here runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from weakref import WeakKeyDictionary

from ._errors import ConnectionClosed

__all__ = ["Endpoint", "Inbox"]

CLOSED = "the connection is closed"

RECEIVE_SIZE = 64 << 10
WRITE_HIGH = 1 << 20
"""Bytes in the write buffer above which senders wait."""
INBOX_BYTES = 1 << 20
INBOX_MESSAGES = 256
"""A stream whose consumer lags by one of these stops the reading of its connection."""


_buffers: WeakKeyDictionary[asyncio.AbstractEventLoop, memoryview] = WeakKeyDictionary()


def _buffer_of(loop: asyncio.AbstractEventLoop) -> memoryview:
    """What all endpoints of a loop receive into: the bytes are taken out before the next one is asked."""
    buffer = _buffers.get(loop)
    if buffer is None:
        buffer = _buffers[loop] = memoryview(bytearray(RECEIVE_SIZE))
    return buffer


class Inbox:
    """Messages of one stream that its consumer has not taken yet."""

    __slots__ = ("_endpoint", "_error", "_finished", "_messages", "_size", "_waiter")

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._messages: deque[bytes] = deque()
        self._size = 0
        self._finished = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, message: bytes) -> None:
        """A message came. Dropped after `finish`."""
        if self._finished:
            return
        self._messages.append(message)
        self._size += len(message)
        if self._size > INBOX_BYTES or len(self._messages) > INBOX_MESSAGES:
            self._endpoint.hold(self)
        self._wake()

    def finish(self, error: BaseException | None = None) -> None:
        """No more messages: `get` returns None, or raises `error`, after what is there already."""
        if not self._finished:
            self._finished = True
            self._error = error
            self._wake()

    def discard(self) -> None:
        """Nobody will take what is here."""
        self.finish()
        self._messages.clear()
        self._size = 0
        self._endpoint.release(self)

    async def get(self) -> bytes | None:
        """The next message, or None at the end. One consumer at a time."""
        while not self._messages:
            if self._finished:
                if self._error is not None:
                    raise self._error
                return None
            if self._waiter is not None:
                raise RuntimeError("two tasks receive from one stream")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self._messages.popleft()
        self._size -= len(message)
        if self._size <= INBOX_BYTES // 2 and len(self._messages) <= INBOX_MESSAGES // 2:
            self._endpoint.release(self)
        return message

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Endpoint(asyncio.BufferedProtocol):
    """One connection: subclasses say what to do with bytes and with its end."""

    reads_while_unread = True
    """Whether to go on reading from a peer that does not read what we write."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._buffer = _buffer_of(self.loop)
        self._transport: asyncio.Transport | None = None
        self._write_paused = False
        self._drained: list[asyncio.Future[None]] = []
        self._held: set[Inbox] = set()
        self.lost: asyncio.Future[None] = self.loop.create_future()

    # What subclasses implement.

    def received(self, data: memoryview) -> None:
        """Bytes came; `data` is valid during the call only."""
        raise NotImplementedError

    def ended(self, reason: str) -> None:
        """The connection is gone; may be called twice."""
        raise NotImplementedError

    # What subclasses use.

    @property
    def is_open(self) -> bool:
        """Whether bytes can still be written."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_ready(self) -> bool:
        """Whether a sender need not wait."""
        return self._transport is not None and not self._write_paused and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Queue bytes; nothing happens on a closed connection."""
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the write buffer has room. Raises ConnectionClosed."""
        while self._write_paused and self.is_open:
            waiter = self.loop.create_future()
            self._drained.append(waiter)
            try:
                await waiter
            finally:
                self._drained.remove(waiter)
        if not self.is_open:
            raise ConnectionClosed(CLOSED)

    def hold(self, inbox: Inbox) -> None:
        """Stop reading: this inbox is full."""
        self._held.add(inbox)
        self._update_reading()

    def release(self, inbox: Inbox) -> None:
        """This inbox has room again."""
        if inbox in self._held:
            self._held.discard(inbox)
            self._update_reading()

    def close(self) -> None:
        """Close when all is written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _update_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            if self._held or (self._write_paused and not self.reads_while_unread):
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """See asyncio.BufferedProtocol."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        self.received(self._buffer[:nbytes])

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._write_paused = True
        self._update_reading()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._write_paused = False
        self._update_reading()
        self._wake_writers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._held.clear()
        self._wake_writers()
        self.ended(f"the connection is closed: {exc}" if exc else CLOSED)
        if not self.lost.done():
            self.lost.set_result(None)

    def _wake_writers(self) -> None:
        for waiter in self._drained:
            if not waiter.done():
                waiter.set_result(None)
