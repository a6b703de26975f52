"""Pods made by annotations, as CRI-O's are: namespaces by path, and who outlives whom."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, Containerd

from .conftest import BUSYBOX
from .test_task_resources import cpu, metrics

pytestmark = pytest.mark.kata_only

KEY = "io.kubernetes.cri-o."
SLEEP = ("sh", "-c", "trap 'exit 7' TERM; echo ready; sleep 100000 & wait")
Spec = dict[str, Any]


class Pods:
    """Makes pods and their members. `paths`: kinds of namespaces that a member is given by a path."""

    def __init__(self, containerd: Containerd, api: Api) -> None:
        self.containerd = containerd
        self.api = api
        self.names: list[str] = []

    def _make(self, annotations: dict[str, str], change: Callable[[Spec], None]) -> Task:
        name = self.containerd.new_id("pod")
        self.names.append(name)
        self.containerd.ctr("container", "create", "--runtime", KATA, BUSYBOX, name)

        def patch(spec: Spec) -> None:
            spec["annotations"] = {KEY + "SandboxID": name, **annotations}
            change(spec)

        self.api.patch_spec(name, patch)
        return self.api.task(name, stdin=False)

    def sandbox(self, *, shm: str = "", **spec: object) -> Task:
        """A pod's own container, running. `shm`: a directory of the host that is its /dev/shm."""

        def change(document: Spec) -> None:
            document.update(spec)
            bind_shm(document, shm)
            document["process"]["args"] = ["/does/not/exist"]  # the guest's own pause runs instead

        task = self._make({KEY + "ContainerType": "sandbox"}, change)
        task.start()
        return task

    def member(
        self,
        pod: Task,
        *command: str,
        paths: tuple[str, ...] = (),
        shm: str = "",
        sysctl: Spec | None = None,
        **spec: object,
    ) -> Task:
        """One more container of the pod, created."""

        def change(document: Spec) -> None:
            document.update(spec)
            bind_shm(document, shm)
            document["process"]["args"] = list(command)
            document["linux"]["sysctl"] = sysctl or {}
            for space in document["linux"]["namespaces"]:
                if space["type"] in paths:
                    space["path"] = f"/proc/{pod.pid}/ns/{space['type']}"

        annotations = {KEY + "ContainerType": "container", KEY + "SandboxID": pod.container}
        return self._make(annotations, change)


def bind_shm(spec: Spec, source: str) -> None:
    """Have /dev/shm bound from a directory of the host, as CRI does, instead of a tmpfs of its own."""
    if source:
        others = [mount for mount in spec["mounts"] if mount["destination"] != "/dev/shm"]
        shm = {"destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "ro"]}
        spec["mounts"] = [*others, shm]


@pytest.fixture
def shm(containerd: Containerd) -> Iterator[str]:
    """A tmpfs of 8 MiB on the host, like the one that CRI makes for a pod."""
    directory = containerd.root / "shm"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "shm", directory], check=True)
    yield str(directory)
    subprocess.run(["umount", directory], check=True)
    directory.rmdir()


@pytest.fixture
def pods(containerd: Containerd, api: Api) -> Iterator[Pods]:
    made = Pods(containerd, api)
    yield made
    for name in reversed(made.names):
        containerd.remove(name)


_execs = itertools.count(1)


def ask(task: Task, script: str) -> str:
    """What a script in the container says."""
    process = task.exec("sh", "-c", script, exec_id=f"ask{next(_execs)}", stdin=False)
    process.start()
    assert process.wait() == 0
    out, _ = process.io.finish()
    process.delete()
    return out.decode().strip()


def spaces(task: Task) -> dict[str, str]:
    """The namespaces that processes of the container are in."""
    kinds = ("ipc", "uts", "pid", "net")
    answer = ask(task, "; ".join(f"readlink /proc/self/ns/{kind}" for kind in kinds))
    return dict(zip(kinds, answer.split(), strict=True))


