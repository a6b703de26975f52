"""OCI hooks run on the host with the state on stdin, and startContainer hooks in the container."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from testing.api import Api, Task
from testing.containerd import Containerd

BUSYBOX = "local/busybox:1"
STAGES = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")

Create = Callable[..., Task]


@pytest.fixture
def create(containerd: Containerd, api: Api, runtime: str) -> Iterator[Create]:
    """A created task of a container with these hooks."""
    names: list[str] = []

    def make(hooks: dict[str, Any], *command: str) -> Task:
        name = containerd.new_id("hooks")
        names.append(name)
        containerd.ctr("container", "create", "--runtime", runtime, BUSYBOX, name)

        def edit(spec: dict[str, Any]) -> None:
            spec["process"]["args"] = list(command)
            spec["hooks"] = hooks

        api.patch_spec(name, edit)
        return api.task(name)

    yield make
    for name in names:
        containerd.remove(name)


def noting(log: Path, stage: str, script: str = "true") -> dict[str, Any]:
    """A hook that appends its stage, its state and its namespaces to `log`, then does `script`."""
    note = f"{{ echo {stage}; cat; echo; readlink /proc/self/ns/mnt; readlink /proc/self/ns/net; }} >> {log}"
    return {"path": "/bin/sh", "args": ["sh", "-c", f"{note}; {script}"], "env": ["PATH=/usr/bin:/bin"]}


def entries(log: Path) -> list[tuple[str, dict[str, Any], str, str]]:
    """(stage, state, mount namespace, network namespace) of each hook that ran."""
    lines = [line for line in log.read_text().splitlines() if line] if log.exists() else []
    return [(lines[i], json.loads(lines[i + 1]), lines[i + 2], lines[i + 3]) for i in range(0, len(lines), 4)]


def test_each_stage_runs_once_with_the_state(create: Create, tmp_path: Path, no_leaks: Any) -> None:
    log = tmp_path / "log"
    hooks = {stage: [noting(log, stage)] for stage in STAGES}
    inside = {"path": "/bin/sh", "args": ["sh", "-c", "uname -r > /tmp/hook"]}
    task = create(hooks | {"startContainer": [inside]}, "sh", "-c", "uname -r; cat /tmp/hook")
    assert [entry[0] for entry in entries(log)][:3] == ["prestart", "createRuntime", "createContainer"]
    pid = task.start()
    assert task.wait() == 0
    kernel, of_the_hook = task.io.finish()[0].decode().split()
    assert kernel == of_the_hook, "startContainer sees the container's files and kernel"
    task.delete()

    found = entries(log)
    assert [stage for stage, *_ in found] == list(STAGES)
    for stage, state, mounts, _ in found:
        assert state["id"] == task.container
        assert state["bundle"].endswith(task.container)
        assert state.get("pid", 0) == (0 if stage == "poststop" else pid) or stage == "createContainer"
        if stage != "createContainer":
            assert mounts == os.readlink("/proc/self/ns/mnt"), "the host's mounts, not the shim's"
    assert [state["status"] for _, state, *_ in found][:3] == ["creating"] * 3
    assert found[-1][1]["status"] == "stopped"


def test_a_failed_hook_fails_the_creation_and_leaves_nothing(
    create: Create, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    log = tmp_path / "log"
    hooks = {
        "createRuntime": [noting(log, "createRuntime", "echo no such bridge >&2; exit 3")],
        "createContainer": [noting(log, "createContainer")],
        "poststop": [noting(log, "poststop")],
    }
    with pytest.raises(grpc.RpcError) as caught:
        create(hooks, "true")
    assert isinstance(caught.value, grpc.Call)
    assert "no such bridge" in caught.value.details()
    assert [stage for stage, *_ in entries(log)] == ["createRuntime", "poststop"]


@pytest.mark.kata_only
def test_poststop_runs_after_kill_9_of_the_shim(
    create: Create, containerd: Containerd, api: Api, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    log = tmp_path / "log"
    bundles = containerd.state / "io.containerd.runtime.v2.task" / containerd.namespace
    with api.events() as next_event:
        task = create({"poststop": [noting(log, "poststop")]}, "sleep", "100000")
        task.start()
        os.kill(int((bundles / task.container / "shim.pid").read_text()), signal.SIGKILL)
        while True:  # containerd tells it after the shim's `delete` action
            topic, event = next_event(60)
            if topic == "/tasks/delete" and event.container_id == task.container:
                break
    assert [(stage, state["status"]) for stage, state, *_ in entries(log)] == [("poststop", "stopped")]
