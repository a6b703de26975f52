"""What was acquired is on disk before it is used, undone in reverse, never misread; damage costs what comes
later."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.errors import HostError
from devices.syscalls import mount
from shim.state import journalfile
from shim.state.identity import Identity
from shim.state.journal import Journal
from shim.state.journalfile import (
    JournalError,
    Record,
    encode,
    header_of,
    load,
    parse,
    read_identity,
    rewrite,
)
from shim.state.procfs import start_time
from shim.state.releases import ReleaseError, release
from tests.unit.shim.namespaces import in_mount_namespace

S1 = Identity("/run/containerd/containerd.sock", "default", "s1")
KINDS_OF_PATHS = ("file", "socket", "dir", "mount", "cgroup")
HEADER = header_of(S1, "/bundle")


@pytest.fixture
def ram() -> Iterator[Path]:
    """A directory where the journal lies in life: on a tmpfs, where fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def _create(tmp_path: Path) -> Journal:
    directory = tmp_path / "s1"
    directory.mkdir(mode=0o700, exist_ok=True)
    return Journal.create(str(directory), S1, "/bundle")


def _paths(directory: str) -> list[object]:
    return [record.facts.get("path") for record in load(directory).records]


def test_record_is_on_disk_at_once(tmp_path: Path) -> None:
    """A reader sees each change as soon as the call returned."""
    journal = _create(tmp_path)

    entry = journal.record("process", name="qemu")
    assert [(r.kind, r.facts) for r in load(journal.directory).records] == [("process", {"name": "qemu"})]

    journal.update(entry, pid=7, start=9)
    assert load(journal.directory).records[0].facts == {"name": "qemu", "pid": 7, "start": 9}

    journal.forget(entry)
    assert load(journal.directory).records == []
    journal.close()


def test_the_first_line_says_whose_it_is(tmp_path: Path) -> None:
    """Containerd's address, namespace, id and bundle: for whoever finds the file, and by that line alone."""
    journal = _create(tmp_path)
    journal.record("file", path="/x")

    history = load(journal.directory)
    assert (history.version, history.identity, history.bundle) == (2, S1, "/bundle")
    assert read_identity(journal.directory) == (2, S1)
    with open(journalfile.journal_path(journal.directory), "ab") as file:
        file.write(b"noise\n")
    assert read_identity(journal.directory) == (2, S1)
    assert read_identity(str(tmp_path)) == (0, None)
    journal.close()


def test_private(ram: Path) -> None:
    """The journal is 0600, and after it was written anew as well."""
    os.umask(0o022)
    journal = _create(ram)

    assert os.stat(journalfile.journal_path(journal.directory)).st_mode & 0o777 == 0o600
    for _ in range(4000):
        journal.forget(journal.record("file", path="/x"))
    assert os.stat(journalfile.journal_path(journal.directory)).st_mode & 0o777 == 0o600
    journal.close()


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
    assert [record.kind for record in load(journal.directory).records] == ["mount"]
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
    assert load(journal.directory).records == []


async def test_what_failed_is_tried_once_more_in_the_end(tmp_path: Path) -> None:
    """A release that fails leaves its record; the last one takes it away, or says that it is still there."""
    journal = _create(tmp_path)
    order: list[str] = []

    def fails(name: str, times: int) -> Callable[[], None]:
        tries = iter(range(times))

        def release() -> None:
            if next(tries, None) is not None:
                raise OSError("busy")
            order.append(name)

        return release

    once = journal.record("file", fails("once", 1), path="/nonexistent/1")
    journal.record("file", fails("never", 0), path="/nonexistent/2")
    always = journal.record("file", fails("always", 9), path="/nonexistent/3")
    for entry in (once, always):
        with pytest.raises(OSError, match="busy"):
            await journal.release(entry)
    assert len(load(journal.directory).records) == 3

    errors = await journal.release_all()

    assert [str(error) for error in errors] == ["busy"]
    assert order == ["never", "once"]
    assert _paths(journal.directory) == ["/nonexistent/3"]
    journal.close()


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


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        *((kind, {"path": path}) for kind in KINDS_OF_PATHS for path in ("/a\0b", "/a\ud800")),
        *(("process", {"pid": 1 << bits, "start": 1}) for bits in (31, 63, 64, 4000)),
    ],
)
def test_facts_that_no_kernel_has(kind: str, facts: dict[str, str | int]) -> None:
    """A disk that loses bits must not end `delete` before it has looked at the other records."""
    try:
        release(Record(1, kind, facts))
    except (ReleaseError, OSError) as error:
        assert "\0" not in str(error)


async def test_a_logger_that_never_ran_is_none(tmp_path: Path) -> None:
    journal = _create(tmp_path)
    journal.record("logger", name="the logger", container="c")
    assert await journal.release_all() == []


