"""What was acquired is on disk before it is used, is undone in reverse, and is never misread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.errors import HostError
from shim.state import journalfile
from shim.state.journal import Journal
from shim.state.journalfile import JournalError, encode, load, parse
from shim.state.procfs import start_time


def _create(tmp_path: Path) -> Journal:
    return Journal.create(str(tmp_path / "s1"), "s1")


def test_record_is_on_disk_at_once(tmp_path: Path) -> None:
    """A reader sees each change as soon as the call returned."""
    journal = _create(tmp_path)

    entry = journal.record("process", name="qemu")
    assert [(r.kind, r.facts) for r in load(journal.directory)] == [("process", {"name": "qemu"})]

    journal.update(entry, pid=7, start=9)
    assert load(journal.directory)[0].facts == {"name": "qemu", "pid": 7, "start": 9}

    journal.forget(entry)
    assert load(journal.directory) == []
    journal.remove()


def test_private(tmp_path: Path) -> None:
    """The state directory is 0700 and the journal 0600."""
    os.umask(0o022)
    journal = _create(tmp_path)

    assert os.stat(journal.directory).st_mode & 0o777 == 0o700
    assert os.stat(journalfile.journal_path(journal.directory)).st_mode & 0o777 == 0o600
    journal.remove()


async def test_release_all_in_reverse_past_errors(tmp_path: Path) -> None:
    """One release that fails does not keep the others; it stays on disk for `delete`."""
    journal = _create(tmp_path)
    order: list[str] = []

    async def second() -> None:
        order.append("second")
        raise OSError("stuck")

    journal.record("file", lambda: order.append("first"), path="/nonexistent/1")
    journal.record("mount", second, path="/nonexistent/2")
    journal.record("file", lambda: order.append("third"), path="/nonexistent/3")

    errors = await journal.release_all()

    assert order == ["third", "second", "first"]
    assert [str(error) for error in errors] == ["stuck"]
    assert [record.kind for record in load(journal.directory)] == ["mount"]
    assert journal.entries == ()


async def test_release_runs_once(tmp_path: Path) -> None:
    """Releasing twice, or after forgetting, does nothing."""
    journal = _create(tmp_path)
    count: list[int] = []
    entry = journal.record("file", lambda: count.append(1), path="/x")

    await journal.release(entry)
    await journal.release(entry)
    forgotten = journal.record("file", lambda: count.append(1), path="/y")
    journal.forget(forgotten)
    await journal.release(forgotten)

    assert count == [1]
    assert load(journal.directory) == []


async def test_default_releases(tmp_path: Path) -> None:
    """Without a function of its own a record is undone by its kind: sockets, files, directories."""
    journal = _create(tmp_path)
    victim = tmp_path / "f"
    victim.write_text("")
    tree = tmp_path / "d" / "e"
    tree.mkdir(parents=True)
    (tree / "x").write_text("")
    journal.record("socket", path=str(victim))
    journal.record("dir", path=str(tmp_path / "d"))
    journal.record("file", path=str(tmp_path / "never existed"))

    assert await journal.release_all() == []
    assert not victim.exists()
    assert not (tmp_path / "d").exists()


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that live until killed."""
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


async def test_default_release_of_a_process(tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    """A process is killed if pid and start time match, and only then."""
    journal = _create(tmp_path)
    innocent, ours = sleepers
    journal.record("process", name="other", pid=innocent.pid, start=start_time(innocent.pid) + 1)
    journal.record("process", name="sleep", pid=ours.pid, start=start_time(ours.pid))

    assert await journal.release_all() == []
    assert ours.wait(5) == -9
    assert innocent.poll() is None


_LOGGER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"asked "))
os.write(1, b".")
sys.stdin.buffer.read()
time.sleep({pause})
os.write(1, b"written down")
"""


@pytest.mark.parametrize(
    ("pause", "said", "status"), [(0.2, b"written down", 0), (100, b"asked ", -signal.SIGKILL)]
)
async def test_default_release_of_a_logger(tmp_path: Path, pause: float, said: bytes, status: int) -> None:
    """Its pipes ended with the shim: it may write down the last of them, and is not waited for for ever."""
    journal = _create(tmp_path)
    program = [sys.executable, "-ISc", _LOGGER.format(pause=pause)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as logger:
        assert logger.stdin is not None
        assert logger.stdout is not None
        journal.record("logger", name="l", pid=logger.pid, start=start_time(logger.pid), container="c")
        assert logger.stdout.read(1) == b".", "it is ready to be asked"
        logger.stdin.close()
        assert await journal.release_all() == []
        assert logger.wait(5) == status
        assert logger.stdout.read() == said


async def test_a_logger_that_never_ran_is_none(tmp_path: Path) -> None:
    journal = _create(tmp_path)
    journal.record("logger", name="the logger", container="c")
    assert await journal.release_all() == []


def test_second_shim_is_refused(tmp_path: Path) -> None:
    """A journal that still records something belongs to somebody."""
    journal = _create(tmp_path)
    journal.record("file", path="/x")

    with pytest.raises(HostError, match="delete action"):
        _create(tmp_path)


def test_rest_of_clean_shim_is_no_obstacle(tmp_path: Path) -> None:
    """A journal with nothing left in it is written anew."""
    journal = _create(tmp_path)
    journal.forget(journal.record("file", path="/x"))

    assert _create(tmp_path).record("file", path="/y")


def test_other_version_is_refused(tmp_path: Path) -> None:
    """The text says which version it is and which one is known."""
    directory = tmp_path / "s1"
    directory.mkdir()
    (directory / "journal").write_bytes(encode({"journal": 2, "sandbox": "s1"}))

    with pytest.raises(JournalError, match=r"version 2 .* knows version 1"):
        load(str(directory))
    with pytest.raises(HostError, match="version 2"):
        _create(tmp_path)


def test_full_file_system_spoils_nothing(tmp_path: Path) -> None:
    """When a line cannot be written whole, the caller hears it and the file still loads."""
    script = """
