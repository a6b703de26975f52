"""Stdio between real FIFOs, files and loggers and the guest: every byte, each stream for itself, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devices.child import process_start_time
from devices.errors import GuestError, HostError, KataError
from devices.frames import FRAME_MAX, FrameReader
from devices.undo import MemoryUndo
from shim.stdio import stdin as stdin_module
from shim.stdio import stdio as stdio_module
from tests.unit.shim.fakes import TaskClient, open_descriptors
from tests.unit.turns import LIMIT, turns

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' clients open stdin when they come to it, on a busy machine late."""
    monkeypatch.setattr(stdin_module, "GRACE", 60.0)


@pytest_asyncio.fixture(params=[True, False], ids=["direct", "by call"])
async def shim(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TaskClient]:
    """A shim in each of the two modes towards the guest; it leaves no descriptor behind."""
    client = TaskClient(tmp_path, direct=request.param)
    before = open_descriptors()
    yield client
    await client.close()
    assert open_descriptors() == before


@pytest_asyncio.fixture
async def direct(tmp_path: Path) -> AsyncIterator[TaskClient]:
    """A shim whose streams are connections."""
    client = TaskClient(tmp_path)
    before = open_descriptors()
    yield client
    await client.close()
    assert open_descriptors() == before


class Fifo:
    """A client's end of a FIFO, opened as containerd's client does: before the shim opens its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = str(directory / name)
        os.mkfifo(self.path)
        self.fd = -1

    def open_reader(self) -> None:
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def open_writer(self) -> None:
        self.fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        ready = asyncio.Event()
        add(self.fd, ready.set)
        await ready.wait()
        remove(self.fd)

    async def read(self, size: int = MIB) -> bytes:
        """Up to `size` bytes; b"" at the end."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(BlockingIOError):
                return os.read(self.fd, size)
            await self._ready(loop.add_reader, loop.remove_reader)

    async def read_all(self) -> bytes:
        data = bytearray()
        while piece := await self.read():
            data += piece
        return bytes(data)

    async def write(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                await self._ready(loop.add_writer, loop.remove_writer)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@pytest.fixture
def fifos(tmp_path: Path) -> Iterator[dict[str, Fifo]]:
    """The three FIFOs of a client, its readers open."""
    made = {name: Fifo(tmp_path, name) for name in ("stdin", "stdout", "stderr")}
    made["stdout"].open_reader()
    made["stderr"].open_reader()
    yield made
    for fifo in made.values():
        fifo.close()


def paths(fifos: dict[str, Fifo]) -> dict[str, str]:
    return {name: fifo.path for name, fifo in fifos.items()}


async def say(shim: TaskClient, data: bytes, stream: str = "stdout", exec_id: str = "") -> None:
    """Output of the guest's process, in either mode."""
    guest = shim.guest(exec_id=exec_id)
    if guest.streams:
        await guest.write(data, 1 if stream == "stdout" else 2)
    else:
        for start in range(0, len(data), 32 << 10):
            guest.pieces[stream].put_nowait(data[start : start + (32 << 10)])


async def heard(shim: TaskClient, exec_id: str = "") -> bytes:
    """The whole stdin of the guest's process, in either mode."""
    guest = shim.guest(exec_id=exec_id)
    if guest.streams:
        return await guest.read_stdin()
    await until(lambda: guest.stdin_closed)
    return bytes(guest.written)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; five seconds at most."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  (the condition is anybody's)
            await asyncio.sleep(0.001)


async def test_output_arrives_apart_and_ends(shim: TaskClient, fifos: dict[str, Fifo]) -> None:
    await shim.create(**paths(fifos))
    await shim.start()
    await say(shim, b"out\n")
    await say(shim, b"err\n", "stderr")
    shim.guest().exit(0)
    await shim.wait()
    assert await fifos["stdout"].read_all() == b"out\n"
    assert await fifos["stderr"].read_all() == b"err\n"
    state = await shim.state()
    assert (state.stdin, state.stdout) == (fifos["stdin"].path, fifos["stdout"].path)
    await shim.delete()


async def test_the_connections_of_an_exec_are_opened_at_once(
    direct: TaskClient, fifos: dict[str, Fifo]
) -> None:
    """Each takes a way to the guest and back."""
    await direct.create()
    await direct.start()
    await direct.exec(**paths(fifos))
    everybody = asyncio.Barrier(3)
    direct.sandbox.before["open_stream"] = everybody.wait  # type: ignore[assignment]
    async with asyncio.timeout(30):
        await direct.start(exec_id="e")


async def test_when_a_connection_fails_the_others_are_closed(
    direct: TaskClient, fifos: dict[str, Fifo]
) -> None:
    await direct.create()
    await direct.start()
    await direct.exec(**paths(fifos))
    asked = 0

    async def one_fails() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise GuestError("no", code="UNAVAILABLE")

    direct.sandbox.before["open_stream"] = one_fails
    with pytest.raises(KataError, match="no"):
        await direct.start(exec_id="e")
    assert asked == 3
    assert [guest.recv(1) for guest in direct.sandbox.opened[-2:]] == [b"", b""]


async def test_stdin_ends_after_its_last_byte(shim: TaskClient, fifos: dict[str, Fifo]) -> None:
    await shim.create(**paths(fifos))
    await shim.start()
    stdin = fifos["stdin"]
    stdin.open_writer()
    await stdin.write(b"one ")
    stdin.close()
    await asyncio.sleep(0.02)  # a client that goes away does not end stdin
    stdin.open_writer()
    await stdin.write(b"two")
    await shim.call("CloseIO", id="c", stdin=True)
    stdin.close()
    async with asyncio.timeout(5):
        assert await heard(shim) == b"one two"
    await say(shim, b"still here")
    assert await fifos["stdout"].read() == b"still here"


async def test_without_stdin_the_process_sees_its_end_at_once(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    if shim.guest().streams:
        raise AssertionError("streams were opened for nothing")
    await until(lambda: shim.guest().ports == (0, 0, 0))
    if not shim.sandbox.direct_stdio:
        await until(lambda: shim.guest().stdin_closed)


async def test_the_exec_stdin_has_no_reader_before_start(shim: TaskClient, fifos: dict[str, Fifo]) -> None:
    # `ctr task exec` forgets CloseIO when its input ends before Exec was answered.
    await shim.create()
    await shim.start()
    await shim.exec(**paths(fifos))
    with pytest.raises(OSError, match="No such device"):
        fifos["stdin"].open_writer()
    await shim.start(exec_id="e")
    fifos["stdin"].open_writer()
    fifos["stdin"].close()


async def test_nobody_reads_stdin_before_start(shim: TaskClient, fifos: dict[str, Fifo]) -> None:
    """A client that could write before would come to its end before it knows the task to say CloseIO to."""
    stdin = fifos["stdin"]
    await shim.create(**paths(fifos))
    with pytest.raises(OSError, match="No such device"):
        stdin.open_writer()
    waiting = asyncio.create_task(asyncio.to_thread(os.open, stdin.path, os.O_WRONLY))
    await shim.start()
    stdin.fd = await waiting
    await stdin.write(b"0123456789")
    await shim.call("CloseIO", id="c", stdin=True)
    stdin.close()
    async with asyncio.timeout(5):
        assert await heard(shim) == b"0123456789"


async def test_an_input_of_nothing_ends(
    shim: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client came and went before there was a task, and never says CloseIO; it reads the output."""
    monkeypatch.setattr(stdin_module, "GRACE", 0.05)
    await shim.create(**paths(fifos))
    await shim.start()
    async with asyncio.timeout(5):
        assert await heard(shim) == b""
    await say(shim, b"out")  # and what is read is read still
    assert await fifos["stdout"].read() == b"out"


async def test_a_detached_task_waits_for_who_attaches(
    shim: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is there at Start, not even for the output."""
    monkeypatch.setattr(stdin_module, "GRACE", 0.05)
    fifos["stdout"].close()
    fifos["stderr"].close()
    await shim.create(**paths(fifos))
    await shim.start()
    await say(shim, b"unheard")
    await asyncio.sleep(0.2)
    fifos["stdin"].open_writer()
    await fifos["stdin"].write(b"late")
    await shim.call("CloseIO", id="c", stdin=True)
    fifos["stdin"].close()
    async with asyncio.timeout(5):
        assert await heard(shim) == b"late"
    fifos["stdout"].open_reader()
    assert await fifos["stdout"].read() == b"unheard"


async def test_who_is_there_at_start_may_go_without_a_word(
    shim: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as `ctr run -d`. It waits in its open; one both ways, as here, does not. Its going is no end."""
    monkeypatch.setattr(stdin_module, "GRACE", 0.05)
    await shim.create(**paths(fifos))
    fifos["stdin"].fd = os.open(fifos["stdin"].path, os.O_RDWR | os.O_NONBLOCK)
    await shim.start()
    await asyncio.sleep(0.02)
    fifos["stdin"].close()
    await asyncio.sleep(0.2)
    fifos["stdin"].open_writer()
    await fifos["stdin"].write(b"back")
    await shim.call("CloseIO", id="c", stdin=True)
    fifos["stdin"].close()
    async with asyncio.timeout(5):
        assert await heard(shim) == b"back"


async def test_close_io_ends_the_wait_for_a_client(shim: TaskClient, fifos: dict[str, Fifo]) -> None:
    await shim.create(**paths(fifos))
    await shim.start()
    await asyncio.sleep(0.02)
    await shim.call("CloseIO", id="c", stdin=True)
    async with asyncio.timeout(5):
        assert await heard(shim) == b""


async def test_close_io_may_come_before_start(shim: TaskClient, fifos: dict[str, Fifo]) -> None:
    await shim.create()
    await shim.start()
    await shim.exec(**paths(fifos))
    # Nobody reads before Start, so a client's open waits; opened both ways it does not.
    fifos["stdin"].fd = os.open(fifos["stdin"].path, os.O_RDWR | os.O_NONBLOCK)
    await fifos["stdin"].write(b"early")
    await shim.call("CloseIO", id="c", exec_id="e", stdin=True)
    await shim.start(exec_id="e")
    fifos["stdin"].close()
    async with asyncio.timeout(5):
        assert await heard(shim, "e") == b"early"


async def test_fifty_megabytes_pass_unchanged(direct: TaskClient, fifos: dict[str, Fifo]) -> None:
    """stdin to a guest that echoes it to stdout, like `cat`."""
    await direct.create(**paths(fifos))
    await direct.start()
    block = random.Random(1).randbytes(5 * MIB)
    total = 10

    def feed() -> None:
        with open(fifos["stdin"].path, "wb", buffering=0) as file:
            for _ in range(total):
                file.write(block)

    def digest() -> str:
        reader = os.open(fifos["stdout"].path, os.O_RDONLY)
        digest = hashlib.sha256()
        while data := os.read(reader, MIB):
            digest.update(data)
        os.close(reader)
        return digest.hexdigest()

    async def cat() -> None:
        guest, frames = direct.guest(), FrameReader()
        while not frames.ended:
            piece = await asyncio.get_running_loop().sock_recv(guest.stdin, FRAME_MAX)
            for payload in frames.payloads(memoryview(piece)):
                await guest.write(bytes(payload))
        guest.exit(0)

    expected = hashlib.sha256()
    for _ in range(total):
        expected.update(block)
    began = time.monotonic()
    echo = asyncio.create_task(cat())
    reading = asyncio.create_task(asyncio.to_thread(digest))
    fifos["stdout"].close()
    await asyncio.to_thread(feed)
    await direct.call("CloseIO", id="c", stdin=True)
    await echo
    await direct.wait()
    assert await reading == expected.hexdigest()
    assert time.monotonic() - began < 20


async def test_a_slow_reader_stops_its_own_stream_only(direct: TaskClient, fifos: dict[str, Fifo]) -> None:
    await direct.create(**paths(fifos))
    await direct.start()
    flood = asyncio.create_task(say(direct, bytes(4 * MIB)))
    await asyncio.sleep(0.05)
    assert not flood.done(), "nobody reads: the guest must be held back"
    await say(direct, b"err\n", "stderr")
    async with asyncio.timeout(5):
        assert await fifos["stderr"].read() == b"err\n"
    size = 0
    async with asyncio.timeout(5):
        while size < 4 * MIB:
            size += len(await fifos["stdout"].read())
    await flood


@pytest.fixture
async def swallowed(tmp_path: Path) -> AsyncIterator[list[str]]:
    """FIFOs that processes of their own read."""
    made = [str(tmp_path / f"swallowed{number}") for number in range(20)]
    for path in made:
        os.mkfifo(path)
    cats = [
        await asyncio.create_subprocess_exec("cat", path, stdout=asyncio.subprocess.DEVNULL) for path in made
    ]
    yield made
    for cat in cats:
        with contextlib.suppress(ProcessLookupError):
            cat.kill()
        await cat.wait()


async def test_one_byte_frames_hold_nobody_up(swallowed: list[str], tmp_path: Path) -> None:
    """Twenty streams of them, whose guest sends as fast as it can; another process ends meanwhile."""
    direct = TaskClient(tmp_path)
    await direct.create()
    await direct.start()
    await direct.exec(exec_id="other")
    await direct.start(exec_id="other")
    one = (1).to_bytes(4, "big") + b"x"
    floods: list[asyncio.Task[None]] = []
    for number in range(10):
        name = f"flood{number}"
        await direct.exec(exec_id=name, stdout=swallowed[2 * number], stderr=swallowed[2 * number + 1])
        await direct.start(exec_id=name)
        for sock in direct.guest(exec_id=name).streams[1:]:
            assert sock is not None
            floods.append(asyncio.create_task(asyncio.get_running_loop().sock_sendall(sock, one * 50_000)))
    async with turns() as longest:
        await asyncio.wait(floods, return_when=asyncio.FIRST_COMPLETED)
        assert (await direct.state()).status
        direct.guest(exec_id="other").exit(7)
        assert (await direct.wait(exec_id="other")).exit_status == 7
        assert not all(flood.done() for flood in floods)
        await asyncio.gather(*floods)
    await direct.close()
    assert longest.seconds < LIMIT


async def test_frames_are_whole_whatever_their_size(direct: TaskClient, fifos: dict[str, Fifo]) -> None:
    await direct.create(**paths(fifos))
    await direct.start()
    pieces = [random.Random(7).randbytes(size) for size in [1, 2, 3] * 400 + [FRAME_MAX, 1, 5000]]
    wire = b"".join(len(piece).to_bytes(4, "big") + piece for piece in pieces)
    stdout = direct.guest().streams[1]
    assert stdout is not None
    sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(stdout, wire))
    expected, found = b"".join(pieces), b""
    async with asyncio.timeout(20):
        while len(found) < len(expected):
            found += await fifos["stdout"].read()
        await sending
    assert found == expected


async def test_nobody_reading_delays_the_exit_by_a_bounded_time(
    direct: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio_module, "DRAIN_IDLE", 0.1)
    await direct.create(**paths(fifos))
    await direct.start()
    flood = asyncio.create_task(say(direct, bytes(4 * MIB)))
    await asyncio.sleep(0.05)
    direct.guest().exit(3, keep_streams=True)
    began = time.monotonic()
    assert (await direct.wait()).exit_status == 3
    assert 0.1 <= time.monotonic() - began < 2
    flood.cancel()
    await direct.delete()


async def test_an_exec_that_is_killed_while_its_streams_are_full(
    direct: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing, and so does its client: its exit is told, and all is given back."""
    monkeypatch.setattr(stdio_module, "DRAIN_IDLE", 0.1)
    await direct.create()
    await direct.start()
    await direct.exec(**paths(fifos))
    await direct.start(exec_id="e")
    fifos["stdin"].open_writer()
    feeding = asyncio.create_task(fifos["stdin"].write(bytes(4 * MIB)))
    flood = asyncio.create_task(say(direct, bytes(4 * MIB), exec_id="e"))
    await asyncio.sleep(0.05)
    assert not feeding.done()
    assert not flood.done()
    await direct.kill(exec_id="e")
    async with asyncio.timeout(5):
        assert (await direct.wait(exec_id="e")).exit_status == 137
        with pytest.raises(BrokenPipeError):
            await feeding
    flood.cancel()
    await direct.delete(exec_id="e")
    assert (await direct.state()).status


async def test_a_background_process_delays_the_exit_by_a_bounded_time(
    direct: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio_module, "DRAIN_IDLE", 0.1)
    await direct.create("pod")
    await direct.start("pod")
    await direct.create(**paths(fifos))
    await direct.start()
    guest = direct.guest()
    guest.exit(0, keep_streams=True)
    await direct.wait()
    await guest.write(b"late")  # and its output still arrives until Delete
    assert await fifos["stdout"].read() == b"late"
    await direct.delete()


async def test_output_that_flows_after_the_exit_is_waited_for(
    direct: TaskClient, fifos: dict[str, Fifo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio_module, "DRAIN_IDLE", 0.2)
    await direct.create(**paths(fifos))
    await direct.start()
    guest = direct.guest()
    guest.exit(0, keep_streams=True)
    wait = asyncio.create_task(direct.wait())
    for _ in range(6):
        await asyncio.sleep(0.05)
        await guest.write(b"x")
    assert not wait.done()
    guest.end_output()
    await wait
    assert await fifos["stdout"].read_all() == b"x" * 6


async def test_output_stays_readable_after_the_exit(direct: TaskClient, tmp_path: Path) -> None:
    """A client that comes late finds what is in the FIFO, until Delete."""
    fifo = Fifo(tmp_path, "stdout")
    await direct.create(stdout=fifo.path)
    await direct.start()
    await say(direct, b"last words")
    direct.guest().exit(0)
    await direct.wait()
    fifo.open_reader()
    assert await fifo.read_all() == b"last words"
    fifo.close()


async def test_a_client_that_leaves_breaks_nothing(direct: TaskClient, fifos: dict[str, Fifo]) -> None:
    await direct.create(**paths(fifos))
    await direct.start()
    fifos["stdout"].close()
    await say(direct, b"unheard ")
    fifos["stdout"].open_reader()
    await say(direct, b"heard")
    direct.guest().exit(0)
    await direct.wait()
    assert await fifos["stdout"].read_all() == b"unheard heard"


async def test_a_process_that_closes_its_stdin(direct: TaskClient, fifos: dict[str, Fifo]) -> None:
    """Its writer gets EPIPE; the output goes on."""
    await direct.create(**paths(fifos))
    await direct.start()
    direct.guest().stdin.close()
    fifos["stdin"].open_writer()

    async def write_on() -> None:
        while True:
            await fifos["stdin"].write(bytes(FRAME_MAX))
            await asyncio.sleep(0.001)

    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(write_on(), 5)
    await say(direct, b"on")
    assert await fifos["stdout"].read() == b"on"


async def test_a_terminal_has_one_output_and_its_stdin_never_ends(
    direct: TaskClient, fifos: dict[str, Fifo]
) -> None:
    await direct.create(stdin=fifos["stdin"].path, stdout=fifos["stdout"].path, terminal=True)
    await direct.start()
    guest = direct.guest()
    assert guest.ports[2] == 0
    fifos["stdin"].open_writer()
    await fifos["stdin"].write(b"ls\r")
    fifos["stdin"].close()
    await direct.call("CloseIO", id="c", stdin=True)
    assert await asyncio.get_running_loop().sock_recv(guest.stdin, 64) == b"\0\0\0\x03ls\r"
    await asyncio.sleep(0.02)
    with pytest.raises(BlockingIOError):
        guest.stdin.recv(1)


async def test_a_window_size_before_start_is_there_at_the_start(direct: TaskClient) -> None:
    await direct.create(terminal=True)
    await direct.call("ResizePty", id="c", width=100, height=30)
    assert direct.guest().windows == []
    await direct.start()
    assert direct.guest().windows == [(30, 100)]
    await direct.call("ResizePty", id="c", width=80, height=25)
    assert direct.guest().windows == [(30, 100), (25, 80)]
    await direct.exec(terminal=True)
    await direct.call("ResizePty", id="c", exec_id="e", width=7, height=5)
    await direct.start(exec_id="e")
    assert direct.guest(exec_id="e").windows == [(5, 7)]
    size = direct.guest(exec_id="e").spec.ConsoleSize
    assert (size.Height, size.Width) == (5, 7)


async def test_a_storm_of_sizes_ends_with_the_newest(direct: TaskClient) -> None:
    """However many are asked for while the guest takes its time; one that fails keeps no other one back."""
    await direct.create(terminal=True)
    await direct.start()
    answer, asked, refuses = asyncio.Event(), asyncio.Event(), False

    async def take_time() -> None:
        asked.set()
        await answer.wait()
        if refuses:
            raise GuestError("no")

    direct.agent.before["tty_win_resize"] = take_time

    async def storm(sizes: range) -> list[Any]:
        answer.clear()
        asked.clear()
        calls = [
            asyncio.create_task(direct.call("ResizePty", id="c", width=size, height=size)) for size in sizes
        ]
        async with asyncio.timeout(20):
            await asked.wait()
        calls[0].cancel()  # its caller goes
        answer.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    await storm(range(1, 5001))
    assert direct.guest().windows[-1] == (5000, 5000)
    assert len(direct.guest().windows) <= 2
    refuses = True
    answers = await storm(range(1, 101))
    assert sum(isinstance(each, GuestError) for each in answers) <= 2
    refuses = False
    await direct.call("ResizePty", id="c", width=100, height=100)
    assert direct.guest().windows[-1] == (100, 100)


async def test_resizing_what_has_no_terminal_is_no_error(direct: TaskClient) -> None:
    await direct.create()
    await direct.call("ResizePty", id="c", width=100, height=30)
    await direct.start()
    await direct.call("ResizePty", id="c", width=100, height=30)
    assert direct.guest().windows == []


async def test_file_logs_are_made_and_appended_to(shim: TaskClient, tmp_path: Path) -> None:
    log = tmp_path / "made" / "on the way" / "log"
    url = f"file://{str(log).replace(' ', '%20')}"
    for number in range(2):
        await shim.create(stdout=url, stderr=url)
        await shim.start()
        await say(shim, b"line %d\n" % number)
        shim.guest().exit(0)
        await shim.wait()
        await shim.delete()
    assert log.read_bytes() == b"line 0\nline 1\n"


async def test_dev_null_and_plain_files_are_outputs_too(shim: TaskClient, tmp_path: Path) -> None:
    file = tmp_path / "plain"
    file.write_bytes(b"before ")
    await shim.create(stdout=str(file), stderr="/dev/null")
    await shim.start()
    await say(shim, b"after")
    await say(shim, b"nothing", "stderr")
    shim.guest().exit(0)
    await shim.wait()
    assert file.read_bytes() == b"before after"


@pytest.mark.parametrize(
    ("stdio", "code", "text"),
    [
        ({"stdin": "/nonexistent/stdin"}, "FAILED_PRECONDITION", "cannot open stdin /nonexistent/stdin"),
        ({"stdout": "/nonexistent/stdout"}, "FAILED_PRECONDITION", "cannot open stdout"),
        ({"stdin": "/dev/null"}, "INVALID_ARGUMENT", "is not a FIFO"),
        ({"stdout": "relative"}, "INVALID_ARGUMENT", "absolute path"),
        ({"stderr": "gopher://x/y"}, "INVALID_ARGUMENT", "gopher:// is not supported"),
        ({"stdout": "binary:///nonexistent/logger"}, "FAILED_PRECONDITION", "cannot run the logger"),
        ({"stdout": "binary:///bin/false"}, "FAILED_PRECONDITION", "ended at once"),
    ],
)
async def test_wrong_stdio_is_refused_and_undone(
    direct: TaskClient, stdio: dict[str, str], code: str, text: str
) -> None:
    with pytest.raises(KataError, match=text) as caught:
        await direct.create(**stdio)
    assert caught.value.code == code
    assert direct.manager.idle
    assert direct.sandbox.stopped


LOGGER = """#!{python} -ISE
import os, sys
out = open(sys.argv[2], "wb")
seen = sys.argv[1:], os.environ["CONTAINER_ID"], os.environ["CONTAINER_NAMESPACE"]
out.write(repr(seen).encode() + b"\\n")
os.close(5)
for number in (3, 4):
    while data := os.read(number, 1 << 16):
        out.write(b"%d:" % number + data)
out.close()
"""


def logger(tmp_path: Path, text: str = LOGGER) -> Path:
    program = tmp_path / "logger"
    program.write_text(text.format(python=sys.executable))
    program.chmod(0o755)
    return program


async def test_a_binary_logger_gets_both_streams(shim: TaskClient, tmp_path: Path) -> None:
    log = tmp_path / "log"
    url = f"binary://{logger(tmp_path)}?path={log}&flag=&path=second"
    await shim.create(stdout=url, stderr=url)
    await shim.start()
    await say(shim, b"out")
    await say(shim, b"err", "stderr")
    shim.guest().exit(0)
    await shim.wait()
    await shim.delete()
    first, rest = log.read_bytes().split(b"\n")
    assert first.decode() == repr((["path", str(log), "flag", ""], "c", "default"))
    assert rest == b"3:out4:err"


async def test_a_logger_is_in_the_undo_log_while_it_runs(direct: TaskClient, tmp_path: Path) -> None:
    url = f"binary://{logger(tmp_path)}?path={tmp_path}/log"
    await direct.create(stdout=url, stderr=url)
    (entry,) = direct.undo.entries
    pid = int(entry.facts["pid"])
    assert (entry.kind, entry.facts["container"]) == ("logger", "c")
    assert entry.facts["start"] == process_start_time(pid)
    await direct.start()
    await say(direct, b"last words")
    assert direct.undo.entries == [entry]
    direct.guest().exit(0)
    await direct.wait()  # it ends by itself now
    await direct.delete()
    assert direct.undo.entries == []
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(KataError):
        await direct.create("second", stdout="binary:///bin/false")
    assert direct.undo.entries == []


async def test_a_logger_that_is_never_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.parse import urlsplit

    from shim.stdio.logger import Logger

    before = open_descriptors()
    undo = MemoryUndo()
    program = logger(tmp_path, "#!{python} -ISE\nimport time\ntime.sleep(60)\n")
    with pytest.raises(HostError, match=r"not ready after 0\.1 s"):
        await Logger.start(
            urlsplit(f"binary://{program}"), container_id="c", namespace="n", undo=undo, deadline=0.1
        )
    assert undo.entries == []
    assert open_descriptors() == before


async def test_a_logger_that_cannot_be_watched_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.parse import urlsplit

    from shim.stdio.logger import Logger

    def none_left(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = open_descriptors()
    monkeypatch.setattr(os, "pidfd_open", none_left)
    undo = MemoryUndo()
    url = urlsplit(f"binary://{logger(tmp_path)}?path={tmp_path}/log")
    with pytest.raises(HostError, match="cannot watch the logger"):
        await Logger.start(url, container_id="c", namespace="n", undo=undo)
    assert undo.entries == []
    assert open_descriptors() == before


async def test_a_logger_that_dies_does_not_stop_its_container(direct: TaskClient, tmp_path: Path) -> None:
    program = logger(tmp_path, "#!{python} -ISE\nimport os\nos.close(5)\nos.read(3, 1)\n")
    await direct.create(stdout=f"binary://{program}")
    await direct.start()
    async with asyncio.timeout(10):
        await say(direct, bytes(4 * MIB))
        direct.guest().exit(0)
        await direct.wait()


async def test_many_execs_leave_no_descriptor(direct: TaskClient, fifos: dict[str, Fifo]) -> None:
    await direct.create()
    await direct.start()
    before = open_descriptors()
    for number in range(20):
        name = f"e{number}"
        await direct.exec(exec_id=name, **paths(fifos))
        if number % 2:
            await direct.start(exec_id=name)
            direct.guest(exec_id=name).exit(0)
            await direct.wait(exec_id=name)
            for stream in direct.guest(exec_id=name).streams:
                assert stream is not None
                stream.close()
        await direct.delete(exec_id=name)
    assert open_descriptors() == before


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 7, 1000])
def test_frames_may_be_cut_anywhere(cut: int) -> None:
    wire = b"".join(len(part).to_bytes(4, "big") + part for part in (b"a", b"bcd", bytes(300))) + bytes(4)
    frames = FrameReader()
    data = b""
    for start in range(0, len(wire), cut):
        for payload in frames.payloads(memoryview(wire)[start : start + cut]):
            data += payload
    assert data == b"abcd" + bytes(300)
    assert frames.ended


def test_a_frame_that_is_too_long_ends_the_stream() -> None:
    frames = FrameReader()
    assert list(frames.payloads(memoryview((FRAME_MAX + 1).to_bytes(4, "big") + b"x"))) == []
    assert frames.ended
