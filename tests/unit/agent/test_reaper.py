"""Each process is reaped once and its exit code reaches whoever asks, early or late, and nobody else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest

from agent import reaper as module
from agent.reaper import Reaper, exit_code


@pytest.fixture
async def reaper() -> AsyncIterator[Reaper]:
    made = Reaper(asyncio.get_running_loop())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDWR)
    yield fd
    os.close(fd)


def _spawn(reaper: Reaper, null: int, script: str) -> tuple[int, asyncio.Future[int]]:
    return reaper.spawn(["/bin/sh", "-c", script], env={}, stdin=null, stdout=null, stderr=null)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 42", 42), ("kill -9 $$", 137), ("kill $$", 143)]
)
async def test_exit_codes_are_exact(reaper: Reaper, null: int, script: str, code: int) -> None:
    _, ended = _spawn(reaper, null, script)

    assert await asyncio.wait_for(ended, 10) == code


async def test_sigpipe_is_back_at_its_default(reaper: Reaper, null: int) -> None:
    # Python ignores SIGPIPE, and what is ignored would survive the exec.
    _, ended = _spawn(reaper, null, "kill -PIPE $$; exit 3")

    assert await asyncio.wait_for(ended, 10) == 128 + 13


async def test_a_process_that_died_before_it_was_asked_for(reaper: Reaper) -> None:
    since = reaper.mark()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reaper.reap()

    assert reaper.watch(pid, since).result() == 9


async def test_a_status_from_before_the_mark_is_another_process(reaper: Reaper) -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reaper.reap()

    assert not reaper.watch(pid, reaper.mark()).done()


async def test_unclaimed_statuses_are_bounded(reaper: Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNCLAIMED_MAX", 2)
    since = reaper.mark()
    pids = []
    for number in range(3):
        pids.append(os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {number}"], {}))
        os.waitid(os.P_PID, pids[-1], os.WEXITED | os.WNOWAIT)
        reaper.reap()

    assert [reaper.watch(pid, since).done() for pid in pids] == [False, True, True]


async def test_a_missing_program_is_an_os_error(reaper: Reaper, null: int) -> None:
    with pytest.raises(FileNotFoundError):
        reaper.spawn(["/nonexistent"], env={}, stdin=null, stdout=null, stderr=null)


def test_wait_statuses() -> None:
    assert exit_code(0x2A00) == 42
    assert exit_code(9) == 137
    assert exit_code(11 | 0x80) == 139
