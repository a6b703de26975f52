"""Copy loops between a process's streams in the guest and their ends on the host.

What: four coroutines, guest to host and host to guest, over a connection or by the agent's calls.
A connection carries frames (`devices.frames`); length 0 ends the stream, and the guest waits for the host to
close.
Why not os.splice: it saves one copy of two, but each message then takes a whole slot of the pipe,
so a FIFO that nobody reads would be full after 16 short lines instead of 64 KiB, and a detached
container would stop there. A copy of 64 KiB takes some 10 us; the way through vsock takes longer.
Invariants:
- At most one frame's bytes are held per stream; a slow reader stops its own stream only.
- A copy ends at the end of its source. A sink that breaks (its logger died, its disk is full) does
  not block the process: the rest of its output is read and dropped.
- A stream that is always ready yields to the others after each chunk, and after `FRAMES` frames of one: a
  guest may send 13,000 of one byte in a chunk. What a turn takes is written in one piece.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Protocol

from devices.errors import KataError
from devices.frames import END, FRAME_MAX, HEADER, FrameReader
from devices.threads import submit
from shim.stdio.ends import InputEnd, OutputEnd

__all__ = [
    "FRAMES",
    "Progress",
    "calls_to_output",
    "input_to_calls",
    "input_to_socket",
    "readable",
    "socket_to_output",
    "write_all",
]

#: Frames of one stream that one turn of the loop takes apart: half a millisecond.
FRAMES = 256
#: Bytes asked for or sent by one call of the agent, as Kata's own shim does.
CALL_CHUNK = 32 << 10


class Progress(Protocol):
    """Told about each move, so that a drain can see whether output still flows."""

    def __call__(self) -> None: ...


async def _until(add: Callable[..., None], remove: Callable[[int], bool], fd: int) -> None:
    ready = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, wake)
    try:
        await ready
    finally:
        remove(fd)


async def readable(fd: int) -> None:
    """Until there is something to read, or its end."""
    loop = asyncio.get_running_loop()
    await _until(loop.add_reader, loop.remove_reader, fd)


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    await _until(loop.add_writer, loop.remove_writer, fd)


async def write_all(fd: int, data: memoryview) -> None:
    """Write all of it to a non-blocking pipe. Raises OSError."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            await _writable(fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


async def _in_thread(fd: int, data: memoryview) -> None:
    """Write to a file. A cancelled caller still waits: `fd` and `data` are in use until then."""
    job = submit(None, functools.partial(_write_all, fd, data))
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise


class _Sink:
    """An output end that may be missing or break; either way bytes are taken."""

    def __init__(self, out: OutputEnd | None, progress: Progress) -> None:
        self._out = out
        self._progress = progress

    async def put(self, data: memoryview) -> None:
        if self._out is not None:
            try:
                await self._write(self._out, data)
            except OSError:
                self._out.end()
                self._out = None
        self._progress()

    async def _write(self, out: OutputEnd, data: memoryview) -> None:
        if not out.pollable:
            await _in_thread(out.fd, data)
            return
        while data:
            try:
                written = os.write(out.fd, data)
            except BlockingIOError:
                await _writable(out.fd)
            else:
                data = data[written:]
                self._progress()

    def end(self) -> None:
        if self._out is not None:
            self._out.end()


async def socket_to_output(sock: socket.socket, out: OutputEnd | None, progress: Progress) -> None:
    """Copy until the guest ends the stream (or is gone), then end `out` and close the connection."""
    sink = _Sink(out, progress)
    frames = FrameReader()
    buffer = memoryview(bytearray(FRAME_MAX))
    while not frames.ended:
        try:
            count = sock.recv_into(buffer)
        except BlockingIOError:
            await readable(sock.fileno())
            continue
        except OSError:  # reset: the guest, or the VM, is gone; what came before is delivered
            break
        if count == 0:
            break
        payloads = frames.payloads(buffer[:count])
        while some := list(islice(payloads, FRAMES)):
            await sink.put(some[0] if len(some) == 1 else memoryview(b"".join(some)))
            await asyncio.sleep(0)
    sink.end()
    sock.close()


async def calls_to_output(
    read: Callable[[int], Awaitable[bytes]], out: OutputEnd | None, progress: Progress
) -> None:
    """Copy until `read` answers with nothing or fails, then end `out`."""
    sink = _Sink(out, progress)
    while True:
        try:
            data = await read(CALL_CHUNK)
        except KataError:
            break
        if not data:
            break
        await sink.put(memoryview(data))
    sink.end()


async def _read(source: InputEnd, buffer: memoryview) -> int:
    if early := source.early:
        source.early = b""
        buffer[: len(early)] = early
        return len(early)
    while True:
        try:
            return os.readv(source.fd, [buffer])
        except BlockingIOError:
            await readable(source.fd)


async def _send_all(sock: socket.socket, data: memoryview) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await _writable(sock.fileno())


async def input_to_socket(source: InputEnd, sock: socket.socket, *, say_end: bool) -> None:
    """Copy until the end of `source`, then say so if `say_end`; or until the guest closes the stream."""
    frame = memoryview(bytearray(HEADER + FRAME_MAX))
    try:
        while count := await _read(source, frame[HEADER:]):
            frame[:HEADER] = count.to_bytes(HEADER, "big")
            await _send_all(sock, frame[: HEADER + count])
            await asyncio.sleep(0)
        if say_end:
            await _send_all(sock, memoryview(END))
    except OSError:  # the process has closed its stdin, or the guest is gone
        return


async def input_to_calls(source: InputEnd, write: Callable[[bytes], Awaitable[int]]) -> None:
    """Copy until the end of `source`, or until the guest no longer takes it."""
    buffer = memoryview(bytearray(CALL_CHUNK))
    while count := await _read(source, buffer):
        data = bytes(buffer[:count])
        while data:
            try:
                taken = await write(data)
            except KataError:
                return
            if taken <= 0:
                return
            data = data[taken:]
