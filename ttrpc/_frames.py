"""Frames: ten bytes of header and up to 4 MiB of data, cut out of a byte stream and put together.

What: `encode_frame`, and `FrameReader`, which is fed bytes in any portions and returns whole frames.
Why apart from the connection: framing knows lengths only, and nothing of streams or envelopes.
Invariants: how the bytes are portioned never changes the frames that come out; no input raises; the
reader holds at most one frame's header and data. The data of a frame above the limit is discarded as it
comes, never held, and the frame is reported once, as soon as its header is read.

    | data length: u32 | stream id: u32 | type: u8 | flags: u8 | data ... |       all big-endian
"""

from __future__ import annotations

from struct import Struct

__all__ = [
    "FLAG_NO_DATA",
    "FLAG_REMOTE_CLOSED",
    "FLAG_REMOTE_OPEN",
    "HEADER_SIZE",
    "MAX_MESSAGE",
    "TYPE_DATA",
    "TYPE_REQUEST",
    "TYPE_RESPONSE",
    "Frame",
    "FrameReader",
    "encode_frame",
]

MAX_MESSAGE = 4 << 20
"""Bytes of data in one frame: every implementation of ttrpc has this limit."""

HEADER_SIZE = 10

TYPE_REQUEST = 1
TYPE_RESPONSE = 2
TYPE_DATA = 3

FLAG_REMOTE_CLOSED = 1
"""The sender of this frame sends no more data on its stream."""
FLAG_REMOTE_OPEN = 2
"""On a request: data frames follow."""
FLAG_NO_DATA = 4
"""This frame carries no message. Without it, no data means an empty message."""

_header = Struct(">IIBB")
_unpack = _header.unpack_from

Frame = tuple[int, int, int, bytes | None, int]
"""(stream id, type, flags, data, length): data is None when length was above the limit."""


def encode_frame(stream_id: int, kind: int, flags: int, data: bytes) -> bytes:
    """One frame as bytes. The limit is the caller's business (`Connection` checks it)."""
    return _header.pack(len(data), stream_id, kind, flags) + data


class FrameReader:
    """Cuts a byte stream into frames."""

    __slots__ = ("_limit", "_need", "_pending", "_skip")

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._pending = bytearray()  # the beginning of a frame, never a whole one
        self._need = HEADER_SIZE  # bytes that `_pending` needs before a look at it is worth while
        self._skip = 0  # bytes of an oversize frame still to be thrown away

    @property
    def in_frame(self) -> bool:
        """Whether the stream would end in the middle of a frame if it ended now."""
        return bool(self._pending) or self._skip > 0

    @property
    def held(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._pending)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Take the next bytes of the stream; return the frames that they complete.

        `data` is copied where it is kept: the caller may reuse its buffer.
        """
        if self._pending:
            self._pending += data
            if len(self._pending) < self._need:
                return []
            data, self._pending = self._pending, bytearray()
        view = memoryview(data)
        end = len(view)
        start = 0
        if self._skip:
            start = min(self._skip, end)
            self._skip -= start
        frames: list[Frame] = []
        self._need = HEADER_SIZE
        while end - start >= HEADER_SIZE:
            length, stream_id, kind, flags = _unpack(view, start)
            body = start + HEADER_SIZE
            if length > self._limit:
                frames.append((stream_id, kind, flags, None, length))
                start = min(body + length, end)
                self._skip = body + length - start
                continue
            if body + length > end:
                self._need = HEADER_SIZE + length
                break
            start = body + length
            frames.append((stream_id, kind, flags, bytes(view[body:start]), length))
        if start < end:
            self._pending += view[start:]
        return frames
