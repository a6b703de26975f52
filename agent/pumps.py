"""Byte pumps between a container's pipes (or pty) and the host's stream connections.

What: `OutPump` carries a descriptor's bytes to a socket, `InPump` a socket's bytes to a descriptor.
Why not asyncio streams: those read on without being asked and buffer; these hold at most one chunk.
Invariants: back-pressure both ways (a pump with bytes in hand does not read more); every byte that
the process wrote before it died is sent before the connection is closed; a grandchild that keeps
the pipe open delays the end by at most `GRACE` seconds; a pump ends exactly once.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import termios
from collections.abc import Callable

__all__ = ["CHUNK", "GRACE", "InPump", "OutPump", "pending_bytes"]

CHUNK = 65536  # one full pipe; also what one vsock packet carries at most
BURST = 4  # chunks per wake-up, so that one busy stream does not starve the others
GRACE = 0.1  # seconds that output is still taken from survivors after the process itself died
LINGER = 10.0  # seconds that the host may take to read the last bytes and close its side


def pending_bytes(fd: int) -> int:
    """How many bytes a pipe, pty or socket holds right now."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return 0
    return count[0]


class OutPump:
    """From a non-blocking descriptor (owned) to a non-blocking connected socket (owned)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: int,
        sink: socket.socket,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._on_end = on_end
        self._held = memoryview(b"")
        self._owed = -1  # bytes left to forward once the process is dead; -1: it lives
        self._sink_open = True
        self._timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        loop.add_reader(source, self._readable)

    def process_died(self) -> None:
        """The process is gone: forward what it left, then end.

        What the pipe holds now is everything that the dead process wrote and that is still to be
        read; survivors' output is taken for `GRACE` seconds more.
        """
        if self._source < 0 or self._owed >= 0:
            return
        self._owed = pending_bytes(self._source)
        self._timer = self._loop.call_later(GRACE, self._grace_over)

    def _grace_over(self) -> None:
        self._timer = None
        if self._source >= 0 and self._is_over():
            self._end_source()

    def _readable(self) -> None:
        for _ in range(BURST):
            try:
                data = os.read(self._source, CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""  # EIO: the last holder of a pty's other end is gone
            if not data:
                self._end_source()
                return
            if self._owed > 0:
                self._owed = max(0, self._owed - len(data))
            self._held = memoryview(data)
            if not self._send():
                return
            if self._is_over():
                self._end_source()
                return

    def _is_over(self) -> bool:
        if self._owed < 0 or self._timer is not None or self._held:
            return False
        return self._owed == 0 or pending_bytes(self._source) == 0

    def _send(self) -> bool:
        """Push what is held; False if the socket is full and the reader is now paused."""
        try:
            sent = self._sink.send(self._held) if self._sink_open else len(self._held)
        except BlockingIOError:
            sent = 0
        except OSError:
            # The host dropped this stream. The container must not block for that: discard.
            self._sink_open = False
            sent = len(self._held)
        self._held = self._held[sent:]
        if not self._held:
            return True
        self._loop.remove_reader(self._source)
        self._loop.add_writer(self._sink, self._writable)
        return False

    def _writable(self) -> None:
        self._loop.remove_writer(self._sink)
        if not self._send():
            return
        if self._is_over():
            self._end_source()
        else:
            self._loop.add_reader(self._source, self._readable)

    def _end_source(self) -> None:
        if self._source < 0:
            return
        self._loop.remove_reader(self._source)
        os.close(self._source)
        self._source = -1
        if self._timer is not None:
            self._timer.cancel()
        self._close_sink()

    def _close_sink(self) -> None:
        """Say EOF, wait until the host has closed its side (bounded), then close."""
        if self._sink_open:
            try:
                self._sink.shutdown(socket.SHUT_WR)
            except OSError:
                self._sink_open = False
        if not self._sink_open:
            self._finish()
            return
        self._loop.add_reader(self._sink, self._host_spoke)
        self._linger = self._loop.call_later(LINGER, self._finish)

    def _host_spoke(self) -> None:
        try:
            if self._sink.recv(CHUNK):
                return  # nothing is expected on an output stream; ignore it
        except BlockingIOError:
            return
        except OSError:
            pass
        self._finish()

    def _finish(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._sink.fileno() >= 0:
            self._loop.remove_reader(self._sink)
            self._loop.remove_writer(self._sink)
            self._sink.close()
            self._on_end()

    def abort(self) -> None:
        """End at once, whatever is still unsent."""
        self._sink_open = False
        self._end_source()
        self._finish()


class InPump:
    """From a non-blocking connected socket (owned) to a non-blocking descriptor (owned)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: socket.socket, sink: int) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._held = memoryview(b"")
        loop.add_reader(source, self._readable)

    def _readable(self) -> None:
        for _ in range(BURST):
            try:
                data = self._source.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.abort()  # everything received was written: this is the EOF in its place
                return
            self._held = memoryview(data)
            if not self._write():
                return

    def _write(self) -> bool:
        try:
            sent = os.write(self._sink, self._held)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.abort()  # nobody reads this stdin any more: let the host know by closing
            return False
        self._held = self._held[sent:]
        if not self._held:
            return True
        self._loop.remove_reader(self._source)
        self._loop.add_writer(self._sink, self._writable)
        return False

    def _writable(self) -> None:
        self._loop.remove_writer(self._sink)
        if self._write():
            self._loop.add_reader(self._source, self._readable)

    def abort(self) -> None:
        """End at once: close the container's stdin and the host's connection."""
        if self._sink < 0:
            return
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._sink)
        os.close(self._sink)
        self._sink = -1
        self._source.close()
