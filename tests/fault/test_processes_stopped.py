"""SIGSTOP of any process of a pod: who kills, stops or deletes is done in time, and nothing stays."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, Containerd
from testing.guest import PROJECT, Value, write_configuration
from tests.fault.gear import BUSYBOX, busybox_archive, nothing_left, private_containerd

pytestmark = pytest.mark.e2e

TASKS = "containerd.services.tasks.v1.Tasks"
LIMIT = 4.0  # seconds: kill_timeout of these shims
SLACK = 4.0  # more, for containerd, and a machine that is busy
AGENT: dict[str, Value | None] = {
    "kill_timeout": LIMIT,
    "create_container_timeout": 10,
    "reconnect_timeout_ms": 60000,
}
EACH = ("qemu-system", "virtiofsd", "vhost-device-vs")
#: It asks the shared directory for something all the time: with virtiofsd stopped it cannot be killed.
BUSY = ("sh", "-c", "echo ready; while :; do ls / >/dev/null; echo x >/busy; done")
SLEEP = ("sh", "-c", "echo ready; sleep 100000")


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A private containerd with one image, whose shims have little patience."""
    archive = busybox_archive(tmp_path_factory.mktemp("images"))
    with private_containerd(archive, {"agent.kata": AGENT}) as daemon:
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


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def shim_of(vmm: int) -> int:
    """The shim that has started this VMM."""
    pid = vmm
    while "containerd-shim" not in Path(f"/proc/{pid}/cmdline").read_text():
        pid = parent(pid)
        assert pid > 1, f"{vmm} is no shim's"
    return pid


def children(pid: int) -> dict[int, str]:
    """The processes below one, with the first 15 letters of their names."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if parent(int(entry.name)) == pid:
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
                    found |= children(int(entry.name))
    return found


class Pod:
    """The processes of the VM that a task is in. `vmm`: the task's pid."""

    def __init__(self, vmm: int) -> None:
        self._all = children(shim_of(vmm))

    def send(self, number: int, *programs: str) -> None:
        for program in programs:
            pids = [pid for pid, name in self._all.items() if name.startswith(program)]
            assert pids, f"no {program} among {self._all}"
            for pid in pids:
                os.kill(pid, number)

    def stop(self, *programs: str) -> None:
        self.send(signal.SIGSTOP, *programs)

    def go_on(self, *programs: str) -> None:
        self.send(signal.SIGCONT, *programs)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began


Make = Callable[..., Task]


@pytest.fixture
def make(containerd: Containerd, api: Api) -> Iterator[Make]:
    """A task with FIFOs of ours, started: alone, a pod's own (`pod=True`), or in a pod (`pod=TASK`)."""
    names: list[str] = []

    def _make(*command: str, pod: Task | bool = False, start: bool = True, stdin: bool = False) -> Task:
        name = containerd.new_id("stop")
        names.append(name)
        containerd.ctr("container", "create", "--runtime", KATA, BUSYBOX, name)
        key = "io.kubernetes.cri-o."

        def patch(spec: dict[str, Any]) -> None:
            spec["process"]["args"] = list(command)
            if pod:
                owner = name if pod is True else pod.container
                kind = "sandbox" if pod is True else "container"
                spec["annotations"] = {f"{key}SandboxID": owner, f"{key}ContainerType": kind}

        api.patch_spec(name, patch)
        task = api.task(name, stdin=stdin)
        if start:
            task.start()
        return task

    yield _make
    for name in reversed(names):
        containerd.remove(name)


def exits_of(
    event: Callable[[float], tuple[str, Any]], *names: str, patience: float
) -> list[tuple[str, int]]:
    """(id, status) of each exit that is told until all of these have one, and for a moment more."""
    told: list[tuple[str, int]] = []
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            topic, message = event(0.2)
        except queue.Empty:
            continue
        if topic == "/tasks/exit":
            told.append((message.id, message.exit_status))
            if {name for name, _ in told} >= set(names):
                until = min(until, time.monotonic() + 1)
    return told


def health(name: str) -> dict[str, Any]:
    """What `kata-ctl list` says of a sandbox."""
    argv = [sys.executable, "-m", "ctl", "list", "--json"]
    listed = subprocess.run(argv, cwd=PROJECT, capture_output=True, check=True, timeout=30)
    return next(one for one in json.loads(listed.stdout) if one["id"] == name)


