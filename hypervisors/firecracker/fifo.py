"""A FIFO that Firecracker writes lines to: its log, its metrics.

What: `LineFifo` reads a FIFO from the event loop, keeps the tail, and passes each whole line on.
Why: Firecracker's own log tells why it refused or died; its standard output is the guest's serial port.
Invariants: reading never blocks; a line longer than `LINE_LIMIT` is dropped, not kept in pieces; the FIFO is
opened for writing too, so that it never shows an end before `close`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from devices.tail import TailBuffer

__all__ = ["LINE_LIMIT", "LineFifo"]

LINE_LIMIT = 256 << 10  # bytes; one record of all metrics is some 20 KiB
_READ_SIZE = 64 << 10


class LineFifo:
    """See the module's docstring. `path`: an existing FIFO."""

    def __init__(self, path: str, on_line: Callable[[bytes], None]) -> None:
        self.tail = TailBuffer()
        self._on_line = on_line
        self._partial = bytearray()
        self._skip = False
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def drain(self) -> None:
        """Take what is there, without waiting: for who was woken by the writer's death."""
        for _ in range(64):  # a pipe holds 64 KiB by default
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
        *lines, rest = (bytes(self._partial) + data).split(b"\n")
        for line in lines:
            if self._skip:
                self._skip = False
            elif line:
                self._on_line(line)
        self._partial = bytearray(rest)
        if len(rest) > LINE_LIMIT:
            self._partial.clear()
            self._skip = True
        return bool(data)
