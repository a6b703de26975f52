"""Kill -9 of any process of a pod, at any phase: the task ends, nothing stays, and a new one works."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from testing.api import Api
from testing.containerd import KATA, Containerd
from tests.fault.gear import BUSYBOX, busybox_archive, nothing_left, private_containerd

pytestmark = pytest.mark.e2e

TASKS = "containerd.services.tasks.v1.Tasks"


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A private containerd with one image."""
    archive = busybox_archive(tmp_path_factory.mktemp("images"))
    with private_containerd(archive) as daemon:
        yield daemon


@pytest.fixture
def api(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    connection = Api(containerd.address, containerd.namespace, tmp_path_factory.mktemp("fifos"))
    yield connection
    connection.close()


@pytest.fixture(autouse=True)
def no_leaks(containerd: Containerd) -> Iterator[None]:
    """After each test everything that came is gone again."""
    with nothing_left(containerd):
        yield


def _pid(containerd: Containerd, name: str, program: str) -> int:
    """The process of that program that serves the container `name`; 0 if there is none (yet)."""
    for process in containerd.processes():
        words = " ".join(process.argv)
        # The shim itself has the id as a word of its own, its helpers have our directory in a path.
        helper = f"/{containerd.key(name)}/" in words or f" sandbox-{name}," in words
        mine = f"-id {name} " in words if program == "containerd-shim" else helper
        if not mine or not any(os.path.basename(word).startswith(program) for word in process.argv[:4]):
            continue
        with contextlib.suppress(ProcessLookupError):
            # `start` has the same command line; the daemon that it forks leads a session.
            if program != "containerd-shim" or os.getsid(process.pid) == process.pid:
                return process.pid
    return 0


def _wait_for(containerd: Containerd, name: str, program: str) -> int:
    until = time.monotonic() + 20
    while not (pid := _pid(containerd, name, program)):
        assert time.monotonic() < until, f"no {program} came up"
        time.sleep(0.01)
    return pid


def _status(containerd: Containerd, name: str) -> str:
    lines = [line.split() for line in containerd.ctr("task", "ls").text.splitlines()]
    return next((words[-1] for words in lines if words[0] == name), "")


@pytest.mark.parametrize(
    ("victim", "delay"),
    [
        ("containerd-shim", 0.0),
        ("containerd-shim", 0.1),
        ("vhost-device-vsock", 0.0),
        ("qemu-system", 0.0),
        ("qemu-system", 1.0),
        ("virtiofsd", 0.5),
    ],
)
def test_killed_while_booting(containerd: Containerd, victim: str, delay: float) -> None:
    """`ctr run` fails with an error, soon, and leaves nothing."""
    name = containerd.new_id("boot")
    argv = containerd.ctr_argv("run", "--rm", "--runtime", KATA, BUSYBOX, name, "true")
    began = time.monotonic()
    with subprocess.Popen(
        argv, env=containerd.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as ctr:
        pid = _wait_for(containerd, name, victim)
        time.sleep(delay)  # the phase is the parameter
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        out, _ = ctr.communicate(timeout=60)

    assert ctr.returncode != 0, out
    assert out.strip()
    assert time.monotonic() - began < 20, out


@pytest.mark.parametrize(
    ("victim", "status"), [("qemu-system", 255), ("vhost-device-vsock", 255), ("virtiofsd", 255)]
)
def test_killed_while_running(containerd: Containerd, api: Api, victim: str, status: int) -> None:
    """The VM or a helper of it dies: one exit with 255 within seconds, and the task can be deleted."""
    name = containerd.new_id("run")
    containerd.ctr("run", "--detach", "--runtime", KATA, BUSYBOX, name, "sleep", "100000")
    os.kill(_wait_for(containerd, name, victim), signal.SIGKILL)

    began = time.monotonic()
    response = api.call(TASKS, "Wait", container_id=name)

    assert response.exit_status == status
    assert time.monotonic() - began < 10
    assert _status(containerd, name) == "STOPPED"
    containerd.ctr("task", "rm", name)
    containerd.ctr("container", "rm", name)


def test_shim_killed_while_running(containerd: Containerd) -> None:
    """The shim dies: containerd drops the task, the VM goes with it, and the same id works again."""
    name = containerd.new_id("shim")
    containerd.ctr("run", "--detach", "--runtime", KATA, BUSYBOX, name, "sleep", "100000")
    os.kill(_wait_for(containerd, name, "containerd-shim"), signal.SIGKILL)
    until = time.monotonic() + 10
    while _status(containerd, name):
        assert time.monotonic() < until
        time.sleep(0.05)
    containerd.ctr("container", "rm", name)
    # The task is out of the list a moment before containerd has finished with its bundle.
    while (containerd.root / "state/io.containerd.runtime.v2.task" / containerd.namespace / name).exists():
        assert time.monotonic() < until
        time.sleep(0.05)

    assert containerd.run(BUSYBOX, "echo", "again", name=name).text == "again"


def test_shim_stopped_and_given_up(containerd: Containerd) -> None:
    """A shim that hangs is ended by the delete that containerd runs when it restarts without it."""
    name = containerd.new_id("hang")
    containerd.ctr("run", "--detach", "--runtime", KATA, BUSYBOX, name, "sleep", "100000")
    shim = _wait_for(containerd, name, "containerd-shim")
    os.kill(shim, signal.SIGSTOP)
    containerd.halt()
    containerd.boot()

    assert _status(containerd, name) == ""
    assert not _pid(containerd, name, "containerd-shim")
    containerd.ctr("container", "rm", name)


def test_exit_while_containerd_is_away(containerd: Containerd, api: Api) -> None:
    """A container that ends while containerd is down: its exit code is there when containerd is back."""
    name = containerd.new_id("away")
    script = "until [ -e /go ]; do sleep 0.1; done; sleep 1; exit 7"
    containerd.ctr("run", "--detach", "--runtime", KATA, BUSYBOX, name, "sh", "-c", script)
    containerd.ctr("task", "exec", "--exec-id", "e", name, "touch", "/go")
    containerd.halt()
    qemu = _wait_for(containerd, name, "qemu-system")
    until = time.monotonic() + 20
    while _pid(containerd, name, "qemu-system") == qemu:  # the VM ends with its container
        assert time.monotonic() < until
        time.sleep(0.05)
    containerd.boot()

    # The VM goes a moment before the exit is told, so the status may still be on its way; Wait waits.
    assert api.call(TASKS, "Wait", container_id=name).exit_status == 7
    assert _status(containerd, name) == "STOPPED"
    containerd.ctr("task", "rm", name)
    containerd.ctr("container", "rm", name)
    lost = [line for line in containerd.log_tail(200).splitlines() if "events lost" in line]
    assert lost == []