def until_state(name: str, state: str, timeout: float = 30) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while (found := health(name))["state"] != state:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("victims", [*((one,) for one in EACH), EACH], ids=[*EACH, "all"])
def test_two_kills_and_a_forced_delete(
    containerd: Containerd, api: Api, make: Make, victims: tuple[str, ...]
) -> None:
    """Each kill is answered at once, the exit (137) told once and in time, the delete done, the id free."""
    task = make(*BUSY)
    task.io.wait_for(b"ready")
    pod = Pod(task.pid)
    with api.events() as event:
        pod.stop(*victims)
        time.sleep(1)  # until it is in the middle of a request
        clock = Clock()
        for _ in range(2):
            with contextlib.suppress(grpc.RpcError):  # it may have ended
                api.call(TASKS, "Kill", timeout=5, container_id=task.container, signal=9)
        assert exits_of(event, task.container, patience=LIMIT + SLACK) == [(task.container, 137)]
    assert clock() < LIMIT + SLACK + 1
    containerd.ctr("task", "rm", "--force", task.container, timeout=10)
    task.io.close()
    containerd.ctr("container", "rm", task.container)
    assert containerd.run(BUSYBOX, "echo", "again", name=task.container).text == "again"


@pytest.mark.parametrize("victims", [EACH[:1], EACH], ids=["qemu", "all"])
def test_a_forced_delete_alone(containerd: Containerd, make: Make, victims: tuple[str, ...]) -> None:
    """`ctr task delete -f` kills, waits and deletes by itself."""
    task = make(*BUSY)
    task.io.wait_for(b"ready")
    Pod(task.pid).stop(*victims)
    clock = Clock()
    containerd.ctr("task", "rm", "--force", task.container, timeout=30)
    assert clock() < LIMIT + SLACK
    task.io.close()


def test_stopped_before_the_start(containerd: Containerd, make: Make) -> None:
    """A created container whose QEMU stands still is deleted."""
    task = make(*SLEEP, start=False)
    Pod(int(task.state().pid)).stop("qemu-system")
    clock = Clock()
    containerd.ctr("task", "rm", "--force", task.container, timeout=30)
    assert clock() < LIMIT + SLACK
    task.io.close()


def test_stopped_while_it_boots(containerd: Containerd) -> None:
    """The client that gives up is rid of it: a QEMU that stands still keeps nobody."""
    name = containerd.new_id("boot")
    argv = containerd.ctr_argv("run", "--rm", "--runtime", KATA, BUSYBOX, name, "true")
    with subprocess.Popen(argv, env=containerd.environment, stderr=subprocess.PIPE) as ctr:
        deadline = time.monotonic() + 30
        while "qemu-system-x86" not in (found := _helpers(containerd, name)).values():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        ctr.kill()
    clock = Clock()
    while _helpers(containerd, name):
        assert clock() < LIMIT + SLACK
        time.sleep(0.05)
    containerd.remove(name)


def _helpers(containerd: Containerd, name: str) -> dict[int, str]:
    """The children of the shim that serves this container."""
    for process in leaks.own_processes(containerd.tag, str(containerd.root)):
        if f"-id {name} " in " ".join(process.argv) and os.getsid(process.pid) == process.pid:
            return children(process.pid)
    return {}


def test_stopped_with_an_exec_and_input_under_way(api: Api, make: Make) -> None:
    """An exec that runs, one that is being started, and input that flows end with their container."""
    task = make("sh", "-c", "echo ready; cat >/dev/null", stdin=True)
    task.io.wait_for(b"ready")
    running = task.exec("sleep", "100000", exec_id="runs", stdin=False)
    running.start()
    late = task.exec("sleep", "100000", exec_id="late", stdin=False)
    flowing = threading.Thread(target=_write, args=(task,), daemon=True)
    flowing.start()
    failure: list[grpc.RpcError] = []

    def start() -> None:
        try:
            late.start()
        except grpc.RpcError as error:
            failure.append(error)

    starting = threading.Thread(target=start, daemon=True)
    with api.events() as event:
        Pod(task.pid).stop("qemu-system")
        starting.start()
        time.sleep(0.5)
        task.kill(9)
        told = exits_of(event, task.container, "runs", patience=LIMIT + SLACK)
    assert told == [("runs", 137), (task.container, 137)]
    starting.join(SLACK)
    assert failure, "the start has failed"
    for process in (running, late, task):
        process.delete(timeout=10)


def _write(task: Task) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        task.io.write(b"x" * (8 << 20), timeout=LIMIT)


