"""Copy loops between a process's streams in the guest and their ends on the host.

What: four coroutines, guest to host and host to guest, over a connection or by the agent's calls.
Why not os.splice: it saves one copy of two, but each message then takes a whole slot of the pipe,
so a FIFO that nobody reads would be full after 16 short lines instead of 64 KiB, and a detached
container would stop there. A copy of 64 KiB takes some 10 us; the way through vsock takes longer.
Invariants:
- At most `CHUNK` bytes are held per stream; a slow reader stops its own stream only.
- A copy ends at the end of its source. A sink that breaks (its logger died, its disk is full) does
  not block the process: the rest of its output is read and dropped.
- A stream that is always ready yields to the others after each chunk.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

from devices.errors import KataError
from shim.stdio_ends import InputEnd, OutputEnd

__all__ = ["CHUNK", "Progress", "calls_to_output", "input_to_calls", "input_to_socket", "socket_to_output"]

#: Bytes moved at once, and the most that is held of a stream: the size of a pipe.
CHUNK = 64 << 10
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


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    await _until(loop.add_reader, loop.remove_reader, fd)


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    await _until(loop.add_writer, loop.remove_writer, fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


async def _in_thread(fd: int, data: memoryview) -> None:
    """Write to a file. A cancelled caller still waits: `fd` and `data` are in use until then."""
    job = asyncio.get_running_loop().run_in_executor(None, _write_all, fd, data)
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
    """Copy until the guest ends the connection (in whatever way), then end `out`."""
    sink = _Sink(out, progress)
    buffer = memoryview(bytearray(CHUNK))
    while True:
        try:
            count = sock.recv_into(buffer)
        except BlockingIOError:
            await _readable(sock.fileno())
            continue
        except OSError:  # reset: the guest, or the VM, is gone; what came before is delivered
            break
        if count == 0:
            break
        await sink.put(buffer[:count])
        await asyncio.sleep(0)
    sink.end()


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


async def _read(source: InputEnd, size: int) -> bytes:
    while True:
        try:
            return os.read(source.fd, size)
        except BlockingIOError:
            await _readable(source.fd)


async def input_to_socket(source: InputEnd, sock: socket.socket) -> None:
    """Copy until the end of `source`, or until the guest no longer takes it."""
    while data := memoryview(await _read(source, CHUNK)):
        while data:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                await _writable(sock.fileno())
            except OSError:
                return
        await asyncio.sleep(0)


async def input_to_calls(source: InputEnd, write: Callable[[bytes], Awaitable[int]]) -> None:
    """Copy until the end of `source`, or until the guest no longer takes it."""
    while data := await _read(source, CALL_CHUNK):
        while data:
            try:
                taken = await write(data)
            except KataError:
                return
            if taken <= 0:
                return
            data = data[taken:]
