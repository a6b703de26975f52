"""A container's processes, streams and exit codes, with a crun that only lacks the namespaces."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from agent.process import Process
from agent.stdio.stdio import PIPE
from proto import oci_pb2
from ttrpc import Code, RpcError

from .conftest import Box, Host, frame, read_stream


def _init(container: object) -> Process:
    init = container.init  # type: ignore[attr-defined]
    assert isinstance(init, Process)
    return init


async def _ended(process: Process) -> int:
    return await asyncio.wait_for(process.wait(), 20)


async def test_streams_and_exit_code(box: Box, host: Host) -> None:
    stdin, stdout, stderr = host.open(1), host.open(2), host.open(3)
    container = box.container("sh", "-c", "cat; echo oops >&2; exit 42")
    await container.create((1, 2, 3))
    stdin.send(frame(b"hello ") + frame(b"world") + frame(b""))
    await container.start()

    assert await read_stream(stdout) == b"hello world"
    assert await read_stream(stderr) == b"oops\n"
    assert await _ended(_init(container)) == 42
    assert await _ended(_init(container)) == 42  # for every waiter, also a late one


async def test_the_program_waits_for_start(box: Box, host: Host) -> None:
    stdout = host.open(1)
    container = box.container("echo", "started")
    await container.create((0, 1, 0))
    await asyncio.sleep(0.05)
    with pytest.raises(BlockingIOError):
        stdout.recv(1)
    await container.start()

    assert await read_stream(stdout) == b"started\n"
    with pytest.raises(RpcError, match="already started"):
        await container.start()


async def test_a_stream_that_is_not_named_is_null(box: Box, host: Host) -> None:
    stdout = host.open(9)
    container = box.container("sh", "-c", "cat; readlink /proc/self/fd/0 /proc/self/fd/2")
    await container.create((0, 9, 0))
    await container.start()

    assert await read_stream(stdout) == b"/dev/null\n/dev/null\n"


async def test_what_is_pumped_has_a_large_pipe(box: Box, host: Host) -> None:
    """A program and the agent take turns less often."""
    stdout = host.open(9)
    container = box.container("readlink", "/proc/self/fd/1")
    await container.create((0, 9, 0))
    pipes = [
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) for fd in map(int, os.listdir("/proc/self/fd")) if _is_pipe(fd)
    ]
    assert PIPE in pipes
    await container.start()
    assert (await read_stream(stdout)).startswith(b"pipe:")


def _is_pipe(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
    except OSError:
        return False


async def test_a_missing_program_is_named_and_leaves_nothing(box: Box) -> None:
    container = box.container("nonesuch")
    with pytest.raises(RpcError, match="nonesuch") as caught:
        await container.create((0, 0, 0))

    assert caught.value.code == Code.INVALID_ARGUMENT
    assert not os.path.exists(container.bundle)
    assert not os.path.exists(box.crun.root_of(container.id))
    assert [name for name in os.listdir(box.directory) if "." in name] == []


async def test_a_stream_that_never_comes(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: int) -> None:
        raise TimeoutError

    monkeypatch.setattr(box.listener, "take", never)
    container = box.container("true")
    with pytest.raises(RpcError, match="stream 77") as caught:
        await container.create((0, 77, 0))

    assert caught.value.code == Code.DEADLINE_EXCEEDED
    assert not os.path.exists(container.bundle)


async def test_a_terminal(box: Box, host: Host) -> None:
    stdin, stdout = host.open(1), host.open(2)
    container = box.container("sh", "-c", "stty size; read x; echo got $x; stty size; exit 5", terminal=True)
    container.config["process"]["consoleSize"] = {"height": 24, "width": 80}
    await container.create((1, 2, 0))
    await container.start()
    loop = asyncio.get_running_loop()
    first = await asyncio.wait_for(loop.sock_recv(stdout, 100), 10)
    assert first.endswith(b"24 80\r\n")
    _init(container).stdio.resize(50, 132)
    stdin.send(frame(b"text\n"))

    rest = await read_stream(stdout)
    assert b"got text\r\n" in rest
    assert b"50 132\r\n" in rest
    assert await _ended(_init(container)) == 5
    # As soon as the terminal's end is seen, which may be after the exit's.
    with pytest.raises(RpcError) as caught:
        async with asyncio.timeout(10):
            while True:
                _init(container).stdio.resize(1, 1)
                await asyncio.sleep(0.005)
    assert caught.value.code == Code.UNAVAILABLE


async def test_crun_that_fails_before_the_terminal_comes(box: Box) -> None:
    container = box.container("nonesuch", terminal=True)
    with pytest.raises(RpcError, match="nonesuch"):
        await asyncio.wait_for(container.create((0, 0, 0)), 10)


async def test_ten_execs_at_once(box: Box, host: Host) -> None:
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    await container.start()

    async def one(number: int) -> tuple[bytes, int]:
        stdout = host.open(100 + number)
        process = oci_pb2.Process(Args=["sh", "-c", f"echo {number}; exit {number}"])
        await container.exec(f"e{number}", process, (0, 100 + number, 0))
        return await read_stream(stdout), await _ended(container.process(f"e{number}"))

    results = await asyncio.gather(*(one(number) for number in range(10)))

    assert results == [(f"{n}\n".encode(), n) for n in range(10)]


async def test_exec_errors(box: Box) -> None:
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    await container.start()
    await container.exec("a", oci_pb2.Process(Args=["sleep", "100"]), (0, 0, 0))
    with pytest.raises(RpcError) as twice:
        await container.exec("a", oci_pb2.Process(Args=["true"]), (0, 0, 0))
    with pytest.raises(RpcError, match="nope") as missing:
        await container.exec("b", oci_pb2.Process(Args=["nope"]), (0, 0, 0))
    with pytest.raises(RpcError) as unknown:
        container.process("b")
    await container.signal("", signal.SIGTERM)
    assert await _ended(_init(container)) == 143
    with pytest.raises(RpcError) as dead:
        await container.exec("c", oci_pb2.Process(Args=["true"]), (0, 0, 0))

    assert twice.value.code == Code.ALREADY_EXISTS
    assert missing.value.code == Code.INVALID_ARGUMENT
    assert unknown.value.code == Code.NOT_FOUND
    assert dead.value.code == Code.FAILED_PRECONDITION


async def test_execs_hear_of_passed_devices_by_the_guests_addresses(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = box.container("sleep", "100")
    container.pci_addresses = {"0000:65:00.0": "0000:01:00.0"}
    await container.create((0, 0, 0))
    seen = []

    async def launch(_: str, __: str, config: dict[str, Any], *___: object) -> Any:
        seen.extend(config["process"]["env"])
        return container.init

    monkeypatch.setattr(container, "_launch", launch)
    env = ["PCIDEVICE_A=0000:65:00.0", "B=0000:65:00.0"]
    await container.exec("e", oci_pb2.Process(Args=["true"], Env=env), (0, 0, 0))
    assert seen == ["PCIDEVICE_A=0000:01:00.0", "B=0000:65:00.0"]


async def test_an_exec_id_may_be_used_again(box: Box) -> None:
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    for code in (3, 4):
        await container.exec("e", oci_pb2.Process(Args=["sh", "-c", f"exit {code}"]), (0, 0, 0))
        assert await _ended(container.process("e")) == code


async def test_a_background_child_does_not_delay_the_end(box: Box, host: Host) -> None:
    stdout = host.open(1)
    container = box.container("sh", "-c", "sleep 30 & echo $!")
    await container.create((0, 1, 0))
    await container.start()
    before = asyncio.get_running_loop().time()
    pid = int(await read_stream(stdout))

    assert asyncio.get_running_loop().time() - before < 10
    os.kill(pid, signal.SIGKILL)


async def test_signals(box: Box) -> None:
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    await container.start()
    with pytest.raises(RpcError) as wrong:
        await container.signal("", 12345)
    await container.signal("", signal.SIGKILL)
    assert await _ended(_init(container)) == 137
    with pytest.raises(RpcError) as gone:
        await container.signal("", signal.SIGTERM)

    assert wrong.value.code == Code.INVALID_ARGUMENT
    assert gone.value.code == Code.NOT_FOUND


def _cgroup(directory: Path, *pids: int) -> str:
    """A directory with the files of a cgroup that freezes and thaws at once."""
    for name, text in (
        ("cgroup.procs", "".join(f"{pid}\n" for pid in pids)),
        ("cgroup.freeze", "0\n"),
        ("cgroup.events", "populated 1\nfrozen 0\nfrozen 1\n"),
    ):
        (directory / name).write_text(text)
    return str(directory)


async def test_a_signal_to_all_and_one_to_the_init(box: Box, tmp_path: Path) -> None:
    """An empty exec id means everything in the cgroup, the container's own id its init alone."""
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    await container.start()
    for name in ("x", "y"):
        await container.exec(name, oci_pb2.Process(Args=["sleep", "100"]), (0, 0, 0))
    init, x, y = (container.process(name) for name in ("", "x", "y"))
    (tmp_path / "below").mkdir()
    container.cgroup = _cgroup(tmp_path, init.pid, x.pid)
    _cgroup(tmp_path / "below", y.pid)
    await container.signal(container.id, signal.SIGTERM)
    assert await _ended(init) == 128 + signal.SIGTERM
    assert x.alive
    assert y.alive

    with pytest.raises(RpcError):  # the init has ended; the others are told nevertheless
        await container.signal("", signal.SIGUSR1)
    assert [await _ended(process) for process in (x, y)] == [128 + signal.SIGUSR1] * 2
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


