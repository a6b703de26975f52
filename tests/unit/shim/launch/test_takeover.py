"""Which sandboxes can be recovered, and why the others cannot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.launch.flags import parse
from shim.launch.takeover import Unrecoverable, argv_of, judge, recover
from shim.state import identity as places
from shim.state import recoveryfile
from shim.state.identity import Identity
from shim.state.journal import Journal
from shim.state.journalfile import Record, encode, load
from shim.state.procfs import start_time
from shim.state.statedir import StateDir
from tests.unit.shim.saved import saved


class Left:
    """What a dead shim has left of the sandbox c1."""

    def __init__(self, root: Path) -> None:
        self.identity = Identity("/c.sock", "ns", "c1")
        self.bundle = root / "bundle"
        self.bundle.mkdir()
        os.makedirs(self.identity.state_dir)
        self.journal = Journal.create(self.identity.state_dir, self.identity, str(self.bundle))
        self.journal.record("process", name="shim", pid=os.getpid(), start=1)  # another one's, by now
        self.journal.record("socket", path="/run/s", inode=1, made=1)
        self.holder = self.journal.record(
            "process", name="mounts", pid=os.getpid(), start=start_time(os.getpid())
        )

    def write(self, **daemon: Any) -> None:
        recoveryfile.write(self.identity.state_dir, saved(**daemon))

    def refused(self) -> Unrecoverable:
        with pytest.raises(Unrecoverable) as caught:
            judge(self.identity)
        return caught.value


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Left]:
    monkeypatch.setattr(places, "RUN_DIR", str(tmp_path / "run"))
    made = Left(tmp_path)
    yield made
    made.journal.close()


def test_one_that_can_be(left: Left) -> None:
    """Its shim is dead, its VM lives, and a process has its mounts."""
    left.write()

    plight = judge(left.identity)

    assert (plight.bundle, plight.holder) == (str(left.bundle), os.getpid())
    flags = parse(argv_of(plight)[1:])
    assert (flags.action, flags.id, flags.namespace) == ("recover", "c1", "ns")
    assert (flags.address, flags.bundle) == ("/c.sock", str(left.bundle))


def test_nothing_there(left: Left) -> None:
    with pytest.raises(Unrecoverable, match="there is no sandbox ns/c2"):
        judge(Identity("/c.sock", "ns", "c2"))


def test_one_that_was_not_kept(left: Left) -> None:
    assert "its VM was not kept" in str(left.refused())


def test_a_shim_that_lives(left: Left) -> None:
    """By the journal, or, before there is one, by the directory's lock."""
    left.write()
    home = StateDir.make(left.identity.state_dir, 0)
    assert left.refused().lives
    home.close()
    left.journal.record("process", name="shim", pid=os.getpid(), start=start_time(os.getpid()))
    assert left.refused().lives


@pytest.mark.parametrize(
    ("daemon", "says"),
    [
        ({"pid": 1 << 22}, "its VM is dead"),
        ({"mounts": 1}, "no process holds the mounts"),
        ({"program": ()}, "does not say which program"),
        ({"program": ("python", "shim")}, "does not say which program"),
        ({"program": ("/usr/bin/python3", "/nowhere/shim")}, "/nowhere/shim is not there any more"),
    ],
)
def test_what_is_missing_is_said(left: Left, daemon: dict[str, Any], says: str) -> None:
    if "pid" in daemon:
        left.write()
        path = Path(left.identity.state_dir, "recovery.json")
        whole = json.loads(path.read_text())
        whole["sandbox"]["vm"]["pid"] = daemon["pid"]
        path.write_text(json.dumps(whole))
    else:
        left.write(**daemon)

    assert says in str(left.refused())


def test_a_bundle_that_is_gone(left: Left) -> None:
    left.write()
    left.bundle.rmdir()

    assert "its bundle" in str(left.refused())


def test_a_file_that_is_damaged(left: Left) -> None:
    left.write()
    Path(left.identity.state_dir, "recovery.json").write_text("{")

    assert "is no JSON" in str(left.refused())


def test_a_journal_that_is_damaged(left: Left) -> None:
    """What is held is not known as a whole: nobody can take it over, and `delete` says so too."""
    left.write()
    with open(f"{left.identity.state_dir}/journal", "ab") as file:
        file.write(b"garbage\n" + encode({"op": "drop", "n": 1}))

    assert "its journal is damaged" in str(left.refused())


def test_recover_says_what_judge_says(left: Left) -> None:
    flags = parse(["-namespace", "ns", "-address", "/c.sock", "-id", "c1", "recover"])

    with pytest.raises(Unrecoverable, match="was not kept"):
        recover(flags, "c1", lambda _: -1, lambda _: None)


async def test_the_journal_is_taken_over(left: Left) -> None:
    """All but the dead daemon's own entries, which can be released, under numbers that stay theirs."""
    left.journal.record("dir", path="/some/where")
    left.journal.close()
    released: list[Record] = []

    journal = Journal.adopt(left.identity.state_dir, left.identity, released.append)

    kept = [(entry.kind, entry.facts.get("name")) for entry in journal.entries]
    assert kept == [("process", "mounts"), ("dir", None)]
    journal.record("process", name="shim", pid=1, start=1)
    await journal.release(journal.entries[1])
    assert [record.facts for record in released] == [{"path": "/some/where"}]
    found = load(left.identity.state_dir)
    assert [record.facts.get("name") for record in found.records] == ["mounts", "shim"]
    assert found.bundle == str(left.bundle)
    assert len({record.number for record in found.records}) == 2
    journal.close()
