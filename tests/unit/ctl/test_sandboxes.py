"""`kata-ctl list` promises to tell a living sandbox from what a dead one left, without asking any shim."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ctl import sandboxes
from ctl.sandboxes import read_sandboxes
from shim.state import healthfile, procfs
from shim.state.identity import Identity
from shim.state.journalfile import encode, header_of

CONTAINERD = "/run/containerd/containerd.sock"


def owner(name: str, namespace: str = "default", address: str = CONTAINERD) -> Identity:
    return Identity(address, namespace, name)


def journal(run: Path, who: Identity, processes: list[tuple[str, int, int]]) -> Path:
    """The state directory of such a sandbox."""
    path = run / who.key
    path.mkdir(parents=True)
    lines: list[dict[str, object]] = [header_of(who)]
    for number, (process, pid, start) in enumerate(processes, 1):
        facts: dict[str, object] = {"name": process, "pid": pid, "start": start}
        lines.append({"op": "record", "n": number, "kind": "process", "facts": facts})
    (path / "journal").write_bytes(b"".join(encode(line) for line in lines))
    return path


def test_states(tmp_path: Path) -> None:
    pid, parent = os.getpid(), os.getppid()
    start = procfs.start_time(pid)
    daemon = ("virtiofsd", parent, procfs.start_time(parent))
    run, share = tmp_path / "run", tmp_path / "share"
    journal(run, owner("alive"), [daemon, ("qemu", pid, start)])
    journal(run, owner("dead"), [("qemu", pid, start + 1)])  # the pid was reused
    journal(run, owner("half"), [daemon, ("qemu", pid, start + 1)])
    journal(run, owner("new"), [])
    with (journal(run, owner("broken"), [("qemu", pid, start)]) / "journal").open("a") as file:
        file.write("nonsense\n")
    (run / ("0" * 32)).mkdir()  # nothing says whose: it is known by its key
    (run / "firecracker").mkdir()  # the jails'
    (run / "a-file").write_text("")
    for folder in ("c1/rootfs", "a-volume"):
        (share / owner("alive").key / "rw/passthrough" / folder).mkdir(parents=True)

    found = {each.id: each for each in read_sandboxes(str(run), str(tmp_path / "none"), str(share))}

    assert {name: each.state for name, each in found.items()} == {
        "alive": "running",
        "dead": "dead",
        "half": "dead",
        "new": "starting",
        "0" * 32: "starting",
        "broken": "damaged",
    }
    alive = found["alive"]
    assert (alive.namespace, alive.containerd) == ("default", CONTAINERD)
    assert alive.directory == str(run / owner("alive").key)
    assert alive.pid == pid
    assert alive.processes == (f"virtiofsd={parent}", f"qemu={pid}")
    assert alive.containers == ("c1",)
    assert alive.memory > 1024
    assert found["half"].processes == (f"virtiofsd={parent}",)
    assert found["half"].pid == 0
    assert found["broken"].pid == pid  # what comes before the damage is known
    assert (found["0" * 32].namespace, found["0" * 32].containerd) == ("", "")


def test_sandboxes_of_older_shims_are_listed(tmp_path: Path) -> None:
    """Their directories are in Kata's place, where links to today's are no sandboxes of their own."""
    pid = os.getpid()
    run, kata = tmp_path / "run", tmp_path / "kata"
    new = journal(run, owner("new"), [])
    (kata / "old").mkdir(parents=True)
    (kata / "new").symlink_to(new)
    record = {"name": "qemu", "pid": pid, "start": procfs.start_time(pid)}
    lines = [{"journal": 1, "sandbox": "old"}, {"op": "record", "n": 1, "kind": "process", "facts": record}]
    (kata / "old/journal").write_bytes(b"".join(map(encode, lines)))

    found = read_sandboxes(str(run), str(kata), str(tmp_path))

    assert sorted((each.id, each.namespace, each.state) for each in found) == [
        ("new", "default", "starting"),
        ("old", "", "running"),
    ]


def test_the_table_and_the_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = os.getpid()
    journal(tmp_path, owner("pod"), [("qemu", pid, procfs.start_time(pid))])
    where: dict[str, Any] = {"run_dir": str(tmp_path), "kata_dir": "/none", "shared": "/none"}
    assert sandboxes.run(as_json=False, **where) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["SANDBOX", "STATE"]
    assert row.split()[:3] == ["default/pod", "running", str(pid)]
    sandboxes.run(as_json=True, **where)
    (each,) = json.loads(capsys.readouterr().out)
    assert (each["id"], each["state"], each["pid"]) == ("pod", "running", pid)
    assert (each["namespace"], each["containerd"]) == ("default", CONTAINERD)


def test_twins_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By namespace, and by containerd where that is not enough."""
    for who in (owner("twin"), owner("twin", "b"), owner("twin", "b", "/run/second.sock")):
        journal(tmp_path, who, [])
    sandboxes.run(run_dir=str(tmp_path), kata_dir="/none", shared="/none")
    out = capsys.readouterr().out
    assert sorted(line.partition("  ")[0] for line in out.splitlines()[1:]) == [
        "b/twin (/run/containerd/containerd.sock)",
        "b/twin (/run/second.sock)",
        "default/twin",
    ]