async def test_remove_leaves_nothing(box: Box) -> None:
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    await container.start()
    await container.remove()

    assert await _ended(_init(container)) == 137
    assert not os.path.exists(container.bundle)
    assert not os.path.exists(box.crun.root_of(container.id))


async def test_by_call(box: Box) -> None:
    container = box.container("sh", "-c", "cat; echo oops >&2; exit 6", listener=False)
    await container.create((0, 0, 0))
    await container.start()
    stdio = _init(container).stdio
    assert await stdio.write(b"some text") == 9
    assert await asyncio.wait_for(stdio.read(1, 4), 10) == b"some"
    assert await asyncio.wait_for(stdio.read(1, 100), 10) == b" text"
    await stdio.write(b"")

    assert await asyncio.wait_for(stdio.read(1, 100), 10) == b""
    assert await asyncio.wait_for(stdio.read(2, 100), 10) == b"oops\n"
    assert await asyncio.wait_for(stdio.read(2, 100), 10) == b""
    assert await _ended(_init(container)) == 6
    with pytest.raises(RpcError, match="closed"):
        await stdio.write(b"more")


async def test_by_call_a_survivor_does_not_delay_the_end(box: Box) -> None:
    container = box.container("sh", "-c", "sleep 30 & echo $!", listener=False)
    await container.create((0, 0, 0))
    await container.start()
    stdio = _init(container).stdio
    pid = int(await asyncio.wait_for(stdio.read(1, 100), 10))

    assert await asyncio.wait_for(stdio.read(1, 100), 10) == b""
    os.kill(pid, signal.SIGKILL)


