"""Pods of containerd's CRI by the Sandbox API: 1.7's `sandbox_mode = "shim"`, 2.x's `sandboxer = "shim"`.

They have a network of CNI's: containerd 2.1 itself crashes on a host-network pod with this sandboxer (its
issue 12983).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import ttrpc
from proto import task_v2_pb2
from testing import leaks
from testing.containerd import PAUSE, Containerd
from testing.cri import NAMESPACE, Cri, Pod
from testing.images import busybox_image, pause_image

from .conftest import CRI_BUSYBOX as BUSYBOX

pytestmark = pytest.mark.kata_only

SLEEP = ("sh", "-c", "echo ready; trap 'exit 7' TERM; sleep 100000 & wait")


@pytest.fixture(scope="module")
def cri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cri]:
    """A containerd that serves CRI by the Sandbox API; 1.7 has to be told to."""
    archives = tmp_path_factory.mktemp("images")
    busybox_image(archives / "busybox.tar", BUSYBOX)
    pause_image(archives / "pause.tar", PAUSE)
    env = {"ENABLE_CRI_SANDBOXES": "1"}
    with Containerd(debug=True, version=request.param, namespace=NAMESPACE, cri=True, env=env) as daemon:
        for archive in sorted(archives.iterdir()):
            daemon.ctr("image", "import", str(archive))
        connection = Cri(daemon)
        for image in (BUSYBOX, PAUSE):
            connection.wait_for_image(image)
        yield connection
        connection.close()


@pytest.fixture(autouse=True)
def nothing_left(cri: Cri) -> Iterator[None]:
    """Each test removes its pods, and then the host is as it was."""
    daemon = cri.containerd

    def take() -> dict[str, set[str]]:
        sockets = [leaks.shim_socket(daemon.address, daemon.namespace, name) for name in daemon.ids]
        return leaks.snapshot(tag=daemon.tag, root=str(daemon.root), sockets=sockets, ignore=[daemon.pid])

    before = take()
    yield
    for pod in list(cri.pods):
        pod.remove()
    left = leaks.settle(before, take, timeout=15)
    bundles = daemon.state / "io.containerd.sandbox.controller.v1.shim" / NAMESPACE
    left_bundles = list(bundles.iterdir()) if bundles.exists() else []
    assert (left, left_bundles) == ({}, []), daemon.log_tail(60)


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """The condition's value as soon as it is true."""
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return value