def test_a_guest_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown with the reason, without what a terminal would obey; of a dead VM it is no news."""
    pid = os.getpid()
    start = procfs.start_time(pid)
    for name, began in (("pod", start), ("gone", start + 1)):
        directory = journal(tmp_path, owner(name), [("qemu", pid, began)])
        healthfile.write(str(directory), healthfile.Silence(12.5, "it said \x1b[2J\nnothing"))
    where: dict[str, Any] = {"run_dir": str(tmp_path), "kata_dir": "/none", "shared": "/none"}
    sandboxes.run(**where)
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1] for line in out.splitlines() if str(pid) in line or "dead" in line
    }
    assert rows == {"default/pod": "unresponsive", "default/gone": "dead"}
    assert "its guest does not answer, for " in out
    assert "it said  nothing" in out
    sandboxes.run(as_json=True, **where)
    found = {each["id"]: each for each in json.loads(capsys.readouterr().out)}
    assert (found["pod"]["since"], found["pod"]["why"]) == (12.5, "it said \x1b[2J\nnothing")
    assert (found["gone"]["since"], found["gone"]["why"]) == (0, "")


def test_a_host_without_sandboxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sandboxes.run(run_dir=str(tmp_path / "none"), kata_dir="/none") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (119.9, "119s"), (120, "2m"), (7200, "2h"), (200000, "2d")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert sandboxes._age(seconds) == text


def test_a_vm_without_its_shim_is_orphaned(tmp_path: Path) -> None:
    """Wherever its shim stands in the journal; the process that holds the mounts is no VM."""
    own, start = os.getpid(), procfs.start_time(os.getpid())
    shim, vm, mounts = ("shim", own, start - 1), ("qemu", own, start), ("mounts", own, start)
    lives = ("shim", own, start)
    for name, processes in {
        "orphan": [shim, mounts, vm],
        "again": [mounts, vm, shim],
        "fine": [mounts, vm, lives],
        "dead": [shim, mounts],
    }.items():
        journal(tmp_path / "run", owner(name), processes)

    found = read_sandboxes(str(tmp_path / "run"), str(tmp_path / "kata"), str(tmp_path / "shared"))

    states = {each.id: each.state for each in found}
    assert states == {"orphan": "orphaned", "again": "orphaned", "fine": "running", "dead": "dead"}


def test_an_ended_task_is_not_taken_for_a_running_one(tmp_path: Path) -> None:
    """Its shim lives until it is deleted, and is no VMM."""
    shim = ("shim", os.getpid(), procfs.start_time(os.getpid()))
    vm: dict[str, object] = {"op": "record", "n": 2, "kind": "process", "facts": {"name": "qemu"}}
    share: dict[str, object] = {"op": "record", "n": 3, "kind": "dir", "facts": {"path": "/share"}}
    drops: list[dict[str, object]] = [{"op": "drop", "n": 2}, {"op": "drop", "n": 3}]
    for name, changes in {
        "before create": [],
        "asks QEMU for its version": [vm, share, drops[0]],
        "ended": [vm, share, *drops],
    }.items():
        path = journal(tmp_path / "run", owner(name), [shim])
        with (path / "journal").open("ab") as file:
            file.writelines(encode(change) for change in changes)

    found = read_sandboxes(str(tmp_path / "run"), str(tmp_path / "kata"), str(tmp_path / "shared"))

    assert {each.id: (each.state, each.pid) for each in found} == {
        "before create": ("starting", 0),
        "asks QEMU for its version": ("starting", 0),
        "ended": ("stopped", 0),
    }


def test_a_vm_on_another_machine_has_no_process_here(tmp_path: Path) -> None:
    pid = os.getpid()
    path = journal(tmp_path / "run", owner("far"), [("shim", pid, procfs.start_time(pid))])
    (one,) = read_sandboxes(str(tmp_path / "run"), str(tmp_path / "none"), str(tmp_path / "none"))
    assert one.state == "starting"
    facts: dict[str, object] = {"socket": "/run/peerpod/hypervisor.sock", "vm": path.name}
    with (path / "journal").open("ab") as file:
        file.write(encode({"op": "record", "n": 2, "kind": "remote-vm", "facts": facts}))
    (one,) = read_sandboxes(str(tmp_path / "run"), str(tmp_path / "none"), str(tmp_path / "none"))
    assert (one.state, one.pid) == ("running", 0)
