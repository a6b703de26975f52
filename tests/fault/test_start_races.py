"""Starts and ends of one sandbox that meet: one daemon serves, and nobody takes what is the next one's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto import task_v2_pb2
from shim.launch import launcher
from tests.unit.shim.shims import Bundle, Shims, shims_fixture


@pytest.fixture(params=["launcher", "zygote"])
def shims(request: pytest.FixtureRequest) -> Iterator[Shims]:
    yield from shims_fixture(zygote=request.param == "zygote")


def test_nobody_finds_a_socket_that_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its name only when it listens."""
    link = os.link
    tried: list[int] = []

    def look(source: str, target: str) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            tried.append(probe.connect_ex(source))
        assert not os.path.lexists(target)
        link(source, target)

    monkeypatch.setattr(os, "link", look)
    path = str(tmp_path / "s")
    mask = os.umask(0o077)
    try:
        os.close(launcher.bind(path))
    finally:
        os.umask(mask)  # it leaves the shim's

    assert tried == [0]
    assert os.listdir(tmp_path) == ["s"]


def shims_socket(shims: Shims, bundle: Bundle) -> str:
    return f"/run/containerd/s/{shims.identity(bundle).digest}"


@pytest.mark.parametrize("stale", [False, True])
async def test_starts_at_the_same_time_have_one_daemon(shims: Shims, stale: bool) -> None:
    """All print the same address and exit 0, whether the name was free or a dead shim's."""
    bundle = shims.bundle("c1")
    path = f"{shims.root}{shims_socket(shims, bundle)}"
    for _ in range(3):
        if stale:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(path)
        starts = [
            subprocess.Popen(
                shims.argv(bundle, "start"),
                cwd=bundle.path,
                env=shims.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for _ in range(8)
        ]
        answers = [start.communicate(timeout=30)[0] for start in starts]
        assert {start.returncode for start in starts} == {0}, answers
        assert set(answers) == {f"unix://{path}".encode()}
        (daemon,) = shims.processes()
        await bundle.serving()
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
        await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="c1"))
        assert shims.wait_gone(daemon)


async def test_the_end_of_one_is_not_the_end_of_the_next(shims: Shims) -> None:
    """A daemon takes its time to end, and the next one of the same sandbox starts meanwhile: it waits for the
    state directory, and keeps it, its socket and its link when the first is gone."""
    bundle = shims.bundle("c1")
    shims.start(bundle, env={"STUB_CLOSE_SECONDS": "2"})
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="c1"))
    first = bundle.pid
    until = time.monotonic() + 10
    while bundle.socket.exists():
        assert time.monotonic() < until
        time.sleep(0.005)

    assert shims.start(bundle).returncode == 0
    assert bundle.pid != first
    assert first in shims.processes()
    assert await bundle.serving() == bundle.pid
    assert shims.wait_gone(first)
    assert bundle.socket.exists()
    assert (shims.state_dir(bundle) / "journal").exists()
    assert shims.link(bundle).resolve() == shims.state_dir(bundle)
    await bundle.serving()
    assert shims.delete(bundle).returncode == 0
    assert shims.leftovers() == []


@pytest.mark.parametrize("shims", ["launcher"], indirect=True)  # the zygote's is ready too soon
def test_a_daemon_that_has_no_journal_yet_is_found(shims: Shims) -> None:
    """containerd gives up right after `start`: `delete` ends also a daemon that still imports."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    os.kill(bundle.pid, signal.SIGSTOP)  # long before it is ready
    assert not shims.state_dir(bundle).exists()

    result = shims.delete(bundle)

    assert (result.returncode, result.stderr) == (0, b"")
    assert shims.leftovers() == []


def test_a_pid_in_the_bundle_is_not_enough(shims: Shims) -> None:
    """Whoever has the pid now, or is another sandbox's shim, is left alone."""
    bundle, other = shims.bundle("c1"), shims.bundle("c1", namespace="other")
    shims.start(other)
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        for pid in (sleeper.pid, other.pid):
            (bundle.path / "shim.pid").write_text(str(pid))
            assert shims.delete(bundle).returncode == 0
        assert sleeper.poll() is None
        sleeper.kill()
    assert other.pid in shims.processes()
    assert shims.delete(other).returncode == 0