def test_namespaces_by_path_are_the_pods(pods: Pods, shm: str, no_leaks: Callable[[], None]) -> None:
    pod = pods.sandbox(hostname="the-pod", shm=shm)
    both = [pods.member(pod, *SLEEP, paths=("ipc", "uts", "pid", "network"), shm=shm) for _ in range(2)]
    alone = pods.member(pod, *SLEEP, hostname="alone")
    for task in (*both, alone):
        task.start()
        task.io.wait_for(b"ready")
    a, b, c = (spaces(task) for task in (*both, alone))
    assert a == b
    assert {kind: c[kind] == a[kind] for kind in c} == {"ipc": False, "uts": False, "pid": False, "net": True}
    assert [ask(task, "hostname") for task in (*both, alone)] == ["the-pod", "the-pod", "alone"]
    assert ask(both[0], "echo shared >/dev/shm/note; df -k /dev/shm | tail -1").split()[1] == "8192"
    assert ask(both[1], "cat /dev/shm/note") == "shared"
    assert ask(alone, "ls /dev/shm; df -k /dev/shm | tail -1").split()[1] == "65536"
    assert os.listdir(shm) == [], "the pod's is in the guest's memory"
    assert ask(both[0], "ps -o pid,args | sed -n 2p").split() == ["1", "/pause"]
    assert ask(alone, "cat /proc/1/cmdline | tr '\\0' ' '").startswith("sh -c trap")

    with pytest.raises(grpc.RpcError, match=r"vm[./]overcommit_memory"):
        pods.member(pod, *SLEEP, sysctl={"vm.overcommit_memory": "1"})
    assert ask(alone, "echo alive") == "alive", "a container that cannot be made hurts nobody"

    # With the pod's own container all of it ends, and each of it once.
    with pods.api.events() as next_event:
        pod.kill(signal.SIGTERM)
        assert pod.wait() == 0, "the pause has been told to end, and did"
        assert [task.wait() for task in (*both, alone)] == [137, 137, 137]
        exits = []
        while pod.container not in exits:
            topic, event = next_event(60)
            if topic == "/tasks/exit" and event.container_id in pods.names:
                exits.append(event.container_id)
        assert sorted(exits) == sorted(task.container for task in (pod, *both, alone))
    assert not leaks.lives(pod.pid), "the VM is gone"
    with pytest.raises(grpc.RpcError, match="has ended"):
        pods.member(pod, *SLEEP)
    for task in (*both, alone, pod):
        task.delete()


def test_kill_9_of_the_shim_ends_the_pod_and_leaves_nothing(
    pods: Pods, containerd: Containerd, no_leaks: Callable[[], None]
) -> None:
    pod = pods.sandbox()
    member = pods.member(pod, *SLEEP)
    member.start()
    member.io.wait_for(b"ready")
    bundle = containerd.state / "io.containerd.runtime.v2.task" / containerd.namespace
    with pods.api.events() as next_event:
        os.kill(int((bundle / pod.container / "shim.pid").read_text()), signal.SIGKILL)
        seen: set[tuple[str, str]] = set()
        while len(seen) < 4:  # containerd runs `delete` for each of the two, in an order of its own
            topic, event = next_event(60)
            if topic in {"/tasks/exit", "/tasks/delete"} and event.container_id in pods.names:
                seen.add((topic, event.container_id))
                assert event.exit_status == 137
    for path in (containerd.state_dir(pod.container), containerd.share_dir(pod.container)):
        assert not path.exists()
    assert not os.path.lexists(f"/run/kata/{pod.container}")
    socket = leaks.shim_socket(containerd.address, containerd.namespace, pod.container)
    assert not os.path.exists(socket)
    with pytest.raises(grpc.RpcError, match=f"the shim of sandbox {pod.container} does not answer"):
        pods.member(pod, *SLEEP)


def test_what_a_container_had_used_is_told_until_its_deletion(pods: Pods, api: Api) -> None:
    """containerd 2.3 asks for the figures of each task that SIGKILL has ended."""
    pod = pods.sandbox()
    member = pods.member(pod, "sh", "-c", "while :; do :; done")
    member.start()
    used = cpu(metrics(api, member.container))
    member.kill(signal.SIGKILL)
    assert member.wait() == 137
    last = cpu(metrics(api, member.container))
    assert last > 0
    assert last >= used
    assert cpu(metrics(api, member.container)) == last
    member.delete()

    told = cpu(metrics(api, pod.container))
    pod.kill(signal.SIGKILL)
    assert pod.wait() == 137
    assert cpu(metrics(api, pod.container)) >= told > 0
    pod.delete()
