"""`delete` with a journal that is damaged or very long: in time, without a guess, again until it is done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.mounts import bind, mounts_below, set_propagation
from proto import task_v2_pb2
from shim.state.journal import Journal
from shim.state.journalfile import encode, header_of, load
from tests.unit.shim.shims import Bundle, Shims, shims_fixture
from ttrpc import Client

_TASK = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]


@pytest.fixture
def shims() -> Iterator[Shims]:
    yield from shims_fixture()


async def _create(bundle: Bundle) -> int:
    request = task_v2_pb2.CreateTaskRequest(id=bundle.id, bundle=str(bundle.path), stdin="helper")
    async with await Client.connect_unix(str(bundle.socket), timeout=5) as client:
        response = await client.stub(_TASK, default_timeout=20).create(request)
    assert isinstance(response, task_v2_pb2.CreateTaskResponse)
    return response.pid


def _damage(journal: Path, line: int) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[line - 1] = b'{"op": "rec\0rd"}\n'
    journal.write_bytes(b"".join(lines))


@pytest.mark.parametrize("dead", [True, False])
async def test_damage_costs_what_comes_after_it(shims: Shims, dead: bool) -> None:
    """What was recorded before it is undone, processes of the sandbox end, recorded or not; what may still be
    held is told each time, and the evidence stays until a person removes it. Then the id works again."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    helper = await _create(bundle)
    directory = shims.state_dir(bundle)
    marked = subprocess.Popen(
        ["sleep", "1000"], env={**shims.env, "KATA_SHIM_CHILD": f"{shims.identity(bundle).key}.1"}
    )
    known = [record.kind for record in load(str(directory)).records]
    assert known == ["process", "socket", "link", "dir", "mount", "process"]
    if dead:
        os.kill(bundle.pid, signal.SIGKILL)
        assert shims.wait_gone(bundle.pid)
    _damage(directory / "journal", 7)  # the helper's
    damaged = (directory / "journal").read_bytes()

    for _ in range(2):
        result = shims.delete(bundle)
        assert result.returncode == 1
        assert b"journal is damaged" in result.stderr
        assert f"then remove {directory}".encode() in result.stderr
        assert load(str(directory)).records == []
        assert (directory / "journal.damaged").read_bytes() == damaged
        assert sorted(path.name for path in directory.iterdir()) == ["journal", "journal.damaged"]
    assert marked.wait(5) == -9
    assert bundle.pid not in shims.processes()
    assert not bundle.socket.exists()
    assert shims.processes() == [helper]  # without a mark, and its record lost: nobody could know it
    os.kill(helper, signal.SIGKILL)

    refused = shims.start(bundle)
    assert refused.returncode == 0
    with pytest.raises(Exception, match="is damaged"):
        await _create(bundle)
    assert shims.delete(bundle).returncode == 1
    shutil.rmtree(directory)
    shims.start(bundle)
    await _create(bundle)
    assert shims.delete(bundle).returncode == 0


async def test_a_daemon_without_a_readable_journal_is_found(shims: Shims) -> None:
    """Its first line is damaged: who owns the state directory is told by the lock, and ended."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    await _create(bundle)
    pid = bundle.pid
    _damage(shims.state_dir(bundle) / "journal", 1)
    (bundle.path / "shim.pid").unlink()

    result = shims.delete(bundle)

    assert result.returncode == 1
    assert pid not in shims.processes()
    assert b"does not say whose journal it is" in result.stderr
    for left in shims.processes():
        os.kill(left, signal.SIGKILL)
        assert shims.wait_gone(left)
    shutil.rmtree(shims.state_dir(bundle))


def _many(shims: Shims, bundle: Bundle, count: int) -> Path:
    """A journal of so many mounts, as the writer writes it, and the directories that they are on."""
    directory = shims.state_dir(bundle)
    directory.mkdir(parents=True)
    share = shims.share_dir(bundle) / "rw/passthrough"
    share.mkdir(parents=True)
    journal = Journal.create(str(directory), shims.identity(bundle), str(bundle.path))
    journal.record("process", name="shim", pid=1 << 22, start=1)
    for number in range(count):
        target = share / f"volume{number}"
        target.mkdir()
        journal.record("dir", path=str(target))
        journal.record("mount", path=str(target))
    journal.close()
    return share


def test_ten_thousand_records_in_time(shims: Shims) -> None:
    """Within containerd's five seconds everything is undone, a thousand mounts that are there among it."""
    bundle = shims.bundle("c1")
    share = _many(shims, bundle, 5000)
    source = shims.root / "source"
    source.mkdir()
    (source / "data").write_text("precious")
    bind(str(share.parent), str(share.parent), recursive=False)  # as the share is
    set_propagation(str(share.parent), "rprivate")
    for number in range(0, 5000, 5):
        bind(str(source), str(share / f"volume{number}"))
    assert len(mounts_below(str(shims.root))) == 1001

    started = time.monotonic()
    result = shims.delete(bundle)
    took = time.monotonic() - started

    assert (result.returncode, result.stderr) == (0, b"")
    assert took < 5
    assert mounts_below(str(shims.root)) == []
    assert (source / "data").read_text() == "precious"
    assert shims.leftovers() == []


async def test_a_history_of_64_mib_in_time(shims: Shims) -> None:
    """A pod whose containers came and went for a month: what `delete` reads is what is held now."""
    bundle = shims.bundle("c1")
    directory = shims.state_dir(bundle)
    directory.mkdir(parents=True)
    journal = Journal.create(str(directory), shims.identity(bundle))
    journal.record("process", name="shim", pid=1 << 22, start=1)
    line = len(encode({"op": "record", "n": 100000, "kind": "mount", "facts": {"path": "/x" * 1000}}))
    for _ in range((64 << 20) // line // 10):
        entries = [journal.record("mount", path="/x" * 1000) for _ in range(10)]
        for entry in entries:
            journal.forget(entry)
    journal.close()
    assert (directory / "journal").stat().st_size < 1 << 20

    started = time.monotonic()
    assert shims.delete(bundle).returncode == 0
    assert time.monotonic() - started < 5


def test_what_the_time_does_not_suffice_for_is_left_to_the_next(shims: Shims) -> None:
    """Each `delete` ends in time and goes on where the last one stopped; what is done is not done twice, and
    the last one answers success."""
    bundle = shims.bundle("c1")
    directory = shims.state_dir(bundle)
    directory.mkdir(parents=True)
    log = shims.root / "log"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"sleep 1; echo done >> {log}"]}
    spec = {"ociVersion": "1.0.2", "hooks": {"poststop": [hook]}}
    (bundle.path / "config.json").write_text(json.dumps(spec))
    facts = {"container": "c1", "bundle": str(bundle.path)}
    changes = [{"op": "record", "n": n, "kind": "poststop", "facts": facts} for n in range(1, 7)]
    lines = [encode(header_of(shims.identity(bundle))), *map(encode, changes)]
    (directory / "journal").write_bytes(b"".join(lines))

    left = []
    while directory.exists():
        result = shims.delete(bundle, timeout=30)  # it gives itself 4.5 s, on a machine that has time
        left.append(len(load(str(directory)).records))
        assert result.returncode == (1 if left[-1] else 0)
        assert (b"the next delete goes on" in result.stderr) is (left[-1] > 0)
        assert len(left) < 7
    assert len(left) > 1
    assert left == sorted(set(left), reverse=True)
    assert log.read_text().count("done") == 6
    assert shims.leftovers() == []