def test_a_member_of_a_pod(containerd: Containerd, api: Api, make: Make) -> None:
    """Its exit is told in time, the guest is marked until it answers again, and the others go on then."""
    own = make("/pause", pod=True)
    member, other, third = (make(*SLEEP, pod=own) for _ in range(3))
    pod = Pod(own.pid)
    pod.stop("qemu-system")
    with api.events() as event:
        clock = Clock()
        member.kill(15)  # the guest does not take it, and that is no reason to fail
        member.kill(9)
        told = exits_of(event, member.container, patience=LIMIT + SLACK)
        assert told == [(member.container, 137)]
        assert clock() < LIMIT + SLACK + 1
        found = until_state(own.container, "unresponsive")
        assert member.container in found["why"]
        clock = Clock()
        member.delete(timeout=10)
        third.kill(9)
        assert exits_of(event, third.container, patience=3) == [(third.container, 137)], "it is known by now"
        assert clock() < 6
    pod.go_on("qemu-system")
    until_state(own.container, "running")
    done = other.exec("echo", "well", exec_id="e", stdin=False)
    done.start()
    assert done.wait() == 0
    done.delete()
    again = make("echo", "hello", pod=own)
    assert again.wait() == 0
    own.kill(9)
    assert other.wait(LIMIT + SLACK) == 137
    for task in (again, third, other, own):
        task.delete(timeout=10)


@pytest.mark.parametrize("victims", [EACH[1:2], EACH], ids=["virtiofsd", "all"])
def test_a_pods_own_container(api: Api, make: Make, victims: tuple[str, ...]) -> None:
    """The VM goes, and every container of it has its one exit in time."""
    own = make("/pause", pod=True)
    members = [make(*BUSY, pod=own) for _ in range(2)]
    for member in members:
        member.io.wait_for(b"ready")
    names = [task.container for task in (own, *members)]
    pod = Pod(own.pid)
    with api.events() as event:
        pod.stop(*victims)
        time.sleep(1)
        own.kill(9)
        told = exits_of(event, *names, patience=LIMIT + SLACK)
    assert sorted(told) == sorted((name, 137) for name in names)
    for task in (*members, own):
        task.delete(timeout=10)


@pytest.mark.parametrize("action", ["none", "end"])
def test_a_guest_that_falls_silent(containerd: Containerd, make: Make, action: str) -> None:
    """It is told by `kata-ctl list` until it answers again; or the VM is ended, if that is configured."""
    changed = {"health_check_interval": 1, "health_check_request_timeout_ms": 1000}
    agent: dict[str, Value | None] = {**AGENT, **changed, "health_check_action": action}
    write_configuration(containerd.configuration, {"agent.kata": agent})
    try:
        task = make(*SLEEP)
        task.io.wait_for(b"ready")
        pod = Pod(task.pid)
        task.api.call(TASKS, "Pause", container_id=task.container)
        time.sleep(8)  # as long as three questions may take
        assert health(task.container)["state"] == "running", "a paused container is no silent guest"
        task.api.call(TASKS, "Resume", container_id=task.container)
        pod.stop("qemu-system")
        if action == "end":
            assert task.wait(30) == 255
        else:
            found = until_state(task.container, "unresponsive")
            assert "3 questions" in found["why"]
            pod.go_on("qemu-system")
            assert until_state(task.container, "running")["why"] == ""
            task.kill(9)
            assert task.wait(30) == 137
        task.delete()
        assert "the guest is unresponsive" in containerd.log_tail(200)
    finally:
        write_configuration(containerd.configuration, {"agent.kata": AGENT})


def test_a_host_that_sleeps(api: Api, make: Make) -> None:
    """All of a pod and its shim stand still for longer than any of its deadlines; then everything goes on,
    and nothing was told meanwhile."""
    task = make("sh", "-c", "trap 'exit 7' USR1; n=0; while :; do n=$((n+1)); echo line $n; sleep 0.2; done")
    task.io.wait_for(b"line 2\n")
    running = task.exec("cat", exec_id="runs")
    running.start()
    shim = shim_of(task.pid)
    everybody = [shim, *children(shim)]
    with api.events() as event:
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(LIMIT * 3)
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)
        before = task.io.out.count(b"\n")
        task.io.wait_for(f"line {before + 5}\n".encode())
        running.io.write(b"awake\n")
        running.io.wait_for(b"awake\n")
        assert exits_of(event, task.container, patience=2) == []
    running.io.detach_stdin()
    running.close_stdin()
    assert running.wait() == 0
    running.delete()
    task.kill(signal.SIGUSR1)
    assert task.wait() == 7
    task.delete()
