"""Orphans are reaped in the end; children with an owner never are."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.launch.reaper import Reaper
from shim.state.procfs import is_running, kill_process, start_time, stat


def _zombie() -> int:
    """A child that has ended and that nobody waits for."""
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            stat(pid)
        except ProcessLookupError:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_nobodys_child_is_reaped() -> None:
    """A zombie that stays one for the grace time is taken."""
    reaper = Reaper(asyncio.get_running_loop(), grace=0.05)
    pid = _zombie()
    signal.raise_signal(signal.SIGCHLD)

    assert await _gone(pid)
    reaper.close()


async def test_owner_has_its_time() -> None:
    """At the first look a zombie is only noted; until the second its owner can have it."""
    reaper = Reaper(asyncio.get_running_loop(), grace=1000)
    pid = _zombie()

    reaper._look()
    assert stat(pid)[0] == "Z"

    reaper._look()
    with pytest.raises(ProcessLookupError):
        stat(pid)
    reaper.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def test_kill_process(sleeper: subprocess.Popen[bytes]) -> None:
    """The right start time kills and waits for the end; a wrong one does nothing and is no error."""
    start = start_time(sleeper.pid)

    assert kill_process(sleeper.pid, start + 1, 1.0)
    assert sleeper.poll() is None
    assert kill_process(sleeper.pid, start, 5.0)
    assert sleeper.wait(1) == -9
    assert kill_process(sleeper.pid, start, 1.0)  # long gone


def test_zombies_do_not_run() -> None:
    """A process that has ended but was not reaped counts as ended."""
    pid = _zombie()
    start = start_time(pid)

    assert not is_running(pid, start)
    assert kill_process(pid, start, 1.0)
    os.waitpid(pid, 0)


def test_names_with_blanks(tmp_path: Path) -> None:
    """The name in /proc/PID/stat may look like anything."""
    program = tmp_path / "a ) S 1 (b"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            state, parent, start = stat(process.pid)
        finally:
            process.kill()

    assert state in "RSD"
    assert parent == os.getpid()
    assert start > 0
