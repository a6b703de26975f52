"""Byte pumps between a container's pipes (or pty) and the host's stream connections.

What: `OutPump` carries a descriptor's bytes to a connection, `InPump` a connection's bytes to a
descriptor. On the connection both directions are frames: a big-endian u32 length, then as many bytes
(1 to `FRAME_MAX`); length 0 ends the stream.
Why frames: vhost-device-vsock has no half-close and loses what it still holds some time after a
close, so the end must be said in the data, and the side that reads it closes first.
Invariants: back-pressure both ways (a pump with bytes in hand does not read more); every byte that
the process wrote before it died is sent, followed by the end; a grandchild that keeps the pipe open
delays the end by at most `GRACE` seconds; after the end an `OutPump` waits for the host's close.
A connection that breaks is no end: its shim has died, and another one may come. The pump stands still, with
what it could not send, until `reattach`; the process then waits as it does for a reader that is slow. Only
after the host was told the exit (`OutPump.let_go`) is a break what it looks like: nobody wants the rest.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import termios
from collections.abc import Callable

__all__ = ["CHUNK", "END", "FRAME_MAX", "GRACE", "LINGER", "InPump", "OutPump", "pending_bytes"]

FRAME_MAX = 65536
CHUNK = 28668  # with its header one vsock packet (agent/vsock.py)
BURST = 4  # chunks per wake-up, so that one busy stream does not starve the others
GRACE = 0.1  # seconds that output is still taken from survivors after the process itself died
LINGER = 10.0  # seconds that the host may still read after the container is removed
END = b"\0\0\0\0"
_HEADER = 4


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
        self._buffer = memoryview(bytearray(_HEADER + CHUNK))
        self._payload = self._buffer[_HEADER:]
        self._frame = b""  # what is to be sent before more is read
        self._sent = 0  # bytes of it
        self._owed = -1  # bytes left to forward once the process is dead; -1: it lives
        self._sink_open = True
        self._broken = False  # the connection; the next one gets the frame
        self._wanted = True
        self._timer: asyncio.TimerHandle | None = None
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

    def _is_over(self) -> bool:
        if self._owed < 0 or self._timer is not None or self._frame:
            return False
        return self._owed == 0 or pending_bytes(self._source) == 0

    def _readable(self) -> None:
        for _ in range(BURST):
            try:
                count = os.readv(self._source, (self._payload,))
            except BlockingIOError:
                return
            except OSError:
                count = 0  # EIO: the last holder of a pty's other end is gone
            if not count:
                self._end_source()
                return
            if self._owed > 0:
                self._owed = max(0, self._owed - count)
            self._buffer[:_HEADER] = count.to_bytes(_HEADER, "big")
            if not self._send(self._buffer[: _HEADER + count]):
                self._loop.remove_reader(self._source)
                return
            if self._owed >= 0 and self._is_over():
                self._end_source()
                return

    def _send(self, frame: memoryview | bytes) -> bool:
        """Send a frame; False if a rest of it is held until the socket takes it."""
        if not self._sink_open:
            return True
        try:
            sent = self._sink.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return self._break(bytes(frame))
        if sent == len(frame):
            return True
        self._frame, self._sent = bytes(frame), sent
        self._loop.add_writer(self._sink.fileno(), self._writable)
        return False

    def _break(self, frame: bytes) -> bool:
        """The host dropped this stream: hold the frame for the next one, or, if nobody wants it, discard it,
        since the container must not block for that; whether it is discarded."""
        if self._wanted:
            self._frame, self._sent, self._broken = frame, 0, True
            return False
        self._sink_open = False
        return True

    def _writable(self) -> None:
        try:
            self._sent += self._sink.send(memoryview(self._frame)[self._sent :])
        except BlockingIOError:
            return
        except OSError:
            rest = self._rest()
            if not self._break(len(rest).to_bytes(_HEADER, "big") + rest):
                self._loop.remove_writer(self._sink.fileno())
                return
            self._sent = len(self._frame)
        if self._sent < len(self._frame):
            return
        self._loop.remove_writer(self._sink.fileno())
        self._sent_all()

    def _sent_all(self) -> None:
        ended = self._frame == END and self._source < 0
        self._frame, self._sent = b"", 0
        if ended:
            self._await_close()
        elif self._source < 0 or self._is_over():
            self._end_source()
        else:
            self._loop.add_reader(self._source, self._readable)

    def _rest(self) -> bytes:
        """What is not sent of the payload that is held."""
        return self._frame[max(_HEADER, self._sent) :]

    def reattach(self, sink: socket.socket) -> None:
        """Go on with this connection (owned): the one before has ended, or is about to. What was on its way
        there is lost; what is held comes first here. An end that was said is said again by closing."""
        if self._sink.fileno() < 0:
            sink.close()
            return
        rest = self._rest()
        self._drop_sink()
        self._sink, self._sink_open, self._broken = sink, True, False
        self._frame, self._sent = b"", 0
        if rest and not self._send(len(rest).to_bytes(_HEADER, "big") + rest):
            self._stop_reading()
            return
        self._sent_all()

    def let_go(self) -> None:
        """The exit of the process has been told: whoever drops this stream now wants no more of it."""
        self._wanted = False
        if self._broken:
            self.abort()

    def _stop_reading(self) -> None:
        if self._source >= 0:
            self._loop.remove_reader(self._source)

    def _drop_sink(self) -> None:
        self._loop.remove_reader(self._sink.fileno())
        self._loop.remove_writer(self._sink.fileno())
        self._sink.close()

    def _end_source(self) -> None:
        """All is read: say so to the host."""
        self._close_source()
        if self._send(END):
            self._await_close()

    def _close_source(self) -> None:
        if self._source >= 0:
            self._loop.remove_reader(self._source)
            os.close(self._source)
            self._source = -1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _await_close(self) -> None:
        """The end is on its way; whoever reads it closes first, so nothing can be lost."""
        if self._sink_open:
            self._loop.add_reader(self._sink.fileno(), self._host_spoke)
        else:
            self._finish()

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
        if self._sink.fileno() >= 0:
            self._drop_sink()
            self._on_end()

    def abort(self) -> None:
        """End at once, whatever is still unsent. Idempotent."""
        self._sink_open = False
        self._close_source()
        self._finish()


class InPump:
    """From a non-blocking connected socket (owned) to a non-blocking descriptor (owned)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: socket.socket, sink: int) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._header = b""  # of the next frame, as far as it has come
        self._left = 0  # bytes of this frame still to come
        self._ended = False
        self._broken = False  # the connection, without an end: another one may come
        self._held: list[memoryview] = []
        loop.add_reader(source.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(BURST):
            try:
                data = self._source.recv(FRAME_MAX)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._unpack(memoryview(data))
            else:
                self._broken = True
                self._loop.remove_reader(self._source.fileno())
            if not self._write():
                self._loop.remove_reader(self._source.fileno())
                self._loop.add_writer(self._sink, self._writable)
                return
            if self._ended:
                self.abort()
                return
            if self._broken:
                return

    def reattach(self, source: socket.socket) -> None:
        """Go on with this connection (owned): see `OutPump.reattach`. A stdin that has ended stays so."""
        if self._sink < 0 or self._ended:
            source.close()
            return
        self._loop.remove_reader(self._source.fileno())
        self._source.close()
        self._source, self._broken = source, False
        self._header, self._left = b"", 0
        if not self._held:  # else what is held is written first
            self._loop.add_reader(source.fileno(), self._readable)

    def _unpack(self, data: memoryview) -> None:
        """Take the payloads of whole and partial frames out of `data`."""
        while data and not self._ended:
            if self._left:
                part = data[: self._left]
                self._left -= len(part)
                self._held.append(part)
                data = data[len(part) :]
                continue
            missing = _HEADER - len(self._header)
            self._header += data[:missing]
            data = data[missing:]
            if len(self._header) == _HEADER:
                self._left = int.from_bytes(self._header, "big")
                self._header = b""
                self._ended = self._left == 0 or self._left > FRAME_MAX

    def _write(self) -> bool:
        """Write what is held; False if the descriptor is full."""
        while self._held:
            try:
                sent = os.write(self._sink, self._held[0])
            except BlockingIOError:
                return False
            except OSError:
                # Nobody reads this stdin any more: let the host know by closing.
                self._held.clear()
                self._ended = True
                return True
            if sent == len(self._held[0]):
                del self._held[0]
            else:
                self._held[0] = self._held[0][sent:]
        return True

    def _writable(self) -> None:
        if not self._write():
            return
        self._loop.remove_writer(self._sink)
        if self._ended:
            self.abort()
        elif not self._broken:
            self._loop.add_reader(self._source.fileno(), self._readable)

    def abort(self) -> None:
        """End at once: close the container's stdin and the host's connection. Idempotent."""
        if self._sink < 0:
            return
        self._loop.remove_reader(self._source.fileno())
        self._loop.remove_writer(self._sink)
        os.close(self._sink)
        self._sink = -1
        self._source.close()