def run_pod(cri: Cri, handler: str = "kata-shim", pid: str = "CONTAINER") -> Pod:
    return cri.run_pod(
        handler=handler,
        namespaces={"network": "POD", "pid": pid},
        hostname="mypod",
        dns={"servers": ["192.0.2.53"], "searches": ["pods.example"], "options": ["ndots:5"]},
        sysctls={"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "20000 20099"},
    )


@pytest.mark.parametrize(("cri", "pid"), [("1.7", "POD"), ("2", "CONTAINER")], indirect=["cri"])
def test_a_pod_without_a_pause_container(cri: Cri, pid: str) -> None:
    """Two containers, a restart of containerd under them, and the end of all of it."""
    pod = run_pod(cri, pid=pid)
    assert pod.state() == "SANDBOX_READY"
    info = pod.info()
    vmm = int(info["vmm.pid"])
    assert (info["hypervisor"], info["guest.hostname"]) == ("qemu", "mypod")
    assert os.stat(f"/proc/{vmm}/ns/net").st_ino == os.stat(info["netns"]).st_ino, (
        "it lives in the pod's network"
    )
    assert set(json.loads(info["phases"])) >= {"vmm.boot", "network", "agent.create_sandbox"}

    pair = [pod.run(*SLEEP, image=BUSYBOX) for _ in range(2)]
    assert cri.containerd.ctr("containers", "ls", "-q").text.splitlines() == sorted(pair), (
        "no pause container"
    )
    script = "hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/kernel/shm_rmid_forced"
    script += "; cat /proc/sys/net/ipv4/ip_local_port_range; readlink /proc/self/ns/ipc"
    first, second = (pod.sh(container, script) for container in pair)
    assert first == second
    assert first.splitlines()[:-1] == [
        "mypod", "mypod", "nameserver 192.0.2.53", "search pods.example", "options ndots:5", "1",
        "20000\t20099",
    ]  # fmt: skip
    assert pod.sh(pair[0], "grep -c localhost /etc/hosts")
    gateway = pod.sh(pair[0], "ip route").split("via ")[1].split()[0]
    assert " 0% packet loss" in pod.sh(pair[1], f"ping -c 1 -W 20 {gateway}")
    for container in pair:
        assert pod.wait_output(container, "ready") == "ready\n"

    # `kubectl port-forward`, by containerd's own stream.
    pod.sh(pair[0], "nc -ll -p 8080 -e /bin/cat </dev/null >/dev/null 2>&1 &")
    text = os.urandom(200_000)
    wait_for(lambda: pod.forward(8080, text)[0] == text, "the port is not the guest's")
    answer, error = pod.forward(8081, b"to nobody")
    assert (answer, "refused" in error) == (b"", True), error

    stats = cri.call("ListContainerStats", filter={"pod_sandbox_id": pod.id}).stats
    assert {
        entry.attributes.id: entry.memory.working_set_bytes.value > 0 for entry in stats
    } == dict.fromkeys(pair, True)

    seen = pod.sh(pair[1], "ps").count("sleep 100000 & wait")
    assert seen == (2 if pid == "POD" else 1), "each other's processes"

    # The first one: whose pid namespace would the others have?
    pod.stop_container(pair[0], grace=30)
    assert pod.wait_exit(pair[0]).exit_code == 7
    pod.remove_container(pair[0])
    assert pod.state() == "SANDBOX_READY"

    cri.containerd.halt()
    cri.containerd.boot()
    wait_for(lambda: _answers(pod), "CRI did not come back")
    assert pod.sh(pair[1], "echo still here") == "still here"
    third = pod.run("sh", "-c", "echo late; exit 3", image=BUSYBOX)
    assert pod.wait_exit(third).exit_code == 3
    assert pod.output(third) == "late\n"

    pod.stop()
    assert pod.state() == "SANDBOX_NOTREADY"
    assert not leaks.lives(vmm)
    pod.remove()


def _answers(pod: Pod) -> bool:
    try:
        return pod.state() == "SANDBOX_READY"
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("cri", ["2"], indirect=True)
def test_stdio_by_streams_until_the_vm_dies(cri: Cri) -> None:
    """2.x's `io_type = "streaming"`: no FIFO anywhere; then both CRI and the container hear of the death."""
    pod = run_pod(cri, handler="kata-streaming")
    container = pod.run("sh", "-c", "seq 1 20000; echo err >&2; sleep 100000", image=BUSYBOX)
    state = asyncio.run(_state(cri.containerd, container))
    assert state.stdout.startswith("ttrpc+unix://")
    assert "streaming_id=" in state.stdout
    expected = "".join(f"{number}\n" for number in range(1, 20001))
    wait_for(lambda: len(pod.output(container)) >= len(expected) + 4, "the log is not whole")
    assert sorted(pod.output(container)) == sorted(expected + "err\n")
    done = pod.exec(container, "sh", "-c", "seq 1 5000; echo no >&2; exit 4")
    assert (done.exit_code, done.stderr) == (4, b"no\n")
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 5001))

    os.kill(int(pod.info()["vmm.pid"]), signal.SIGKILL)
    wait_for(lambda: pod.state() == "SANDBOX_NOTREADY", "CRI takes a dead sandbox for ready")
    assert pod.wait_exit(container).exit_code in {137, 255}


@pytest.mark.parametrize("cri", ["2"], indirect=True)
def test_containerd_killed_while_a_pod_boots(cri: Cri) -> None:
    """Its next one finds a sandbox that is not ready, and can remove it in the middle of its boot."""
    daemon = cri.containerd

    def run() -> None:
        with contextlib.suppress(grpc.RpcError):  # it is cut off
            run_pod(cri)

    running = threading.Thread(target=run)
    running.start()
    vmm = wait_for(lambda: _vmm(daemon), "no VMM came up")
    os.kill(vmm, signal.SIGSTOP)  # so that it boots as long as we want
    daemon.halt(signal.SIGKILL)
    running.join(60)
    daemon.boot()
    pods = wait_for(lambda: _pods(cri), "the pod is forgotten")
    assert [pod.state for pod in pods] == [1], "SANDBOX_NOTREADY"
    os.kill(vmm, signal.SIGCONT)
    daemon.ids.append(pods[0].id)
    for call in ("StopPodSandbox", "RemovePodSandbox"):
        cri.call(call, pod_sandbox_id=pods[0].id)


def _vmm(daemon: Containerd) -> int:
    """The pid of a QEMU that is to boot something, 0 if there is none."""
    found = (
        each.pid for each in daemon.processes() if "qemu-system" in each.argv[0] and "-kernel" in each.argv
    )
    return next(found, 0)


def _pods(cri: Cri) -> list[Any]:
    try:
        return list(cri.call("ListPodSandbox").items)
    except grpc.RpcError:  # the plugin is not up yet
        return []


async def _state(containerd: Containerd, container: str) -> task_v2_pb2.StateResponse:
    """The shim's own word on a container."""
    bundle = containerd.state / "io.containerd.runtime.v2.task" / NAMESPACE / container
    path = (bundle / "address").read_text().removeprefix("unix://")
    async with await ttrpc.Client.connect_unix(path, timeout=10) as client:
        method = task_v2_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name["State"]
        answer = await client.call(method, task_v2_pb2.StateRequest(id=container), timeout=10)
        assert isinstance(answer, task_v2_pb2.StateResponse)
        return answer
