"""Hooks of the spec run on the host: in order, with the state, in bounded time; what failed is told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devices.errors import CallerError, HostError
from devices.undo import MemoryUndo
from shim.hooks.hook_process import Hook, read_hooks, run, state_json
from shim.hooks.hooks import HostHooks
from shim.launch.undo_kinds import release
from shim.spec.documents import checked
from shim.state.journalfile import Record
from shim.state.releases import ReleaseError

Make = Callable[..., HostHooks]


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


@pytest.fixture
def undo() -> MemoryUndo:
    return MemoryUndo()


@pytest.fixture
def hooks(tmp_path: Path, undo: MemoryUndo) -> Make:
    def make(**stages: list[dict[str, Any]]) -> HostHooks:
        spec = {"ociVersion": "1.1.0", "annotations": {"a": "b"}, "hooks": stages}
        return HostHooks("c1", str(tmp_path), spec, pid=os.getpid(), undo=undo, mounts=None)

    return make


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


async def test_stages_run_in_order_in_the_bundle(hooks: Make, tmp_path: Path) -> None:
    def note(word: str) -> dict[str, Any]:
        return sh(f"echo {word} >> log")

    made = hooks(
        createContainer=[note("4")],
        poststop=[note("6"), note("7")],
        prestart=[note("1")],
        poststart=[note("5")],
        createRuntime=[note("2"), note("3")],
    )
    await made.before_create()
    assert lines(tmp_path / "log") == ["1", "2", "3", "4"]
    await made.after_start()
    await made.after_delete()
    await made.after_delete()
    assert lines(tmp_path / "log") == ["1", "2", "3", "4", "5", "6", "7"], "poststop runs once"


async def test_the_state_comes_on_stdin(hooks: Make, tmp_path: Path) -> None:
    made = hooks(
        createRuntime=[sh("cat > creating")], poststart=[sh("cat > running")], poststop=[sh("cat > stopped")]
    )
    await made.before_create()
    await made.after_start()
    await made.after_delete()

    states = {name: json.loads((tmp_path / name).read_text()) for name in ("creating", "running", "stopped")}
    for name, state in states.items():
        assert state["status"] == name
        assert (state["ociVersion"], state["id"], state["bundle"]) == ("1.1.0", "c1", str(tmp_path))
        assert state["annotations"] == {"a": "b"}
    assert states["creating"]["pid"] == states["running"]["pid"] == os.getpid()
    assert "pid" not in states["stopped"]


async def test_arguments_and_environment_are_the_hooks(
    hooks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_SHIM", "1")
    script = "tr '\\0' '\\n' < /proc/$$/cmdline > args; env > env; umask > umask"
    await hooks(
        prestart=[{"path": "/bin/sh", "args": ["a name", "-c", script, "", "x y"], "env": ["A=b=c"]}],
        createRuntime=[sh("env > inherited")],
    ).before_create()

    assert lines(tmp_path / "args") == ["a name", "-c", script, "", "x y"]
    assert "A=b=c" in lines(tmp_path / "env")
    assert "OF_THE_SHIM=1" not in lines(tmp_path / "env")
    assert "OF_THE_SHIM=1" in lines(tmp_path / "inherited")
    assert lines(tmp_path / "umask") == ["0022"]


async def test_a_failed_hook_ends_the_creation_and_poststop_follows(
    hooks: Make, tmp_path: Path, undo: MemoryUndo
) -> None:
    made = hooks(
        createRuntime=[sh("echo first > log; echo no such bridge >&2; exit 3"), sh("echo second >> log")],
        poststop=[sh("echo stop >> log")],
    )
    with pytest.raises(HostError) as caught:
        await made.before_create()
    await made.after_delete()

    text = str(caught.value)
    assert "createRuntime hook /bin/sh exited with code 3" in text
    assert "no such bridge" in text
    assert lines(tmp_path / "log") == ["first", "stop"]
    assert undo.entries == []


async def test_without_a_hook_before_it_poststop_is_not_owed(hooks: Make, tmp_path: Path) -> None:
    made = hooks(poststop=[sh("echo stop >> log")])
    await made.after_delete()

    assert lines(tmp_path / "log") == [], "the container never came to be"


async def test_a_hook_that_is_not_there_is_named(hooks: Make) -> None:
    with pytest.raises(HostError, match="prestart hook /no/such/hook cannot be run"):
        await hooks(prestart=[{"path": "/no/such/hook"}]).before_create()


async def test_poststart_and_poststop_go_on_past_failures(hooks: Make, tmp_path: Path) -> None:
    made = hooks(
        poststart=[sh("exit 1"), sh("echo start >> log")], poststop=[sh("exit 1"), sh("echo stop >> log")]
    )
    await made.before_create()
    await made.after_start()
    await made.after_delete()

    assert lines(tmp_path / "log") == ["start", "stop"]


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def test_a_late_hook_is_killed_with_its_children(hooks: Make, tmp_path: Path) -> None:
    script = "sleep 1000 & echo $! > child; echo waiting for the moon; wait"
    with pytest.raises(HostError) as caught:
        await hooks(createRuntime=[sh(script, timeout=1)]).before_create()

    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert "did not end within 1 s" in str(caught.value)
    assert "waiting for the moon" in str(caught.value)
    child = int(lines(tmp_path / "child")[0])
    await _until(lambda: _gone(child))


async def test_a_hook_whose_caller_is_gone_is_killed(hooks: Make, tmp_path: Path, undo: MemoryUndo) -> None:
    made = hooks(createRuntime=[sh("echo $$ > pid.new; mv pid.new pid; exec sleep 1000")])
    task = asyncio.create_task(made.before_create())
    await _until((tmp_path / "pid").exists)
    (entry,) = undo.entries
    assert entry.kind == "process"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert _gone(int(lines(tmp_path / "pid")[0]))
    assert undo.entries == []


def test_endless_output_is_bounded_and_not_waited_for(tmp_path: Path) -> None:
    def hook(script: str) -> Hook:
        return Hook("/bin/sh", ("sh", "-c", script), None, 60)

    with pytest.raises(HostError) as caught:
        run(hook("head -c 20000000 /dev/zero | tr '\\0' x; echo; echo the end; exit 1"), b"", cwd="/")
    assert "the end" in str(caught.value)
    assert len(str(caught.value)) < 3000

    begin = time.monotonic()
    run(hook(f"sleep 1000 & echo $! > {tmp_path}/pid"), b"", cwd="/")
    pid = int(lines(tmp_path / "pid")[0])
    assert time.monotonic() - begin < 30, "a background process holds the pipe, and nobody waits for it"
    assert not _gone(pid), "it is the hook's to leave"
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "document",
    [
        {"hooks": [1]},
        {"hooks": {"prestart": {"path": "/x"}}},
        {"hooks": {"prestart": [1]}},
        {"hooks": {"createRuntime": [{"path": "relative"}]}},
        {"hooks": {"createRuntime": [{}]}},
        {"hooks": {"poststop": [{"path": "/x", "args": "a"}]}},
        {"hooks": {"poststop": [{"path": "/x", "args": ["a\0b"]}]}},
        {"hooks": {"poststart": [{"path": "/x", "env": [1]}]}},
        {"hooks": {"startContainer": [{"path": "/x", "timeout": 0}]}},
        {"hooks": {"startContainer": [{"path": "/x", "timeout": True}]}},
        {"hooks": {"prestart": [{"path": "/x", "timeout": 10**18}]}},
        {"hooks": {"prestart": [{"path": "/x"}] * 100}},
    ],
)
def test_malformed_hooks_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(CallerError) as caught:
        read_hooks(checked(document, "config.json"))

    assert "hooks" in str(caught.value)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_delete_runs_what_a_dead_shim_owes(tmp_path: Path) -> None:
    spec = {"hooks": {"poststop": [sh("cat >> log"), sh("echo >> log; exit 1"), sh("echo last >> log")]}}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    record = Record(1, "poststop", {"container": "c1", "bundle": str(tmp_path)})
    with pytest.raises(ReleaseError, match="exited with code 1"):
        release(record, 30)

    log = lines(tmp_path / "log")
    assert json.loads(log[0])["status"] == "stopped"
    assert log[-1] == "last"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"hooks": 3}'])
def test_delete_says_when_it_cannot_read_them(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ReleaseError, match="c1"):
        release(Record(1, "poststop", {"container": "c1", "bundle": str(tmp_path)}), 5)


def test_the_state_of_a_spec_without_a_version_or_annotations() -> None:
    state = json.loads(state_json({}, "c", "/b", "creating", 7))
    assert state == {
        "ociVersion": "1.0.2",
        "id": "c",
        "status": "creating",
        "bundle": "/b",
        "annotations": {},
        "pid": 7,
    }
