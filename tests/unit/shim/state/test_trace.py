"""The recorder promises every phase with its times, at next to no cost, and never an error of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from shim.state import trace as trace_module
from shim.state.trace import KEEP, MAX_ENTRIES, Trace


def lines(path: Path, owner: str = "pod") -> list[dict[str, Any]]:
    """Those after the first, which says whose they are."""
    head, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    assert (head["trace"], head["sandbox"]) == (1, owner)
    return rest


def test_a_phase_is_a_line_with_monotonic_seconds(tmp_path: Path) -> None:
    trace = Trace("pod", str(tmp_path), archive_dir=str(tmp_path / "log"))
    before = monotonic()
    with trace.phase("vmm.boot"):
        middle = monotonic()
    trace.mark("rootfs", 1.25, 2.5, id="c1")
    after = monotonic()
    assert trace.flush()
    boot, rootfs = lines(tmp_path / "trace.jsonl")
    assert (boot["phase"], boot["id"]) == ("vmm.boot", "pod")
    micro = 1e-6  # times are rounded to microseconds
    assert before - micro <= boot["start"] <= middle + micro
    assert middle - micro <= boot["end"] <= after + micro
    assert rootfs == {"phase": "rootfs", "start": 1.25, "end": 2.5, "id": "c1"}


def test_a_phase_that_fails_is_recorded_and_its_error_goes_on(tmp_path: Path) -> None:
    trace = Trace("pod", str(tmp_path))
    with pytest.raises(TimeoutError), trace.phase("agent.connect", id="c1"):
        raise TimeoutError
    trace.flush()
    (line,) = lines(tmp_path / "trace.jsonl")
    assert (line["phase"], line["id"], line["error"]) == ("agent.connect", "c1", "TimeoutError")


@pytest.mark.parametrize(
    "line",
    [
        *(
            "5",
            "[]",
            '"x"',
            "null",
            "[" * 100_000,
            '{"id": "pod", "phase": [], "start": 0, "end": 1}',
            "\udcff",
        ),
        *(
            f'{{"id": "pod", "phase": "x", "start": 0, "end": {end}}}'
            for end in ('"1"', "NaN", "1e999", 10**400)
        ),
    ],
)
def test_a_file_that_somebody_spoilt(tmp_path: Path, line: str) -> None:
    """What was read before is right; nobody fails by the rest."""
    trace = Trace("pod", str(tmp_path))
    trace.mark("a", 0, 1)
    trace.flush()
    with open(tmp_path / "trace.jsonl", "a", errors="surrogateescape") as file:
        file.write(line + "\n")
    found = trace.durations()
    assert found.pop("a", 1.0) == 1.0
    assert all(seconds == 1.0 for seconds in found.values())


def test_flush_appends_and_writes_nothing_twice(tmp_path: Path) -> None:
    trace = Trace("pod", str(tmp_path))
    for name in ("a", "b"):
        trace.mark(name, 0, 1)
        assert trace.flush()
        assert trace.flush()
    assert [line["phase"] for line in lines(tmp_path / "trace.jsonl")] == ["a", "b"]


def test_close_moves_everything_to_the_archive(tmp_path: Path) -> None:
    state, archive = tmp_path / "state", tmp_path / "log" / "trace"
    state.mkdir()
    trace = Trace("pod", str(state), archive_dir=str(archive))
    trace.mark("a", 0, 1)
    trace.flush()
    trace.mark("b", 1, 2)
    assert trace.close()
    assert [line["phase"] for line in lines(archive / "pod.jsonl")] == ["a", "b"]
    assert list(state.iterdir()) == []
    assert [path.name for path in archive.iterdir()] == ["pod.jsonl"]
    assert archive.stat().st_mode & 0o777 == 0o700


def test_close_keeps_what_it_has_when_the_state_directory_is_gone(tmp_path: Path) -> None:
    trace = Trace("pod", str(tmp_path / "gone"), archive_dir=str(tmp_path))
    trace.mark("a", 0, 1)
    assert not trace.flush()
    assert trace.close()
    assert [line["phase"] for line in lines(tmp_path / "pod.jsonl")] == ["a"]


def test_nothing_recorded_leaves_nothing(tmp_path: Path) -> None:
    trace = Trace("pod", str(tmp_path), archive_dir=str(tmp_path / "log"))
    assert trace.flush()
    assert not trace.close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trace = Trace("pod", str(tmp_path), archive_dir=str(tmp_path / "file"))
    trace.mark("a", 0, 1)
    assert not trace.close()


def test_a_sandbox_id_cannot_lead_out_of_the_archive(tmp_path: Path) -> None:
    archive = tmp_path / "a" / "log"
    trace = Trace("../../evil", "", archive_dir=str(archive))
    trace.mark("a", 0, 1)
    assert trace.close()
    assert [path.name for path in archive.iterdir()] == ["evil.jsonl"]


def test_the_archive_keeps_the_newest(tmp_path: Path) -> None:
    for number in range(KEEP + 5):
        path = tmp_path / f"old{number}.jsonl"
        path.write_text("{}\n")
        os.utime(path, (number, number))
    (tmp_path / "other.txt").write_text("not ours")
    trace = Trace("new", "", archive_dir=str(tmp_path))
    trace.mark("a", 0, 1)
    assert trace.close()
    left = {path.name for path in tmp_path.glob("*.jsonl")}
    assert left == {"new.jsonl"} | {f"old{number}.jsonl" for number in range(6, KEEP + 5)}
    assert (tmp_path / "other.txt").exists()


def test_a_long_life_is_bounded(tmp_path: Path) -> None:
    trace = Trace("pod", str(tmp_path))
    for number in range(MAX_ENTRIES + 10):
        trace.mark("exec", number, number)
        if number % 1000 == 0:
            trace.flush()
    trace.flush()
    assert len(lines(tmp_path / "trace.jsonl")) == MAX_ENTRIES


def test_it_imports_next_to_nothing() -> None:
    script = (
        "import sys; before = set(sys.modules)\nimport shim.state.trace\n"
        "known = {'shim', 'shim.state', 'shim.state.trace', '__future__', 'types', '_types'}\n"
        "print(sorted(set(sys.modules) - before - known))"
    )
    root = Path(trace_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