def test_second_shim_is_refused(tmp_path: Path) -> None:
    """A journal that still records something belongs to somebody."""
    journal = _create(tmp_path)
    journal.record("file", path="/x")

    with pytest.raises(
        HostError, match=r"-namespace default -address /run/.*sock -id s1 delete` tries again"
    ):
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
    (directory / "journal").write_bytes(encode({**HEADER, "journal": 3}))

    with pytest.raises(JournalError, match=r"version 3 .* knows version 2"):
        load(str(directory))
    with pytest.raises(HostError, match="version 3"):
        _create(tmp_path)
    assert read_identity(str(directory)) == (0, None)


def test_version_1_does_not_say_whose_it_is(tmp_path: Path) -> None:
    """But the socket that it recorded first does, also when that is released by now."""
    lines = [
        {"journal": 1, "sandbox": "s1"},
        {"op": "record", "n": 1, "kind": "socket", "facts": {"path": "/run/containerd/s/abc"}},
        {"op": "record", "n": 2, "kind": "socket", "facts": {"path": "/other"}},
        {"op": "drop", "n": 1},
    ]
    history = parse(b"".join(map(encode, lines)))

    assert (history.version, history.identity, history.socket) == (1, None, "/run/containerd/s/abc")
    assert [record.number for record in history.records] == [2]
    assert history.damage == ""


def test_changes_from_threads_and_the_loop_are_one_history(ram: Path) -> None:
    """Containers made at the same time record from threads and from the loop: each gets a number of its own,
    and nothing that was recorded is lost or comes back."""
    journal = _create(ram)
    kept: list[str] = []
    begin = threading.Barrier(9)

    def work(name: int) -> None:
        begin.wait(10)
        for count in range(300):
            entry = journal.record("mount", path=f"/{name}/{count}")
            journal.update(entry, more=count)
            if count % 3:
                journal.forget(entry)
            else:
                kept.append(f"/{name}/{count}")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    work(8)
    for thread in threads:
        thread.join(60)

    history = load(journal.directory)
    assert history.damage == ""
    assert sorted(str(record.facts["path"]) for record in history.records) == sorted(kept)
    numbers = [record.number for record in history.records]
    assert numbers == sorted(set(numbers))
    assert len(journal.entries) == len(kept)
    journal.close()


def test_a_long_history_stays_small(ram: Path) -> None:
    """Restarts of a container with 1,000 mounts in a pod that goes on: the file has what is held.

    (117 of them reached the 64 MiB at which a journal was refused as a whole.)
    """
    journal = _create(ram)
    daemon = journal.record("process", name="shim", pid=7, start=9)
    path = journalfile.journal_path(journal.directory)
    largest = written = 0
    for restart in range(25):
        entries = [journal.record("mount", path=f"/share/{restart}/{n}/a-volume") for n in range(1000)]
        largest = max(largest, os.stat(path).st_size)
        for entry in reversed(entries):
            journal.forget(entry)
        written += 1000 * 120

    assert written > 2 << 20
    assert largest < 1 << 20
    assert os.stat(path).st_size < 512 << 10
    (left,) = load(journal.directory).records
    assert left.facts == {"name": "shim", "pid": 7, "start": 9}
    journal.update(daemon, more=1)
    assert load(journal.directory).records[0].facts["more"] == 1
    assert sorted(os.listdir(journal.directory)) == ["journal"]
    journal.close()


@given(st.lists(st.tuples(st.sampled_from(["record", "update", "forget"]), st.integers(0, 9)), max_size=60))
def test_the_file_is_what_is_held_whenever_it_was_written_anew(steps: list[tuple[str, int]]) -> None:
    """Whichever change a rewrite falls into."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr("shim.state.journal._SLACK", 40)
        journal = _create(Path(directory))
        for number, (step, which) in enumerate(steps):
            entries = journal.entries
            if step == "record" or not entries:
                journal.record("file", path=f"/{number}")
            elif step == "update":
                journal.update(entries[which % len(entries)], more=number)
            else:
                journal.forget(entries[which % len(entries)])
            history = load(journal.directory)
            assert history.damage == ""
            assert [each.facts for each in history.records] == [entry.facts for entry in journal.entries]
        journal.close()


async def test_what_could_not_be_released_outlives_a_rewrite(ram: Path) -> None:
    """It is in no list of this shim's any more, but in the file for `delete`."""

    def stuck() -> None:
        raise OSError("stuck")

    journal = _create(ram)
    with pytest.raises(OSError, match="stuck"):
        await journal.release(journal.record("mount", stuck, path="/stuck"))
    for _ in range(3000):
        journal.forget(journal.record("file", path="/x"))

    assert os.stat(journalfile.journal_path(journal.directory)).st_size < 200 << 10
    assert _paths(journal.directory) == ["/stuck"]
    journal.close()


