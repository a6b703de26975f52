"""A sandbox has a user of its own, no two have the same, and it is free again when its processes are gone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from devices import users
from devices.child import process_start_time
from devices.errors import HostError
from devices.undo import MemoryUndo
from devices.users import give_back, parse_range, processes_of, take

SIX = range(2000000300, 2000000306)
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="to run as another user needs root")


def owned(directory: Path) -> set[int]:
    return {int(path.name) for path in directory.iterdir() if path.name.isdecimal()}


async def test_no_two_have_the_same_and_they_are_given_back(tmp_path: Path) -> None:
    undo = MemoryUndo()
    taken = [take(undo, SIX, directory=str(tmp_path)) for _ in SIX]

    assert {user.id for user in taken} == set(SIX) == owned(tmp_path)
    assert [entry.kind for entry in undo.entries] == ["user"] * 6
    with pytest.raises(HostError, match="all 6 numbers of rootless_users are taken") as caught:
        take(undo, SIX, directory=str(tmp_path))
    assert "rootless = false" in caught.value.hint
    await undo.release(taken[2].entry)
    assert take(undo, SIX, directory=str(tmp_path)).id == taken[2].id
    assert await undo.release_all() == []
    assert owned(tmp_path) == set()


def test_many_takers_at_once_get_different_ones(tmp_path: Path) -> None:
    script = (
        "from devices.undo import MemoryUndo; from devices.users import take\n"
        "numbers = range(2000000300, 2000000350)\n"
        f"for _ in range(10): print(take(MemoryUndo(), numbers, directory={str(tmp_path)!r}).id)"
    )
    takers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(4)]
    found = [int(word) for taker in takers for word in taker.communicate(timeout=60)[0].split()]

    assert len(found) == len(set(found)) == 40


def test_what_is_another_ones_is_not_given_back(tmp_path: Path) -> None:
    """A record that was released twice, or is of a shim long gone: the number has a new owner."""
    undo = MemoryUndo()
    facts = dict(take(undo, SIX[:1], directory=str(tmp_path)).entry.facts)
    give_back(facts)
    give_back(facts)
    again = take(undo, SIX[:1], directory=str(tmp_path))
    give_back(facts)

    assert owned(tmp_path) == {again.id}


def test_a_number_whose_owner_is_gone_is_found_when_all_are_taken(tmp_path: Path) -> None:
    """A shim that was killed, whose `delete` never came; one of which only an empty file is left."""
    own = f"{os.getpid()} {process_start_time(os.getpid())} abc"
    marks = [own, f"{os.getpid()} 1 abc", "", own, own, own]
    for number, mark in zip(SIX, marks, strict=True):
        (tmp_path / str(number)).write_text(mark)

    assert {take(MemoryUndo(), SIX, directory=str(tmp_path)).id for _ in range(2)} == {SIX[1], SIX[2]}
    with pytest.raises(HostError, match="are taken"):
        take(MemoryUndo(), SIX, directory=str(tmp_path))


@ROOT
def test_it_is_free_when_none_of_its_processes_lives(tmp_path: Path) -> None:
    """What still runs as this user is ended, whoever knows of it; another user's is not touched."""
    facts = dict(take(MemoryUndo(), SIX[:1], directory=str(tmp_path)).entry.facts)
    left, other = (subprocess.Popen(["sleep", "100"], user=number) for number in (SIX[0], SIX[1]))
    try:
        assert processes_of(SIX[0]) == [left.pid]
        give_back(facts)
        assert owned(tmp_path) == set()
        assert left.wait(10) == -9
        assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


@ROOT
def test_it_stays_taken_while_one_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dict(take(MemoryUndo(), SIX[:1], directory=str(tmp_path)).entry.facts)
    monkeypatch.setattr(users, "processes_of", lambda _: [1 << 22])
    with pytest.raises(OSError, match="did not end"):
        give_back(facts, 0.02)

    assert owned(tmp_path) == {SIX[0]}


async def test_a_lock_that_is_not_let_go_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_LOCK_TIMEOUT", 0.02)
    why = "no user for the sandbox: Resource temporarily unavailable"
    with users._locked(str(tmp_path)), pytest.raises(HostError, match=why):
        await asyncio.to_thread(take, MemoryUndo(), SIX, directory=str(tmp_path))
    assert take(MemoryUndo(), SIX, directory=str(tmp_path)).id in SIX


@pytest.mark.parametrize(
    "text", ["", "5", "5-", "a-b", "10-5", "0-5", "999-2000", "1000-2147483648", "-5-6", "1000-2000-3000"]
)
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"range|FIRST-LAST"):
        parse_range(text)


def test_the_range_as_shipped() -> None:
    assert len(parse_range(users.RANGE)) == 65536
