"""A pod whose VM somebody else makes: its life under containerd, with a service that stands for a cloud."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.containerd import Containerd
from testing.guest import PROJECT
from testing.images import busybox_tree

BUSYBOX = "local/busybox:1"
RUNTIME = "io.containerd.kata-remote.v2"
IMAGE = ("--annotation", f"io.kubernetes.cri.image-name={BUSYBOX}")
PATIENCE = 60.0

pytestmark = pytest.mark.kata_only


class Service:
    """The stand-in, in its process, and what it has been asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tree = directory / "tree"
        busybox_tree(tree)
        command = [sys.executable, "-m", "tests.e2e.peer_pods", str(directory), f"{BUSYBOX}={tree}"]
        self.process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def calls(self) -> list[dict[str, Any]]:
        file = self.directory / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def names(self) -> list[str]:
        return [call["call"] for call in self.calls()]

    def await_call(self, name: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while name not in self.names():
            assert time.monotonic() < deadline, self.names()
            time.sleep(0.05)
        return next(call for call in reversed(self.calls()) if call["call"] == name)

    def forget(self) -> None:
        (self.directory / "calls").unlink(missing_ok=True)

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def service(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A runtime class with Kata's own file for it, and the service that the file names."""
    made = Service(tmp_path_factory.mktemp("peer"))
    link = containerd.root / "bin" / "containerd-shim-kata-remote-v2"
    link.symlink_to("containerd-shim-kata-v2")
    file = containerd.root / "configuration-remote.toml"
    text = (PROJECT / "tests/data/kata/configuration-remote.toml").read_text()
    file.write_text(text.replace("/run/peerpod/hypervisor.sock", f"{made.directory}/hypervisor.sock"))
    yield made
    made.end()
    link.unlink()
    file.unlink()


def _gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_containers_life_in_somebody_elses_vm(
    containerd: Containerd, service: Service, no_leaks: Callable[[], None]
) -> None:
    """Streams by the agent's calls, the exit code, and the VM ended with the container. What names no image
    is refused before the service hears of it."""
    bare = containerd.run(BUSYBOX, "true", runtime=RUNTIME, check=False)
    assert "no annotation of the container names one" in bare.error
    assert "--annotation io.kubernetes.cri.image-name=IMAGE" in bare.error
    assert service.calls() == []

    name = containerd.new_id("remote")
    script = "echo up; while read line; do echo got $line; done; echo end >&2; exit 7"
    shell = ("sh", "-c", script)
    done = containerd.ctr(
        "run", "--runtime", RUNTIME, *IMAGE, BUSYBOX, name, *shell, stdin=b"a\nb\n", check=False
    )
    assert (done.code, done.out, done.err) == (7, b"up\ngot a\ngot b\n", b"end\n"), done.error
    started = service.await_call("StartVM")
    create = service.calls()[0]
    prefix = "io.katacontainers.config.hypervisor."
    assert create["id"] == containerd.key(name)
    assert create["annotations"][prefix + "default_memory"] == "2048"
    assert create["annotations"]["io.kubernetes.cri.sandbox-name"] == name
    containerd.remove(name)
    service.await_call("StopVM")
    _gone(started["pid"])


def test_a_killed_shim_leaves_no_vm(
    containerd: Containerd, service: Service, no_leaks: Callable[[], None]
) -> None:
    service.forget()
    name = containerd.new_id("remote")
    containerd.ctr("run", "--detach", "--runtime", RUNTIME, *IMAGE, BUSYBOX, name, "sleep", "100000")
    started = service.await_call("StartVM")
    done = containerd.ctr(
        "task", "exec", "--exec-id", "e", name, "sh", "-c", "cat /proc/1/cmdline; exit 3", check=False
    )
    assert (done.code, done.out) == (3, b"sleep\x00100000\x00")
    (row,) = (line.split() for line in containerd.ctr("task", "ls").text.splitlines() if name in line)
    os.kill(int(row[1]), signal.SIGKILL)  # the task's pid is the shim's: there is no VMM here
    service.await_call("StopVM")
    _gone(started["pid"])
    containerd.remove(name)
