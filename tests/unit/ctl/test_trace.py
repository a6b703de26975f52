"""`kata-ctl trace` promises the phases of one start with their milliseconds, whatever else the file holds."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from ctl import chart, trace
from ctl.chart import draw_svg, draw_text
from ctl.trace import Phase, choose, find_runs, read_phases, stretches
from ctl.which import Which, which
from devices.errors import CallerError
from shim.state.identity import Identity
from shim.state.journalfile import encode, header_of


def line(phase: str, start: float, end: float, id_: str = "pod", **more: str) -> str:
    return json.dumps({"phase": phase, "start": start, "end": end, "id": id_, **more})


START = [line("vmm.start", 10.0, 10.25), line("vmm.boot", 10.25, 12.0), line("rootfs", 10.1, 10.2, "c1")]
LATER = [line("exec", 60.0, 60.5, "c1"), line("vmm.stop", 60.6, 60.7)]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def write(path: Path, lines: list[str], written: int = 1000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    os.utime(path, (written, written))
    return str(path)


# --- reading


def test_phases_are_sorted_by_start_and_bad_lines_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        [
            *START,
            "",
            "[]",
            '{"phase": 1}',
            '{"phase": "x", "start": "never", "end": 1, "id": ""}',
            '{"cut of',
        ],
    )
    phases, bad = read_phases(path)
    assert [phase.name for phase in phases] == ["vmm.start", "rootfs", "vmm.boot"]
    assert phases[1] == Phase(10.1, 10.2, "rootfs", "c1")
    assert bad == 5


def test_times_that_are_no_times_are_bad_lines(tmp_path: Path) -> None:
    """json reads NaN and Infinity, and neither can be drawn."""
    path = write(
        tmp_path / "t.jsonl",
        [
            '{"phase": "x", "start": NaN, "end": 1, "id": ""}',
            '{"phase": "x", "start": 0, "end": Infinity, "id": ""}',
            f'{{"phase": "x", "start": 0, "end": {10**400}, "id": ""}}',
            "[" * 100_000,
        ],
    )
    assert read_phases(path) == ([], 4)


def test_an_idle_second_ends_the_start() -> None:
    def phase(start: float, end: float) -> Phase:
        return Phase(start, end, "p", "pod")

    parts = stretches([phase(0, 5), phase(1, 2), phase(5.9, 6), phase(7.1, 8)])
    assert [[each.start for each in part] for part in parts] == [[0, 1, 5.9], [7.1]]
    assert stretches([]) == []


# --- which run


def head(sandbox: str, namespace: str = "default", containerd: str = "/c.sock") -> str:
    return json.dumps({"trace": 1, "sandbox": sandbox, "namespace": namespace, "containerd": containerd})


def live(run: Path, sandbox: str, written: int) -> None:
    """A running sandbox with a trace."""
    who = Identity("/c.sock", "default", sandbox)
    write(run / who.key / "trace.jsonl", [head(sandbox), *START], written)
    (run / who.key / "journal").write_bytes(encode(header_of(who)))


def test_runs_are_found_among_the_living_and_the_kept_newest_first(state: Path, archive: Path) -> None:
    live(state, "pod2", 300)
    (state / ("1" * 32)).mkdir()  # without a trace
    write(archive / ("2" * 32 + ".jsonl"), [head("pod1", "b"), *START], 100)
    write(archive / "pod3.jsonl", START, 200)  # of an older shim, which named them by the id
    write(archive / ".pod4.jsonl.7", START, 900)
    runs = find_runs(str(state), "/none", str(archive))
    assert [(run.id, run.namespace, run.alive) for run in runs] == [
        ("pod2", "default", True),
        ("pod3", "", False),
        ("pod1", "b", False),
    ]
    assert read_phases(runs[0].path)[1] == 0  # the first line is none of the bad ones
    assert find_runs(str(state / "none"), "/none", str(archive / "none")) == []


def test_a_run_is_named_by_its_id_or_the_beginning_of_one_or_a_file(state: Path, archive: Path) -> None:
    for name, written in (("abc", 100), ("abd", 200), ("ab", 50)):
        write(archive / f"{name}.jsonl", [head(name), *START], written)
    runs = find_runs(str(state), "/none", str(archive))
    assert choose(runs, Which()).id == "abd"
    assert choose(runs, which("ab")).id == "ab"  # exactly, though it begins others
    assert choose(runs, which("default/abc")).id == "abc"
    assert choose(runs, Which(), str(archive / "abc.jsonl")).id == "abc"
    with pytest.raises(CallerError, match=r"'a' begins several runs: default/\w+, default/\w+, default/\w+"):
        choose(runs, which("a"))
    with pytest.raises(CallerError, match="no trace of 'x'"):
        choose(runs, which("x"))
    with pytest.raises(CallerError, match="no trace of 'other/abc'"):
        choose(runs, which("abc", "other"))
    with pytest.raises(CallerError, match="no trace in"):
        choose([], Which())


def test_of_twins_one_must_be_named(state: Path, archive: Path) -> None:
    """Two sandboxes with one id: the newest is not guessed, but the namespace tells, or the containerd."""
    write(archive / "1.jsonl", [head("twin", "a"), *START], 100)
    write(archive / "2.jsonl", [head("twin", "b"), *START], 200)
    write(archive / "3.jsonl", [head("twin", "b", "/d.sock"), *START], 300)
    runs = find_runs(str(state), "/none", str(archive))
    text = r"several runs: b/twin \(/d.sock\), b/twin \(/c.sock\), a/twin; try: name one as NAMESPACE/ID"
    with pytest.raises(CallerError, match=text):
        choose(runs, which("twin"))
    with pytest.raises(CallerError, match="several runs"):
        choose(runs, which("b/twin"))
    assert choose(runs, which("a/twin")).path.endswith("1.jsonl")
    assert choose(runs, which("twin", "a")).path.endswith("1.jsonl")
    assert choose(runs, which("b/twin", "", "unix:///d.sock")).path.endswith("3.jsonl")
    assert choose(runs, which(None, "b")).path.endswith("3.jsonl")
    with pytest.raises(CallerError, match="not of the namespace a"):
        which("b/twin", "a")


# --- printing


def test_only_the_start_is_printed_unless_all_is_wanted(
    state: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(archive / "pod.jsonl", [*START, *LATER])
    where: dict[str, Any] = {"run_dir": str(state), "kata_dir": "/none", "archive_dir": str(archive)}
    assert trace.run(Which(), **where) == 0
    out = capsys.readouterr().out
    assert out.startswith("pod: 2000 ms to start, written ")
    assert re.search(r"^vmm.boot pod\s+250\.0\s+1750\.0 ", out, re.MULTILINE)
    assert re.search(r"^rootfs c1\s+100\.0\s+100\.0 ", out, re.MULTILINE)
    assert "exec" not in out
    assert "2 more phases came later (--all shows them)" in out
    trace.run(Which(), everything=True, **where)
    out = capsys.readouterr().out
    assert "pod: 700 ms, 50.0 s after the start" in out
    assert re.search(r"^exec c1\s+0\.0\s+500\.0 ", out, re.MULTILINE)


def test_the_list_tells_what_there_is(state: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(archive / "kept.jsonl", [*START, *LATER], 100)
    write(archive / "empty.jsonl", [], 50)
    live(state, "lives", 200)
    where: dict[str, Any] = {"run_dir": str(state), "kata_dir": "/none", "archive_dir": str(archive)}
    assert trace.run(Which(), listing=True, **where) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[3], row[4]) for row in rows[1:]] == [
        ("default/lives", "running", "2000"),
        ("?/kept", "ended", "2000"),
        ("?/empty", "ended", "-"),
    ]


def test_bad_lines_are_told_and_an_empty_file_is_an_error(
    state: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(archive / "pod.jsonl", [START[0], "{"])
    where: dict[str, Any] = {"run_dir": str(state), "kata_dir": "/none", "archive_dir": str(archive)}
    trace.run(which("pod"), **where)
    assert capsys.readouterr().err == f"kata-ctl: 1 lines of {path} could not be read\n"
    write(archive / "pod.jsonl", [])
    with pytest.raises(CallerError, match="has no phase in it"):
        trace.run(which("pod"), **where)


def test_svg_goes_to_its_file(state: Path, archive: Path, tmp_path: Path) -> None:
    write(archive / "pod.jsonl", [*START, *LATER])
    target = tmp_path / "chart.svg"
    where: dict[str, Any] = {"run_dir": str(state), "kata_dir": "/none", "archive_dir": str(archive)}
    trace.run(Which(), svg=str(target), **where)
    assert "vmm.boot" in target.read_text()
    assert "exec" not in target.read_text()
    with pytest.raises(CallerError, match="No such file"):
        trace.run(Which(), svg="/no/such/dir/x.svg", **where)


# --- drawing

BARS = [
    Phase(0.0, 0.1, "first", "pod"),
    Phase(0.1, 0.9, "long", "pod"),
    Phase(0.9, 0.9, "instant", "pod"),
    Phase(0.9, 1.0, "broken", "pod", "GuestError"),
]


def test_bars_stand_where_the_phases_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "_blocks", lambda: ("#", "|"))
    lines = draw_text("title", BARS, width=54)
    assert lines[0] == "title"
    room = 54 - len("instant") - len("  9999999.9  9999999.9  ")
    at = [row[54 - room :] for row in lines[2:]]
    assert at[0] == "##"
    assert at[1] == "  " + "#" * 18
    assert at[2] == " " * 20 + "|"
    assert at[3] == " " * 20 + "## GuestError"
    assert max(len(row) for row in lines[:5]) <= 54


def test_a_single_instant_can_be_drawn() -> None:
    lines = draw_text("t", [Phase(5.0, 5.0, "x", "pod")], width=60)
    assert len(lines) == 3
    ET.fromstring(draw_svg("t", [Phase(5.0, 5.0, "x", "pod")]))


def test_text_from_a_file_cannot_reach_the_terminal() -> None:
    lines = draw_text("t\x1b[2J", [Phase(0, 1, "x\x1b[31m\n" + "y" * 100, "pod")], width=80)
    assert all(each.isprintable() for each in lines)
    assert len(lines[2]) <= 80


def test_svg_is_well_formed_and_bars_are_to_scale() -> None:
    root = ET.fromstring(draw_svg('a <b> & "c"', [*BARS, Phase(0, 1, "<&>", "pod", "<x>")]))
    space = "{http://www.w3.org/2000/svg}"
    title = root.find(f"{space}title")
    assert title is not None
    assert title.text == 'a <b> & "c"'
    bars = [rect for rect in root.iter(f"{space}rect") if rect.get("rx")]
    widths = [float(rect.attrib["width"]) for rect in bars]
    assert widths[1] == pytest.approx(8 * widths[0], rel=0.01)
    assert widths[2] > 0
    assert float(bars[1].attrib["x"]) == pytest.approx(float(bars[0].attrib["x"]) + widths[0], abs=0.2)
    assert bars[3].get("fill") != bars[1].get("fill")


@pytest.mark.parametrize("span", [0.01, 1, 3, 49, 50, 999, 12345.6])
def test_an_axis_has_four_to_ten_round_ticks(span: float) -> None:
    tick = chart._tick(span)
    assert 4 <= span / tick <= 10 + 1e-9
    assert re.fullmatch(r"[125]0*|0\.0*[125]", f"{tick:.10f}".rstrip("0").rstrip("."))
