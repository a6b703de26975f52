"""What VMMs and guests say reaches the log within a budget for each; what does not is counted and told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from devices import lines
from devices.child import Child
from devices.confine import Confinement
from devices.lines import BURST, LENGTH, Budget, LineLog
from devices.undo import MemoryUndo
from hypervisors.qemu.prepare import log_output
from shim.state import logs
from tests.unit.turns import LIMIT, turns


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Path]:
    """The shim's own log, written to a file."""
    before = structlog.get_config()
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    pipe = logs.configure(str(tmp_path), debug=True)
    file = os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, pipe._fd)
    os.close(file)
    yield tmp_path / "written"
    os.close(pipe._fd)
    os.close(reader)
    structlog.configure(**before)


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def settle() -> None:
    for _ in range(2 * BURST):
        await asyncio.sleep(0)


async def test_lines_pass_whole_and_without_the_empty_ones() -> None:
    said: list[str] = []
    log = LineLog("qemu", said.append)
    for piece in (b"one\n\n  \ntw", b"o\r\nth", b"r\xc3", b"\xa9e\n", b"the end"):
        log.write(piece)
    await settle()
    assert said == ["one", "two", "thr\N{LATIN SMALL LETTER E WITH ACUTE}e"]
    log.write(b"")
    await settle()
    assert said[3:] == ["the end"]


async def test_long_lines_are_cut_however_they_come() -> None:
    said: list[str] = []
    log = LineLog("qemu", said.append)
    for _ in range(1000):
        log.write(b"x" * 65536)
    log.write(b"\n" + b"y" * 65536 + b"\n")
    await settle()
    assert said == ["x" * LENGTH, "y" * LENGTH]


async def test_what_exceeds_the_budget_is_counted_and_told_once(logged: Path) -> None:
    said: list[str] = []
    log = LineLog("qemu", said.append)
    for _ in range(8):
        log.write(b"a\n" * 32768)
    log.write(b"")
    await settle()
    assert BURST <= len(said) <= BURST + 20
    left_out = [event for event in events(logged) if "left out" in str(event["msg"])]
    assert [event["source"] for event in left_out] == ["qemu"]
    assert left_out[0]["msg"] == f"{8 * 32768 - len(said)} lines left out"


async def test_a_flood_is_told_while_it_goes_on(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_TELL", 0.05)
    budget = Budget("qemu", "events")
    assert budget.take(BURST + 7) == BURST
    assert budget.take() == 0
    async with asyncio.timeout(10):
        while not logged.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert events(logged)[0]["msg"] == "8 events left out"


async def test_a_quiet_source_gets_its_budget_back(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget("qemu")
    budget.take(BURST)
    loop = asyncio.get_running_loop()
    later = loop.time() + 10
    monkeypatch.setattr(loop, "time", lambda: later)
    assert 150 <= budget.take(BURST) <= 200
    later += 1e6
    assert budget.take(2 * BURST) == BURST
    budget.tell()


async def test_a_flood_of_short_lines_holds_nobody_up(logged: Path) -> None:
    """32,768 of them come in one read; these are 40 reads, by a real child."""
    script = "import sys\nfor _ in range(40): sys.stderr.write('e\\n' * 32768)"
    async with turns() as longest:
        child = await Child.spawn(
            [sys.executable, "-ISc", script],
            name="flood",
            undo=MemoryUndo(),
            confinement=Confinement(view=None, own_pids=False),
            on_output=log_output("flood"),
        )
        assert await child.wait(60) == 0
        await settle()
    assert longest.seconds < LIMIT
    said = events(logged)
    assert BURST <= sum(event["msg"] == "stderr" for event in said) < BURST + 1000
    assert any("left out" in str(event["msg"]) for event in said)
