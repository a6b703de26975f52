"""Frames of a stream of the guest's, taken apart without copying.

What: a frame is a big-endian u32 length and as many bytes. `FrameReader` reads frames of 1 to `FRAME_MAX`
bytes until one that says an end: standard streams (`shim.stdio.pump`) end by any other length; who gives
other lengths a meaning says so by `begins` (`shim.resources.network.relay`).
Why frames: vhost-device-vsock has no half-close, and what a guest sends before it closes may be lost, so an
end must be said in the data.
Invariants: nothing is held but an unfinished header; nothing is read after the end.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["END", "FRAME_MAX", "HEADER", "FrameReader"]

#: Bytes of payload in a frame: the size of a pipe.
FRAME_MAX = 64 << 10
#: Bytes of a length.
HEADER = 4
END = bytes(HEADER)


class FrameReader:
    """`ended`: after the end frame, or after one that cannot be."""

    def __init__(self) -> None:
        self.ended = False
        self._header = b""
        self._left = 0

    def begins(self, size: int) -> bool:
        """A frame of `size` bytes comes next: whether it and more are read."""
        return 0 < size <= FRAME_MAX

    def payloads(self, data: memoryview) -> Iterator[memoryview]:
        """The payload bytes in `data`, which begins and ends anywhere in a frame; an empty one for an empty
        frame that is read."""
        while data and not self.ended:
            if self._left:
                part = data[: self._left]
                self._left -= len(part)
                data = data[len(part) :]
                yield part
                continue
            missing = HEADER - len(self._header)
            self._header += data[:missing]
            data = data[missing:]
            if len(self._header) < HEADER:
                return
            size = int.from_bytes(self._header, "big")
            self._header = b""
            self.ended = not self.begins(size)
            if not self.ended:
                self._left = size
                if not size:
                    yield data[:0]