async def test_by_call_writing_waits_for_the_reader_and_ends_with_it(box: Box) -> None:
    container = box.container("sh", "-c", "read x; exit 0", listener=False)
    await container.create((0, 0, 0))
    stdio = _init(container).stdio
    writing = asyncio.ensure_future(stdio.write(b"x" * (1 << 20)))
    await asyncio.sleep(0.05)
    assert not writing.done()
    await container.signal("", signal.SIGKILL)

    with pytest.raises(RpcError):
        await asyncio.wait_for(writing, 10)


async def test_by_call_a_terminal(box: Box) -> None:
    container = box.container("sh", "-c", "read x; echo got $x", terminal=True, listener=False)
    await container.create((0, 0, 0))
    await container.start()
    stdio = _init(container).stdio
    stdio.close_stdin()  # a terminal has no EOF to give
    await stdio.write(b"it\n")
    output = b""
    while part := await asyncio.wait_for(stdio.read(1, 1000), 10):
        output += part

    assert b"got it\r\n" in output


async def test_freezing_waits_for_the_kernels_word(box: Box, tmp_path: Path) -> None:
    container = box.container("sleep", "100")
    container.cgroup = _cgroup(tmp_path)
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    freezing = asyncio.ensure_future(container.freeze(True))
    await asyncio.sleep(0.05)
    assert not freezing.done()
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    await asyncio.wait_for(freezing, 10)


async def test_a_freezer_that_hangs_is_given_up(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that hangs in the kernel cannot be frozen: Pause fails, a signal goes out all the same."""
    monkeypatch.setattr("agent.container._SIGNAL_FREEZE", 0.05)
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    await container.start()
    await container.exec("x", oci_pb2.Process(Args=["sleep", "100"]), (0, 0, 0))
    container.cgroup = _cgroup(tmp_path, _init(container).pid, container.process("x").pid)
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    with pytest.raises(RpcError) as late:
        await container.freeze(True, 0.05)
    assert late.value.code == Code.DEADLINE_EXCEEDED
    assert (tmp_path / "cgroup.freeze").read_text() == "0"
    await container.signal("", signal.SIGTERM)
    assert await _ended(container.process("x")) == 128 + signal.SIGTERM


async def test_update_writes_limits_into_the_cgroup(box: Box, tmp_path: Path) -> None:
    container = box.container("sleep", "100")
    await container.create((0, 0, 0))
    container.cgroup = str(tmp_path)
    for name in ("memory.max", "memory.high"):
        (tmp_path / name).touch()
    resources = oci_pb2.LinuxResources()
    resources.Memory.Limit = 1 << 20
    await container.update(resources, {"linux": {"resources": {"unified": {"memory.high": "9"}}}})

    assert (tmp_path / "memory.max").read_text() == str(1 << 20)
    assert (tmp_path / "memory.high").read_text() == "9"
