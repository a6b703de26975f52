"""What is piped into `ctr run` and `ctr task exec` arrives whole and ends, however little it is.

`ctr` says CloseIO only if it has a task by the end of its input, so runc's shim does not pass this.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.stdio.stdin import GRACE
from testing.containerd import Containerd

pytestmark = pytest.mark.kata_only

BUSYBOX = "local/busybox:1"
SIZES = [0, 1, 10, 64 << 10, 300_000, 1 << 20, 5 << 20]
#: Each run is a VM, so its sizes take turns; an exec costs nothing.
CASES = [("run", size, ("pipe", "file")[number % 2]) for number, size in enumerate(SIZES)]
CASES += [("exec", size, source) for size in SIZES for source in ("pipe", "file")]
DEADLINE = 120.0  # seconds; what is wrong here hangs for ever

Ctr = Callable[[list[str], int | None], tuple[bytes, int]]


@pytest.fixture
def ctr(containerd: Containerd) -> Ctr:
    """Run `ctr ARGV` with this descriptor as stdin: its output and exit code."""

    def _ctr(argv: list[str], stdin: int | None) -> tuple[bytes, int]:
        done = subprocess.run(
            containerd.ctr_argv(*argv),
            check=False,
            stdin=stdin,
            capture_output=True,
            timeout=DEADLINE,
            env=containerd.environment,
        )
        return done.stdout or done.stderr, done.returncode

    return _ctr


@pytest.fixture(params=["run", "exec"])
def command(request: pytest.FixtureRequest, containerd: Containerd, runtime: str) -> Iterator[list[str]]:
    """The beginning of a command line of ctr that runs a program with stdin, up to the program."""
    name = containerd.new_id("stdin")
    if request.param == "run":
        yield ["run", "--rm", "--runtime", runtime, BUSYBOX, name]
    else:
        sleeper = request.getfixturevalue("sleeper")
        yield ["task", "exec", "--exec-id", name, sleeper]
    containerd.remove(name)


def feed(pieces: list[bytes], pause: float) -> tuple[int, threading.Thread]:
    """The read end of a pipe that a thread writes the pieces into, `pause` seconds before each."""
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb", buffering=0) as file:
            for piece in pieces:
                time.sleep(pause)
                try:
                    file.write(piece)
                except BrokenPipeError:
                    return

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return reader, thread


@pytest.mark.parametrize(("command", "size", "source"), CASES, indirect=["command"])
def test_all_of_it_arrives_and_it_ends(
    ctr: Ctr, command: list[str], size: int, source: str, tmp_path: Path
) -> None:
    data = random.Random(size).randbytes(size)
    if source == "file":
        (tmp_path / "input").write_bytes(data)
        reader = os.open(tmp_path / "input", os.O_RDONLY)
    else:
        reader, _ = feed([data], 0)
    try:
        out, code = ctr([*command, "sh", "-c", "md5sum; exit 3"], reader)
    finally:
        os.close(reader)
    assert (out.decode(), code) == (f"{hashlib.md5(data).hexdigest()}  -\n", 3)


def test_a_reader_that_stops_early(ctr: Ctr, command: list[str]) -> None:
    reader, writing = feed([bytes(b"x" * 65536)] * 80, 0)
    try:
        assert ctr([*command, "head", "-c1"], reader) == (b"x", 0)
    finally:
        os.close(reader)
    writing.join(DEADLINE)


@pytest.mark.parametrize("pause", [0.2, 1.5 * GRACE])
def test_a_writer_that_takes_its_time(ctr: Ctr, command: list[str], pause: float) -> None:
    """Longer than a process without a client is waited for: this one has a client."""
    reader, _ = feed([b"one ", b"two ", b"three"], pause)
    try:
        assert ctr([*command, "cat"], reader) == (b"one two three", 0)
    finally:
        os.close(reader)


def test_a_detached_process_whose_caller_had_no_input_reads_on(
    ctr: Ctr, containerd: Containerd, runtime: str
) -> None:
    """Nobody reads its output either, so whoever attaches later may still write to it."""
    name = containerd.new_id("detached")
    with open(os.devnull, "rb") as nothing:
        _, code = ctr(["run", "-d", "--runtime", runtime, BUSYBOX, name, "cat"], nothing.fileno())
    try:
        assert code == 0
        time.sleep(2 * GRACE)  # that nothing happens tells nobody; it would have by now
        assert "RUNNING" in containerd.ctr("task", "ls").text
        reader, _ = feed([b"hello"], 0)
        attached = subprocess.Popen(
            containerd.ctr_argv("task", "attach", name),
            stdin=reader,
            stdout=subprocess.PIPE,
            env=containerd.environment,
        )
        os.close(reader)
        try:
            assert attached.stdout is not None
            assert attached.stdout.read(5) == b"hello"
        finally:
            attached.kill()
            attached.communicate()
    finally:
        containerd.remove(name)
