"""A VM that outlives its shim is taken over by the next one: tasks, streams and exit codes go on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shim.state import journalfile
from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, PAUSE, Containerd
from testing.cri import NAMESPACE, Cri
from testing.images import busybox_image, pause_image
from tests.fault.gear import BUSYBOX, busybox_archive, nothing_left, private_containerd
from tests.netlab import ECHO, NetLab

pytestmark = pytest.mark.e2e

CRI_BUSYBOX = "docker.io/local/busybox:1"
KEEP = {"runtime": {"on_shim_death": "keep"}}
DEADLINE = 60.0


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox_archive(tmp_path_factory.mktemp("images"))


@pytest.fixture
def containerd(archive: Path, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """A private containerd whose shims' VMs are kept (or what the test says), and nothing left of them."""
    overrides = getattr(request, "param", KEEP)
    with private_containerd(archive, overrides) as daemon, nothing_left(daemon):
        yield daemon


@pytest.fixture
def api(containerd: Containerd, tmp_path: Path) -> Iterator[Api]:
    connection = Api(containerd.address, containerd.namespace, tmp_path)
    yield connection
    connection.close()


def _wait(what: str, condition: Callable[[], object]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def _shim(containerd: Containerd, name: str) -> int:
    """The daemon that serves it; 0 if there is none."""
    for process in containerd.processes():
        words = " ".join(process.argv)
        named = any(os.path.basename(word).startswith("containerd-shim") for word in process.argv[:4])
        with contextlib.suppress(ProcessLookupError):
            if named and f"-id {name} " in words and os.getsid(process.pid) == process.pid:
                return process.pid
    return 0


def _kill_shim(containerd: Containerd, name: str) -> int:
    pid = _shim(containerd, name)
    assert pid
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([fd], [], [], DEADLINE)[0]
    os.close(fd)
    return pid


def _ctl(containerd: Containerd, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ctl", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("KATA_")},
    )


def _run(containerd: Containerd, *command: str) -> str:
    name = containerd.new_id("keep")
    log = containerd.root / f"{name}.log"
    containerd.ctr(
        "run", "--detach", "--runtime", KATA, "--log-uri", f"file://{log}", BUSYBOX, name, *command
    )
    return name


def _said(containerd: Containerd, name: str) -> str:
    return (containerd.root / f"{name}.log").read_text()


def _task(containerd: Containerd, name: str) -> str:
    """Its line of `ctr task ls`."""
    lines = containerd.ctr("task", "ls").text.splitlines()
    return next((line for line in lines if line.split()[0] == name), "")


COUNT = "i=0; while [ ! -e /stop ]; do i=$((i+1)); echo line $i; sleep 0.1; done; echo over; exit 7"
KEY = "io.kubernetes.cri-o."


class Outage:
    """containerd is down, and the shim of `name` is killed; `over` has both again."""

    def __init__(self, containerd: Containerd, api: Api, name: str) -> None:
        self.containerd = containerd
        self.name = name
        self.api = api
        containerd.halt()
        self.killed = _kill_shim(containerd, name)

    def recover(self) -> None:
        recovered = _ctl(self.containerd, "recover", f"default/{self.name}")
        assert (recovered.returncode, recovered.stderr) == (0, ""), self.containerd.log_tail(60)
        assert f"default/{self.name}: recovered" in recovered.stdout

    def over(self, *tasks: Task) -> None:
        """Recover, and let containerd come back; the tasks' calls go to it."""
        self.recover()
        self.containerd.boot()
        self.api.close()
        self.api.__init__(self.containerd.address, self.containerd.namespace, self.api.directory)  # type: ignore[misc]
        for task in tasks:
            task.api = self.api


def test_a_task_goes_on(containerd: Containerd, api: Api) -> None:
    """containerd is down, the shim is killed: the VM runs on, and the next shim has task, output and exit."""
    name = _run(containerd, "sh", "-c", COUNT)
    _wait("no output", lambda: "line 3" in _said(containerd, name))
    outage = Outage(containerd, api, name)
    listed = _ctl(containerd, "list").stdout
    assert any("orphaned" in line and name in line for line in listed.splitlines()), listed

    outage.over()
    assert _shim(containerd, name) not in (0, outage.killed)
    again = _ctl(containerd, "recover", name)
    assert again.returncode == 1
    assert "its shim lives" in again.stderr
    assert _ctl(containerd, "recover", "--all").returncode == 0

    assert "RUNNING" in _task(containerd, name)
    at = len(_said(containerd, name))
    _wait("output stands still", lambda: len(_said(containerd, name)) > at + 20)
    ran = containerd.ctr("task", "exec", "--exec-id", "x", name, "sh", "-c", "echo in; exit 3", check=False)
    assert (ran.code, ran.text) == (3, "in")
    containerd.ctr("task", "metrics", name)
    with api.events() as event:
        containerd.ctr("task", "exec", "--exec-id", "y", name, "touch", "/stop")
        exits: list[Any] = []
        while name not in [found.id for found in exits]:
            topic, found = event(DEADLINE)
            if topic == "/tasks/exit":
                exits.append(found)
    assert [(found.id, found.exit_status) for found in exits] == [("y", 0), (name, 7)]
    task = Task(api, name, "", None)  # type: ignore[arg-type]
    assert task.wait() == 7
    assert api.call("containerd.services.tasks.v1.Tasks", "Delete", container_id=name).exit_status == 7
    lines = _said(containerd, name).split("\n")
    assert lines[-2:] == ["over", ""]
    numbers = [int(line.split()[1]) for line in lines[:-2]]
    assert numbers == sorted(set(numbers)), "doubled or out of order"
    assert len(numbers) >= numbers[-1] - 3, "more is lost than what was on its way"
    containerd.ctr("container", "rm", name)


def _echoed(lab: NetLab) -> bool:
    """Whether localhost of the pod's namespace leads to the guest's echo."""
    with lab.inside("pod", socket.socket) as client:
        client.settimeout(DEADLINE)
        try:
            client.connect(("127.0.0.1", 7))
            client.sendall(b"hello")
            return client.recv(100) == b"hello"
        except (ConnectionRefusedError, ConnectionResetError):
            return False


def test_localhost_is_the_guests_again(containerd: Containerd, api: Api) -> None:
    """Nothing listens for a shim that is dead; the next one listens where it did."""
    with NetLab() as lab:
        name = containerd.new_id("keep")
        space = f"network:{lab.pod}"
        containerd.ctr("run", "--detach", "--runtime", KATA, "--with-ns", space, BUSYBOX, name, *ECHO)
        _wait("localhost is not the guest's", lambda: _echoed(lab))
        outage = Outage(containerd, api, name)
        assert not _echoed(lab)
        outage.over()
        _wait("localhost is not the guest's again", lambda: _echoed(lab))
        containerd.remove(name)


class Pod:
    """A sandbox by CRI-O's annotations, and its members."""

    def __init__(self, containerd: Containerd, api: Api) -> None:
        self.containerd = containerd
        self.api = api
        self.tasks: list[Task] = []
        self.own = self._make("sandbox", "", ("/pause",))
        self.own.start()

    def _make(self, kind: str, sandbox: str, command: tuple[str, ...], *, terminal: bool = False) -> Task:
        name = self.containerd.new_id(kind)
        tty = ("--tty",) if terminal else ()
        self.containerd.ctr("container", "create", "--runtime", KATA, *tty, BUSYBOX, name)

        def change(spec: dict[str, Any]) -> None:
            spec["annotations"] = {KEY + "ContainerType": kind, KEY + "SandboxID": sandbox or name}
            spec["process"]["args"] = list(command)

        self.api.patch_spec(name, change)
        task = self.api.task(name, terminal=terminal)
        self.tasks.append(task)
        return task

    def member(self, *command: str, terminal: bool = False) -> Task:
        return self._make("container", self.own.container, command, terminal=terminal)

    def remove(self) -> None:
        for task in reversed(self.tasks):
            self.containerd.remove(task.container)
            task.io.close()


def test_a_pod_goes_on(containerd: Containerd, api: Api) -> None:
    """Who ends while no shim is there, who reads, who is paused, who has not begun, and a terminal."""
    pod = Pod(containerd, api)
    ends = pod.member("sh", "-c", "echo first; read x; sleep 2; echo last words; exit 7")
    reads = pod.member("sh", "-c", "echo ready; while read x; do echo got $x; done; echo end; exit 4")
    shown = pod.member("sh", "-c", "echo ready; read x; echo got $x; exit 6", terminal=True)
    for task in (ends, reads, shown):
        task.start()
    begins = pod.member("sh", "-c", "echo begun; exit 5")
    leaves = reads.exec("sh", "-c", "echo in; sleep 3; echo out; exit 9", exec_id="leaves")
    leaves.start()
    told = reads.exec("true", exec_id="told")
    told.start()
    assert told.wait() == 0
    later = reads.exec("sh", "-c", "echo later; exit 2", exec_id="later")
    paused = pod.member("sh", "-c", COUNT)
    paused.start()
    paused.io.wait_for(b"line 2")
    paused._call("Pause")
    reads.io.write(b"one\n")
    reads.io.wait_for(b"got one")
    ends.io.write(b"go\n")  # what is in the FIFO, or the guest, before the shim dies or after it came
    leaves.io.wait_for(b"in")

    tasks = [pod.own, ends, reads, shown, begins, leaves, told, later, paused]
    with contextlib.ExitStack() as held:
        for task in tasks:  # a reader that comes again, as containerd's, sees no end in between
            for path in filter(None, (task.io.stdout, task.io.stderr)):
                held.callback(os.close, os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        outage = Outage(containerd, api, pod.own.container)
        time.sleep(4)  # the exec ends in a guest without a shim
        outage.over(*tasks)

    assert ends.wait() == 7
    assert leaves.wait() == 9
    assert told.wait() == 0
    assert leaves.io.wait_for(b"out")
    assert ends.io.wait_for(b"last words")
    reads.io.write(b"two\n")
    reads.io.wait_for(b"got two")
    shown.io.write(b"words\n")
    shown.io.wait_for(b"got words")
    assert shown.wait() == 6
    later.start()
    assert later.wait() == 2
    begins.start()
    assert begins.wait() == 5
    assert paused.state().status == 4  # PAUSED
    paused._call("Resume")
    paused.io.wait_for(b"line 3")
    paused.kill(signal.SIGKILL)
    assert paused.wait() == 137
    reads.io.detach_stdin()
    reads.close_stdin()
    assert reads.wait() == 4
    assert [each.delete().exit_status for each in (leaves, told, later)] == [9, 0, 2]
    with pytest.raises(grpc.RpcError, match="recovered sandbox takes no new containers"):
        pod.member("true")
    statuses = [each.delete().exit_status for each in (ends, reads, shown, begins, paused)]
    assert statuses == [7, 4, 6, 5, 137]
    pod.own.kill(signal.SIGKILL)
    assert pod.own.wait() == 137
    assert pod.own.delete().exit_status == 137
    for name in containerd.ids:
        containerd.ctr("container", "rm", name, check=False)


def _vmm(containerd: Containerd, name: str) -> int:
    journal = journalfile.load(str(containerd.state_dir(name)))
    return next(int(record.facts["pid"]) for record in journal.records if record.facts.get("name") == "qemu")


def _shim_action(
    containerd: Containerd, name: str, action: str, bundle: Path
) -> tuple[subprocess.CompletedProcess[bytes], float]:
    flags = ["-namespace", "default", "-address", containerd.address, "-id", name, "-bundle", str(bundle)]
    began = time.monotonic()
    done = subprocess.run(
        [str(containerd.root / "bin/containerd-shim-kata-v2"), *flags, action],
        check=False,
        cwd=bundle,
        env=containerd.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=90,
    )
    return done, time.monotonic() - began


def _bundle(containerd: Containerd, name: str) -> Path:
    return containerd.state / "io.containerd.runtime.v2.task/default" / name


def test_recovery_that_fails_changes_nothing(containerd: Containerd, api: Api) -> None:
    """A VMM that stands still; then, when it goes on, twice over, the second time by a member's `start`; at
    last the shim dies once more, and `delete` ends all of it within containerd's five seconds."""
    name = _run(containerd, "sh", "-c", COUNT)
    _wait("no output", lambda: "line 3" in _said(containerd, name))
    containerd.halt()
    _kill_shim(containerd, name)
    vmm = _vmm(containerd, name)
    os.kill(vmm, signal.SIGSTOP)
    failed = _ctl(containerd, "recover", "--all")
    assert failed.returncode == 1
    assert "recover the VM: " in failed.stderr, failed.stderr
    assert _shim(containerd, name) == 0
    assert not (Path("/run/containerd/s") / leaks.shim_socket(containerd.address, "default", name)).exists()
    os.kill(vmm, signal.SIGCONT)

    recovered = _ctl(containerd, "recover", "--all")
    assert (recovered.returncode, recovered.stderr) == (0, "")
    assert f"default/{name}: recovered" in recovered.stdout
    at = len(_said(containerd, name))
    _wait("output stands still", lambda: len(_said(containerd, name)) > at + 20)

    _kill_shim(containerd, name)
    member = containerd.root / "member"
    member.mkdir()
    spec = {"annotations": {KEY + "ContainerType": "container", KEY + "SandboxID": name}}
    (member / "config.json").write_text(json.dumps(spec))
    started, _ = _shim_action(containerd, "member", "start", member)
    assert (started.returncode, started.stderr) == (0, b"")
    assert started.stdout == (_bundle(containerd, name) / "address").read_bytes()
    at = len(_said(containerd, name))
    _wait("output stands still", lambda: len(_said(containerd, name)) > at + 20)

    _kill_shim(containerd, name)
    deleted, seconds = _shim_action(containerd, name, "delete", _bundle(containerd, name))
    assert (deleted.returncode, deleted.stderr) == (0, b"")
    assert seconds < 5
    assert not leaks.lives(vmm)
    containerd.boot()
    containerd.ctr("container", "rm", name)


def test_a_containerd_that_lives_ends_it(containerd: Containerd) -> None:
    """When its connection to the shim breaks it runs `delete`: kept or not, the VM goes."""
    name = _run(containerd, "sleep", "1000")
    vmm = _vmm(containerd, name)
    fd = os.pidfd_open(vmm)
    _kill_shim(containerd, name)

    assert select.select([fd], [], [], 10)[0]
    os.close(fd)
    _wait("something is left", lambda: not containerd.state_dir(name).exists())
    assert _task(containerd, name) == ""
    containerd.ctr("container", "rm", name)


def test_a_dead_vm_is_not_recovered(containerd: Containerd) -> None:
    """It says so, and containerd, when it comes back, cleans up."""
    name = _run(containerd, "sleep", "1000")
    containerd.halt()
    _kill_shim(containerd, name)
    vmm = _vmm(containerd, name)
    fd = os.pidfd_open(vmm)
    os.kill(vmm, signal.SIGKILL)
    assert select.select([fd], [], [], 10)[0]
    os.close(fd)

    refused = _ctl(containerd, "recover", name)

    assert refused.returncode == 1
    assert "its VM is dead" in refused.stderr
    assert _ctl(containerd, "recover", "--all").returncode == 0
    containerd.boot()
    _wait("something is left", lambda: not containerd.state_dir(name).exists())
    containerd.ctr("container", "rm", name)


@pytest.mark.parametrize("containerd", [{}], indirect=True, ids=["end"])
def test_by_default_a_vm_ends_with_its_shim(containerd: Containerd) -> None:
    """Nothing is written down, all processes go at once, and `delete` has the rest gone within its time."""
    name = _run(containerd, "sleep", "1000")
    assert not (containerd.state_dir(name) / "recovery.json").exists()
    containerd.halt()
    fd = os.pidfd_open(_vmm(containerd, name))
    _kill_shim(containerd, name)

    assert select.select([fd], [], [], 5)[0]
    os.close(fd)
    refused = _ctl(containerd, "recover", name)
    assert refused.returncode == 1
    assert "its VM was not kept" in refused.stderr
    deleted, seconds = _shim_action(containerd, name, "delete", _bundle(containerd, name))
    assert (deleted.returncode, deleted.stderr) == (0, b"")
    assert seconds < 5
    containerd.boot()
    containerd.ctr("container", "rm", name)


@pytest.mark.parametrize("version", ["1.6", "2"])
def test_kubelet_sees_nothing_of_it(version: str, tmp_path: Path) -> None:
    """By CRI: the pod is ready, log and exit code of its container go on; who ended meanwhile has ended."""
    busybox_image(tmp_path / "busybox.tar", CRI_BUSYBOX)
    pause_image(tmp_path / "pause.tar", PAUSE)
    with Containerd(debug=True, version=version, namespace=NAMESPACE, cri=True, overrides=KEEP) as daemon:
        for archive in ("busybox.tar", "pause.tar"):
            daemon.ctr("image", "import", str(tmp_path / archive))
        cri = Cri(daemon)
        for image in (CRI_BUSYBOX, PAUSE):
            cri.wait_for_image(image)
        pod = cri.run_pod()
        goes_on = pod.run("sh", "-c", COUNT, image=CRI_BUSYBOX)
        ends = pod.run("sh", "-c", "echo ready; sleep 4; exit 9", image=CRI_BUSYBOX)
        pod.wait_output(ends, "ready")
        pod.wait_output(goes_on, "line 3")

        daemon.halt()
        _kill_shim(daemon, pod.id)
        time.sleep(5)  # one ends in a guest without a shim
        recovered = _ctl(daemon, "recover", "--all")
        assert (recovered.returncode, recovered.stderr) == (0, ""), daemon.log_tail(60)
        daemon.boot()
        cri.wait_until_up()

        assert pod.state() == "SANDBOX_READY"
        assert pod.wait_exit(ends).exit_code == 9
        said = len(pod.output(goes_on))
        _wait("its log stands still", lambda: len(pod.output(goes_on)) > said + 20)
        assert pod.sh(goes_on, "touch /stop; echo in") == "in"
        assert pod.wait_exit(goes_on).exit_code == 7
        assert "over" in pod.output(goes_on)
        pod.remove()
        assert not daemon.state_dir(pod.id).exists()
        cri.close()
