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


async def test_a_host_that_knows_the_exit_and_left_blocks_nobody(ends: Ends) -> None:
    os.set_blocking(ends.read_fd, False)
    ended = asyncio.Event()
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours, ended.set)
    pump.let_go()
    ends.host.close()

    await asyncio.wait_for(_feed(ends.write_fd, b"x" * (1 << 20)), 10)
    await asyncio.wait_for(ended.wait(), 5)


async def _more(ends: Ends) -> tuple[socket.socket, socket.socket]:
    """A second connection: the pump's end, the host's."""
    ours, host = socket.socketpair()
    ours.setblocking(False)
    host.setblocking(False)
    return ours, host


@pytest.mark.parametrize("dies", ["before", "while it is broken", "after"])
async def test_output_goes_on_with_the_next_host(ends: Ends, dies: str) -> None:
    """What was held when the host was gone, what the pipe held, what came later, and the end."""
    loop = asyncio.get_running_loop()
    os.set_blocking(ends.read_fd, False)
    pump = OutPump(loop, ends.read_fd, ends.ours)
    ends.host.close()
    os.write(ends.write_fd, b"held ")
    await asyncio.sleep(0.05)
    os.write(ends.write_fd, b"piped ")
    if dies == "before":
        pump.process_died()
        await asyncio.sleep(GRACE * 2)
    ours, host = await _more(ends)
    pump.reattach(ours)
    if dies == "while it is broken":
        pump.process_died()
    if dies == "after":
        os.write(ends.write_fd, b"later")
        await asyncio.sleep(0.05)
        pump.process_died()

    said = await asyncio.wait_for(frames(host), 5)

    assert said == b"held piped " + (b"later" if dies == "after" else b"")
    host.close()
    await asyncio.sleep(0.05)
    assert ours.fileno() == -1


async def test_a_process_waits_while_nobody_reads(ends: Ends) -> None:
    """More than chunk and pipe hold is written only when there is a host again, and none of it is lost."""
    os.set_blocking(ends.read_fd, False)
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours)
    ends.host.close()
    data = os.urandom(1 << 20)
    feeding = asyncio.ensure_future(_feed(ends.write_fd, data))
    await asyncio.sleep(0.2)
    assert not feeding.done()
    ours, host = await _more(ends)

    pump.reattach(ours)

    assert await asyncio.wait_for(frames(host), 10) == data
    await feeding
    host.close()


async def test_a_frame_that_was_cut_is_finished_for_the_next_host(ends: Ends) -> None:
    """What the first host was sent is its own; the rest comes as a frame of its own."""
    os.set_blocking(ends.read_fd, False)
    ends.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours)
    data = os.urandom(CHUNK)
    feeding = asyncio.ensure_future(_feed(ends.write_fd, data))
    await asyncio.sleep(0.05)
    first = ends.host.recv(1 << 20)[4:]
    assert 0 < len(first) < CHUNK
    ends.host.close()
    await asyncio.sleep(0.05)
    ours, host = await _more(ends)

    pump.reattach(ours)

    rest = await asyncio.wait_for(frames(host), 5)
    assert data.endswith(rest)
    assert len(first) + len(rest) <= CHUNK
    await feeding
    host.close()


async def test_an_end_that_was_said_is_said_again_by_closing(ends: Ends) -> None:
    os.set_blocking(ends.read_fd, False)
    pump = OutPump(asyncio.get_running_loop(), ends.read_fd, ends.ours)
    os.close(ends.write_fd)
    assert await asyncio.wait_for(frames(ends.host), 5) == b""
    ends.host.close()
    await asyncio.sleep(0.05)
    ours, host = await _more(ends)

    pump.reattach(ours)

    assert host.recv(1) == b""
    host.close()


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


async def test_input_goes_on_with_the_next_host(ends: Ends) -> None:
    """A host that leaves without an end is no end; the rest of a frame that it cut is not waited for."""
    os.set_blocking(ends.write_fd, False)
    pump = InPump(asyncio.get_running_loop(), ends.ours, ends.write_fd)
    ends.host.send(frame(b"abc") + frame(b"lost")[:6])
    ends.host.close()
    await asyncio.sleep(0.05)
    ours, host = await _more(ends)

    pump.reattach(ours)
    host.send(frame(b"def") + END)

    assert await asyncio.wait_for(_drain(ends.read_fd), 5) == b"abclodef"
    host.close()
    ours, host = await _more(ends)
    pump.reattach(ours)
    assert host.recv(1) == b""  # an input that has ended stays so
    host.close()


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