def test_there_is_a_limit(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than `delete` could read in time is refused, and what there is stays as it is."""
    monkeypatch.setattr("shim.state.journal._MAX_LIVE", 1000)
    journal = _create(ram)
    with pytest.raises(HostError, match="things already") as caught:
        for number in range(100):
            journal.record("file", path=f"/{number}")

    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert len(_paths(journal.directory)) == len(journal.entries) > 5
    journal.forget(journal.entries[0])
    journal.record("file", path="/fits")
    journal.close()


def test_full_file_system_spoils_nothing(tmp_path: Path) -> None:
    """When a line cannot be written whole, the caller hears it, and the file still reads: on a file system
    that is full indeed, line by line and when it is written anew."""

    def body() -> None:
        mount("tmpfs", str(tmp_path), "tmpfs", 0, "size=32k,mode=0700")
        journal = _create(tmp_path)
        with pytest.raises(HostError, match=r"cannot write the journal in .*: No space left") as caught:
            for number in range(1000):
                journal.record("file", path=f"/{number}" + "x" * 200)
        assert "make room" in str(caught.value)
        assert len(journal.entries) > 50
        with contextlib.suppress(HostError):
            journal.update(journal.entries[0], pid=1)
        with contextlib.suppress(HostError):
            journal.record("file", path="/short")  # may fit by now
        history = load(journal.directory)
        assert history.damage == ""
        entries = journal.entries
        assert [record.facts for record in history.records] == [entry.facts for entry in entries]
        for entry in entries[:50]:
            journal.forget(entry)  # what is gone may be told late, but is never an error
        (tmp_path / "more").unlink(missing_ok=True)
        mount("tmpfs", str(tmp_path), "tmpfs", 0x20, "size=64k")  # remounted: there is room again
        journal.record("file", path="/after")
        expected = [str(entry.facts["path"]) for entry in journal.entries]
        assert _paths(journal.directory) == expected
        assert len(expected) == len(entries) - 50 + 1
        journal.close()

    in_mount_namespace(body)


@pytest.mark.parametrize("step", ["write", "short", "fsync"])
def test_an_error_of_the_disk_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """EIO at any system call of a change, or a part written: it did not happen, and the next one does."""
    journal = _create(tmp_path)
    entry = journal.record("file", path="/first")
    real: dict[str, Callable[..., int | None]] = {"write": os.write, "fsync": os.fsync}

    def fails(fd: int, *data: bytes) -> int:
        if step == "short":
            return int(real["write"](fd, data[0][:5]) or 0)
        if step == "fsync":
            real["fsync"](fd)
        raise OSError(errno.EIO, "Input/output error")

    def broken(call: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write" if step == "short" else step, fails)
            with pytest.raises(HostError, match="cannot write the journal"):
                call()
        assert load(journal.directory).damage == ""

    broken(lambda: journal.record("file", path="/second"))
    broken(lambda: journal.update(entry, pid=1))
    assert entry.facts == {"path": "/first"}
    assert [record.facts for record in load(journal.directory).records] == [{"path": "/first"}]

    journal.record("file", path="/third")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write" if step == "short" else step, fails)
        journal.forget(entry)
    journal.record("file", path="/fourth")
    assert _paths(journal.directory) == ["/third", "/fourth"]
    journal.close()


def test_an_end_that_cannot_be_mended_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line that cannot be taken back costs nothing that comes later."""
    journal = _create(tmp_path)
    journal.record("file", path="/first")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:9]))
        patch.setattr(os, "ftruncate", lambda *_: exec("raise OSError(5, 'EIO')"))
        with pytest.raises(HostError):
            journal.record("file", path="/second")

    assert _paths(journal.directory) == ["/first"]
    journal.record("file", path="/third")
    history = load(journal.directory)
    assert (history.damage, _paths(journal.directory)) == ("", ["/first", "/third"])
    journal.close()


