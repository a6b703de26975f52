"""FIFOs that Firecracker writes lines to: its log, its metrics.

What: `Fifo` reads one from the event loop, keeps the tail, and passes each piece on; `LineFifo` passes whole
lines.
Why: Firecracker's own log tells why it refused or died; its standard output is the guest's serial port.
Invariants: reading never blocks; a line longer than `LINE_LIMIT` is dropped, not kept in pieces, and of one
read the last `LINES` lines count; the FIFO is opened for writing too, so that it never shows an end before
`close`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from devices.tail import TailBuffer

__all__ = ["LINES", "LINE_LIMIT", "Fifo", "LineFifo"]

LINE_LIMIT = 256 << 10  # bytes; one record of all metrics is some 20 KiB
LINES = 16
_READ_SIZE = 64 << 10


class Fifo:
    """See the module's docstring. `path`: an existing FIFO."""

    def __init__(self, path: str, on_data: Callable[[bytes], None]) -> None:
        self.tail = TailBuffer()
        self._on_data = on_data
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def drain(self) -> None:
        """Take what is there, without waiting: for who was woken by the writer's death."""
        for _ in range(4):  # a pipe holds 64 KiB by default
            if self._fd < 0 or not self._read():
                return

    def close(self) -> None:
        """Stop reading. Idempotent."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return False
        self.tail.write(data)
        if data:
            self._on_data(data)
        return bool(data)


class LineFifo(Fifo):
    """One whose lines are passed on."""

    def __init__(self, path: str, on_line: Callable[[bytes], None]) -> None:
        super().__init__(path, self._cut)
        self._on_line = on_line
        self._partial = bytearray()
        self._skip = False

    def _cut(self, data: bytes) -> None:
        *lines, rest = (bytes(self._partial) + data).split(b"\n")
        if lines and self._skip:
            del lines[0]
            self._skip = False
        for line in lines[-LINES:]:
            if line:
                self._on_line(line)
        self._partial = bytearray(rest)
        if len(rest) > LINE_LIMIT:
            self._partial.clear()
            self._skip = True
