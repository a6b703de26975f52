"""`kata-ctl list` promises to tell a living sandbox from what a dead one left, without asking any shim."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ctl import sandboxes
from ctl.sandboxes import read_sandboxes
from shim.state import healthfile, procfs
from shim.state.journalfile import encode


def journal(directory: Path, name: str, processes: list[tuple[str, int, int]]) -> Path:
    path = directory / name
    path.mkdir(parents=True)
    lines: list[dict[str, object]] = [{"journal": 1, "sandbox": name}]
    for number, (process, pid, start) in enumerate(processes, 1):
        facts: dict[str, object] = {"name": process, "pid": pid, "start": start}
        lines.append({"op": "record", "n": number, "kind": "process", "facts": facts})
    (path / "journal").write_bytes(b"".join(encode(line) for line in lines))
    return path


def test_states(tmp_path: Path) -> None:
    pid, parent = os.getpid(), os.getppid()
    start = procfs.start_time(pid)
    daemon = ("virtiofsd", parent, procfs.start_time(parent))
    journal(tmp_path, "alive", [daemon, ("qemu", pid, start)])
    journal(tmp_path, "dead", [("qemu", pid, start + 1)])  # the pid was reused
    journal(tmp_path, "half", [daemon, ("qemu", pid, start + 1)])
    journal(tmp_path, "new", [])
    (tmp_path / "bare").mkdir()
    (journal(tmp_path, "broken", []) / "journal").write_text("nonsense\n")
    (tmp_path / "a-file").write_text("")
    share = tmp_path / "share"
    for folder in ("alive/rw/passthrough/c1/rootfs", "alive/rw/passthrough/a-volume"):
        (share / folder).mkdir(parents=True)
    state = tmp_path / "state"
    state.mkdir()
    for name in ("alive", "dead", "half", "new", "bare", "broken", "a-file"):
        (tmp_path / name).rename(state / name)
    found = {each.id: each for each in read_sandboxes(str(state), str(share))}
    assert {name: each.state for name, each in found.items()} == {
        "alive": "running",
        "dead": "dead",
        "half": "dead",
        "new": "starting",
        "bare": "starting",
        "broken": "damaged",
    }
    alive = found["alive"]
    assert alive.pid == pid
    assert alive.processes == (f"virtiofsd={parent}", f"qemu={pid}")
    assert alive.containers == ("c1",)
    assert alive.memory > 1024
    assert found["half"].processes == (f"virtiofsd={parent}",)
    assert found["half"].pid == 0


def test_the_table_and_the_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = os.getpid()
    journal(tmp_path, "pod", [("qemu", pid, procfs.start_time(pid))])
    assert sandboxes.run(state_dir=str(tmp_path), share_dir="/none") == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["SANDBOX", "STATE"]
    assert row.split()[:3] == ["pod", "running", str(pid)]
    sandboxes.run(as_json=True, state_dir=str(tmp_path), share_dir="/none")
    (each,) = json.loads(capsys.readouterr().out)
    assert (each["id"], each["state"], each["pid"]) == ("pod", "running", pid)


def test_a_guest_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown with the reason, without what a terminal would obey; of a dead VM it is no news."""
    pid = os.getpid()
    start = procfs.start_time(pid)
    for name, began in (("pod", start), ("gone", start + 1)):
        journal(tmp_path, name, [("qemu", pid, began)])
        healthfile.write(str(tmp_path / name), healthfile.Silence(12.5, "it said \x1b[2J\nnothing"))
    sandboxes.run(state_dir=str(tmp_path), share_dir="/none")
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1] for line in out.splitlines() if str(pid) in line or "dead" in line
    }
    assert rows == {"pod": "unresponsive", "gone": "dead"}
    assert "its guest does not answer, for " in out
    assert "it said  [2J nothing" in out
    sandboxes.run(as_json=True, state_dir=str(tmp_path), share_dir="/none")
    found = {each["id"]: each for each in json.loads(capsys.readouterr().out)}
    assert (found["pod"]["since"], found["pod"]["why"]) == (12.5, "it said \x1b[2J\nnothing")
    assert (found["gone"]["since"], found["gone"]["why"]) == (0, "")


def test_a_host_without_sandboxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sandboxes.run(state_dir=str(tmp_path / "none")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (119.9, "119s"), (120, "2m"), (7200, "2h"), (200000, "2d")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert sandboxes._age(seconds) == text