def test_a_rewrite_that_fails_leaves_the_old_file(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of it fails, the journal is there, whole, and written on."""
    for step in ("open", "write", "fsync", "rename"):
        journal = _create(ram)
        kept = journal.record("file", path="/kept")
        real = getattr(os, step)

        def fails(*arguments: object, real: Callable[..., int] = real, **more: object) -> int:
            if ".new" in str(arguments[0]) or (
                isinstance(arguments[0], int) and ".new" in os.readlink(f"/proc/self/fd/{arguments[0]}")
            ):
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, step, fails)
            for _ in range(4000):
                journal.forget(journal.record("file", path="/x" * 20))
            assert os.stat(journalfile.journal_path(journal.directory)).st_size > 200 << 10
        assert _paths(journal.directory) == ["/kept"]
        for _ in range(4000):
            journal.forget(journal.record("file", path="/x" * 20))
        assert os.stat(journalfile.journal_path(journal.directory)).st_size < 400 << 10
        assert os.listdir(journal.directory) == ["journal"]
        journal.forget(kept)
        journal.close()


# A history of changes as the journal writes it.
_facts = st.dictionaries(
    st.sampled_from(["path", "pid", "start", "name"]),
    st.one_of(st.integers(0, 2**40), st.text(max_size=8)),
    max_size=3,
)


@st.composite
def _histories(draw: st.DrawFn) -> list[dict[str, object]]:
    history: list[dict[str, object]] = [draw(st.sampled_from([HEADER, {"journal": 1, "sandbox": "s1"}]))]
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

    found = parse(whole[:cut])

    complete = 0  # changes that are there but for the newline at most
    while complete < len(lines) and len(b"".join(lines[: complete + 1])) - 1 <= cut:
        complete += 1
    assert found.damage == ""
    assert {record.number: record.facts for record in found.records} == (
        _replay(history[:complete]) if complete else {}
    )


@given(_histories(), st.data())
def test_damage_costs_what_comes_after_it(history: list[dict[str, object]], data: st.DataObject) -> None:
    """With a line replaced by noise, or a byte by another, everything before it is read, and nothing of what
    comes after is taken for true; only noise that happens to be a change is none."""
    lines = [encode(change) for change in history]
    index = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        lines[index] = data.draw(st.binary(max_size=30)).replace(b"\n", b"") + b"\n"
    else:
        at = data.draw(st.integers(0, len(lines[index]) - 2))
        lines[index] = lines[index][:at] + bytes([data.draw(st.integers(128, 255))]) + lines[index][at + 1 :]

    found = parse(b"".join(lines))

    before = _replay(history[:index]) if index else {}
    assert found.damage
    assert f":{index + 1}:" in found.damage
    assert {record.number: record.facts for record in found.records} == before


def test_what_is_damaged_is_kept_beside_the_journal(tmp_path: Path) -> None:
    """Written anew without what is released, it goes on saying that something may be missing."""
    directory = str(tmp_path)
    record = {"op": "record", "kind": "file", "facts": {"path": "/x"}}
    text = [encode(HEADER), encode({**record, "n": 1}), b"noise\n", encode({**record, "n": 2})]
    Path(directory, "journal").write_bytes(b"".join(text))
    history = load(directory)
    assert [each.number for each in history.records] == [1]
    assert "journal:3" in history.damage

    os.close(rewrite(directory, history.header, [], keep=True))
    again = load(directory)
    assert (again.identity, again.records) == (S1, [])
    assert "journal.damaged" in again.damage
    assert Path(directory, "journal.damaged").read_bytes() == b"".join(text)
    with pytest.raises(HostError, match=r"is damaged: .*try: see what it records"):
        Journal.create(directory, S1)

    Path(directory, "journal").unlink()  # a crash between the two steps
    assert [each.number for each in load(directory).records] == [1]


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
    good = {"op": "record", "n": 1, "kind": "file", "facts": {}}
    history = parse(encode(HEADER) + encode(good) + encode(line) + encode({**good, "n": 2}))

    assert "journal:3" in history.damage
    assert [record.number for record in history.records] == [1]


@pytest.mark.parametrize(
    "header",
    [{"journal": True}, {"journal": "2"}, {"journal": 2, "sandbox": "s"}, {**HEADER, "namespace": 7}, {}],
)
def test_a_first_line_must_say_whose(header: dict[str, object]) -> None:
    """Else nothing of the file is believed."""
    history = parse(encode(header) + encode({"op": "record", "n": 1, "kind": "file", "facts": {}}))

    assert "journal:1" in history.damage
    assert (history.records, history.identity) == ([], None)
    assert (history.version, history.header) == (0, {}), "it is not written anew either"


def test_what_is_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what comes before it is."""
    change = encode({"op": "record", "n": 1, "kind": "file", "facts": {}})
    (tmp_path / "journal").write_bytes(encode(HEADER) + change + b" " * 500)
    monkeypatch.setattr(journalfile, "MAX_SIZE", len(encode(HEADER) + change) + 20)

    history = load(str(tmp_path))
    assert "more than" in history.damage
    assert len(history.records) == 1


def test_lines_are_json_objects() -> None:
    """The format is what the module says, so that people can read it."""
    assert json.loads(encode({"op": "drop", "n": 3})) == {"op": "drop", "n": 3}