import resource, signal, sys
sys.path[:0] = [{repo!r}]
from devices.errors import HostError
from shim.state.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal.create({directory!r}, "s1")
journal.record("file", path="/first")
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    journal.record("file", path="/" + "x" * 300)
except HostError as error:
    print(error)
journal.record("file", path="/z")
"""
    directory = str(tmp_path / "s1")
    code = script.format(repo=str(Path(__file__).parents[4]), directory=directory)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert "cannot write the journal" in result.stdout, result.stderr
    assert [record.facts["path"] for record in load(directory)] == ["/first", "/z"]


# A history of changes as the journal writes it.
_facts = st.dictionaries(
    st.sampled_from(["path", "pid", "start", "name"]),
    st.one_of(st.integers(0, 2**40), st.text(max_size=8)),
    max_size=3,
)


@st.composite
def _histories(draw: st.DrawFn) -> list[dict[str, object]]:
    history: list[dict[str, object]] = [{"journal": 1, "sandbox": "s"}]
    live: list[int] = []
    last = 0
    for _ in range(draw(st.integers(0, 12))):
        op = draw(st.sampled_from(["record", "update", "drop"]))
        if op == "record" or not live:
            last += 1
            live.append(last)
            history.append({"op": "record", "n": last, "kind": "process", "facts": draw(_facts)})
        elif op == "update":
            history.append({"op": "update", "n": draw(st.sampled_from(live)), "facts": draw(_facts)})
        else:
            number = draw(st.sampled_from(live))
            live.remove(number)
            history.append({"op": "drop", "n": number})
    return history


def _replay(history: list[dict[str, object]]) -> dict[int, dict[str, object]]:
    state: dict[int, dict[str, object]] = {}
    for change in history[1:]:
        number = change["n"]
        assert isinstance(number, int)
        facts = change.get("facts", {})
        assert isinstance(facts, dict)
        if change["op"] == "drop":
            del state[number]
        else:
            state.setdefault(number, {}).update(facts)
    return state


@given(_histories(), st.data())
def test_any_prefix_loads_as_what_was_acknowledged(
    history: list[dict[str, object]], data: st.DataObject
) -> None:
    """Cut off at any byte, the file yields the state after some whole number of changes, no half pid."""
    lines = [encode(change) for change in history]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))

    records = parse(whole[:cut])

    complete = 0  # changes that are there but for the newline at most
    while complete < len(lines) and len(b"".join(lines[: complete + 1])) - 1 <= cut:
        complete += 1
    assert {record.number: record.facts for record in records} == (
        _replay(history[:complete]) if complete else {}
    )


@given(_histories(), st.data())
def test_damage_is_refused_or_harmless(history: list[dict[str, object]], data: st.DataObject) -> None:
    """With a line replaced by noise the journal is refused; it never invents a record."""
    lines = [encode(change) for change in history]
    index = data.draw(st.integers(0, len(lines) - 1))
    lines[index] = data.draw(st.binary(max_size=30)).replace(b"\n", b"") + b"\n"
    known = [change.get("facts", {}) for change in history]
    try:
        records = parse(b"".join(lines))
    except JournalError:
        return

    for record in records:
        for key, value in record.facts.items():
            assert any(isinstance(facts, dict) and facts.get(key) == value for facts in known)


@pytest.mark.parametrize(
    "line",
    [
        {"op": "record", "n": 1, "kind": "process", "facts": {"pid": [1]}},
        {"op": "record", "n": "1", "kind": "process"},
        {"op": "record", "n": 1},
        {"op": "update", "n": 5, "facts": {}},
        {"op": "drop", "n": True},
        {"op": "explode", "n": 1},
    ],
)
def test_malformed_changes(line: dict[str, object]) -> None:
    """Each line must be exactly one of the three changes."""
    data = encode({"journal": 1, "sandbox": "s"}) + encode(line) + encode(line)

    with pytest.raises(JournalError, match="journal:2"):
        parse(data)


def test_lines_are_json_objects() -> None:
    """The format is what the module says, so that people can read it."""
    assert json.loads(encode({"op": "drop", "n": 3})) == {"op": "drop", "n": 3}
