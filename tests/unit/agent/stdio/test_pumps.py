"""Pumps lose no byte, hold at most one chunk, say the end, and end though a grandchild lives on."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from agent.stdio.pumps import CHUNK, END, FRAME_MAX, GRACE, InPump, OutPump


class Ends:
    """Both ends of a pipe and of a connection; `ours` is what the pump gets."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        self.ours, self.host = socket.socketpair()
        self.ours.setblocking(False)
        self.host.setblocking(False)

    def close(self) -> None:
        for fd in (self.read_fd, self.write_fd):
            try:
                os.close(fd)
            except OSError:
                pass  # the pump owned it
        self.ours.close()
        self.host.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


async def frames(host: socket.socket) -> bytes:
    """Everything up to the end frame."""
    loop = asyncio.get_running_loop()

    async def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await loop.sock_recv(host, count - len(data))
            assert part, "the connection ended without an end frame"
            data += part
        return data

    result = b""
    while length := int.from_bytes(await exactly(4), "big"):
        assert length <= FRAME_MAX
        result += await exactly(length)
    return result


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


async def _feed(fd: int, data: bytes) -> None:
    await asyncio.get_running_loop().run_in_executor(None, _write_all, fd, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.close(fd)


async def _drain(fd: int) -> bytes:
    def read() -> bytes:
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read()

    return await asyncio.get_running_loop().run_in_executor(None, read)


async def test_output_arrives_whole_and_ends(ends: Ends) -> None:
    data = os.urandom(5 * CHUNK + 123)
    os.set_blocking(ends.read_fd, False)
    ended = asyncio.Event()
    OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours, ended.set)

    feeding = asyncio.ensure_future(_feed(ends.write_fd, data))
    got = await asyncio.wait_for(frames(ends.host), 20)
    await feeding
    assert not ended.is_set()  # the side that reads the end closes first
    ends.host.close()
    await asyncio.wait_for(ended.wait(), 5)

    assert got == data


async def test_a_slow_host_stops_the_process(ends: Ends) -> None:
    os.set_blocking(ends.read_fd, False)
    os.set_blocking(ends.write_fd, False)
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours)
    written = 0
    for _ in range(200):
        try:
            written += os.write(ends.write_fd, b"x" * 65536)
        except BlockingIOError:
            pass
        await asyncio.sleep(0)

    assert written < 4 << 20  # socket and pipe buffers and one chunk, however long it goes on
    os.close(ends.write_fd)
    assert len(await asyncio.wait_for(frames(ends.host), 20)) == written
    pump.abort()


async def test_a_grandchild_delays_the_end_only_a_little(ends: Ends) -> None:
    loop = asyncio.get_running_loop()
    os.set_blocking(ends.read_fd, False)
    pump = OutPump(loop, ends.read_fd, ends.ours)
    os.write(ends.write_fd, b"last words")
    pump.process_died()  # write_fd stays open: somebody else holds it

    before = loop.time()
    got = await asyncio.wait_for(frames(ends.host), 5)

    assert got == b"last words"
    assert loop.time() - before >= GRACE * 0.9
    pump.abort()


async def test_a_chattering_grandchild_cannot_hold_the_stream(ends: Ends) -> None:
    os.set_blocking(ends.read_fd, False)
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours)
    pump.process_died()

    async def chatter() -> None:
        while True:
            try:
                os.write(ends.write_fd, b"y" * 100)
            except OSError:
                return
            await asyncio.sleep(0.001)

    task = asyncio.ensure_future(chatter())
    await asyncio.wait_for(frames(ends.host), 5)
    pump.abort()
    task.cancel()


async def test_output_of_the_dead_is_complete_for_a_slow_host(ends: Ends) -> None:
    os.set_blocking(ends.read_fd, False)
    os.set_blocking(ends.write_fd, False)
    ends.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours)
    written = 0
    for _ in range(50):
        try:
            written += os.write(ends.write_fd, b"z" * 65536)
        except BlockingIOError:
            pass
        await asyncio.sleep(0)
    pump.process_died()
    await asyncio.sleep(GRACE * 2)  # the survivors' time passes while the host does not read

    assert len(await asyncio.wait_for(frames(ends.host), 20)) == written
    pump.abort()


async def test_a_host_that_left_does_not_block_the_process(ends: Ends) -> None:
    os.set_blocking(ends.read_fd, False)
    ended = asyncio.Event()
    OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours, ended.set)
    ends.host.close()

    await asyncio.wait_for(_feed(ends.write_fd, b"x" * (1 << 20)), 10)
    await asyncio.wait_for(ended.wait(), 5)


async def test_input_arrives_whole_and_ends(ends: Ends) -> None:
    loop = asyncio.get_running_loop()
    data = os.urandom(300_001)
    os.set_blocking(ends.write_fd, False)
    InPump(loop, ends.ours, ends.write_fd)
    reading = asyncio.ensure_future(_drain(ends.read_fd))
    for at in range(0, len(data), 50_000):
        await loop.sock_sendall(ends.host, frame(data[at : at + 50_000]))
    await loop.sock_sendall(ends.host, END)

    assert await asyncio.wait_for(reading, 20) == data


async def test_frames_cut_anywhere(ends: Ends) -> None:
    loop = asyncio.get_running_loop()
    os.set_blocking(ends.write_fd, False)
    InPump(loop, ends.ours, ends.write_fd)
    reading = asyncio.ensure_future(_drain(ends.read_fd))
    for byte in frame(b"abc") + frame(b"d") + END:
        await loop.sock_sendall(ends.host, bytes([byte]))
        await asyncio.sleep(0)

    assert await asyncio.wait_for(reading, 5) == b"abcd"


async def test_a_host_that_leaves_ends_the_input(ends: Ends) -> None:
    os.set_blocking(ends.write_fd, False)
    InPump(asyncio.get_running_loop(), ends.ours, ends.write_fd)
    ends.host.send(frame(b"abc"))
    ends.host.close()

    assert await asyncio.wait_for(_drain(ends.read_fd), 5) == b"abc"


async def test_a_frame_that_is_too_long_ends_the_input(ends: Ends) -> None:
    os.set_blocking(ends.write_fd, False)
    InPump(asyncio.get_running_loop(), ends.ours, ends.write_fd)
    ends.host.send((FRAME_MAX + 1).to_bytes(4, "big") + b"x")

    assert await asyncio.wait_for(_drain(ends.read_fd), 5) == b""


async def test_a_process_that_closed_its_stdin_closes_the_connection(ends: Ends) -> None:
    loop = asyncio.get_running_loop()
    os.set_blocking(ends.write_fd, False)
    InPump(loop, ends.ours, ends.write_fd)
    os.close(ends.read_fd)
    await loop.sock_sendall(ends.host, frame(b"abc"))

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            await loop.sock_sendall(ends.host, b"x")
            await asyncio.sleep(0.01)


async def test_input_stops_when_the_process_does_not_read(ends: Ends) -> None:
    os.set_blocking(ends.write_fd, False)
    pump = InPump(asyncio.get_running_loop(), ends.ours, ends.write_fd)
    sent = 0
    for _ in range(200):
        try:
            sent += ends.host.send(frame(b"x" * 60000))
        except BlockingIOError:
            pass
        await asyncio.sleep(0)

    assert sent < 4 << 20
    pump.abort()
