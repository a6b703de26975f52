"""A pod of containerd's CRI is one VM: what its containers share, what each has alone, what ends with what.

The pods use the node's network, which needs no CNI plugin here; in the VM that is the guest's.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from testing import leaks
from testing.api import Api
from testing.cri import Cri, Pod

from .conftest import CRI_BUSYBOX as BUSYBOX
from .test_task_resources import memory, metrics

pytestmark = pytest.mark.kata_only

SLEEP = ("sh", "-c", "trap 'exit 7' TERM; echo ready; sleep 100000 & wait")
MIB = 1 << 20


def programs(pod: Pod) -> list[str]:
    """The names of the processes that serve this pod: shim and VMM, of all that this containerd started."""
    found = []
    for process in pod.cri.containerd.processes():
        name = os.path.basename(process.argv[0])
        if name.startswith("qemu") and any(pod.id in word for word in process.argv):
            found.append("vmm")
        elif (
            any(word.endswith("containerd-shim-kata-v2") for word in process.argv) and pod.id in process.argv
        ):
            found.append("shim")
    return sorted(found)


def left_of(pod: Pod) -> list[str]:
    """What the host still has of the pod."""
    containerd = pod.cri.containerd
    paths = [
        leaks.shim_socket(containerd.address, containerd.namespace, pod.id),
        f"/run/kata/{pod.id}",
        str(containerd.state_dir(pod.id)),
        str(containerd.share_dir(pod.id)),
    ]
    key = containerd.key(pod.id)
    mounts = [mount for mount in leaks.mounts_below("/run/kata-containers") if key in mount]
    return [path for path in paths if os.path.lexists(path)] + mounts + programs(pod)


def _address(bundle: Path) -> str:
    """Where containerd has found the shim of this task. Since 2.3 a member's bundle has no `address`."""
    try:
        return (bundle / "address").read_text()
    except FileNotFoundError:
        return str(json.loads((bundle / "bootstrap.json").read_text())["address"])


def namespaces(pod: Pod, container: str, *kinds: str) -> dict[str, str]:
    """The namespaces of a container's processes, as a process in it sees them."""
    script = "; ".join(f"readlink /proc/self/ns/{kind}" for kind in kinds)
    return dict(zip(kinds, pod.sh(container, script).splitlines(), strict=True))


def boot_id(pod: Pod, container: str) -> str:
    """Which boot of which kernel a container runs on."""
    return pod.sh(container, "cat /proc/sys/kernel/random/boot_id")


@pytest.fixture(scope="module")
def pod(cri: Cri) -> Iterator[Pod]:
    """A pod as Kubernetes makes it: private pids, everything else shared."""
    made = cri.run_pod(
        hostname="mypod",
        dns={"servers": ["192.0.2.53"], "searches": ["pods.example"], "options": ["ndots:5"]},
        sysctls={"net.ipv4.ip_local_port_range": "20000 20099", "kernel.shm_rmid_forced": "1"},
    )
    yield made
    made.remove()
    assert left_of(made) == []


@pytest.fixture(scope="module")
def pair(pod: Pod) -> tuple[str, str]:
    """Two containers of the pod that run all the time."""
    resources = {"cpu_period": 100_000, "cpu_quota": 20_000, "memory_limit_in_bytes": 64 * MIB}
    return (
        pod.run(*SLEEP, image=BUSYBOX, resources=resources),
        pod.run(*SLEEP, image=BUSYBOX, resources={"memory_limit_in_bytes": 96 * MIB, "cpu_shares": 512}),
    )


def test_one_shim_and_one_vm(pod: Pod, pair: tuple[str, str]) -> None:
    assert boot_id(pod, pair[0]) == boot_id(pod, pair[1])
    assert programs(pod) == ["shim", "vmm"]
    assert pod.state() == "SANDBOX_READY"
    state = pod.cri.containerd.state / "io.containerd.runtime.v2.task/k8s.io"
    addresses = {_address(state / name) for name in (pod.id, *pair)}
    assert len(addresses) == 1, "a member's start answers the address of the pod's shim"
    assert not (state / pair[0] / "shim.pid").exists()


def test_what_is_shared_and_what_is_not(pod: Pod, pair: tuple[str, str]) -> None:
    kinds = ("ipc", "uts", "net", "pid", "mnt")
    a, b = (namespaces(pod, container, *kinds) for container in pair)
    assert {kind: a[kind] == b[kind] for kind in kinds} == {
        "ipc": True, "uts": True, "net": True, "pid": False, "mnt": False,
    }  # fmt: skip
    assert "sleep 100000" in pod.sh(pair[0], "ps")
    assert len([line for line in pod.sh(pair[0], "ps").splitlines() if "sleep 100000" in line]) == 2


def test_names(pod: Pod, pair: tuple[str, str]) -> None:
    """Host name, resolver and hosts are the pod's in each of its containers."""
    script = "hostname; cat /etc/hostname /etc/resolv.conf; sha256sum /etc/hosts"
    answers = {pod.sh(container, script) for container in pair}
    assert len(answers) == 1
    lines = answers.pop().splitlines()
    assert lines[:2] == ["mypod", "mypod"]
    assert {"nameserver 192.0.2.53", "search pods.example", "options ndots:5"} <= set(lines)
    pod.sh(pair[0], "echo 192.0.2.1 other >>/etc/hosts")
    assert "192.0.2.1 other" in pod.sh(pair[1], "cat /etc/hosts")


def test_shm_is_shared_and_sized(pod: Pod, pair: tuple[str, str]) -> None:
    pod.sh(pair[0], "echo from a >/dev/shm/note")
    assert pod.sh(pair[1], "cat /dev/shm/note; rm /dev/shm/note") == "from a"
    size = pod.sh(pair[1], "df -k /dev/shm | tail -1").split()[1]
    assert size == "65536", "as on the host"
    full = pod.exec(pair[1], "sh", "-c", "dd if=/dev/zero of=/dev/shm/big bs=1M count=65; rm /dev/shm/big")
    assert b"No space left" in full.stderr


def test_sysctls_of_the_pod(pod: Pod, pair: tuple[str, str]) -> None:
    for container in pair:
        assert pod.sh(container, "cat /proc/sys/net/ipv4/ip_local_port_range").split() == ["20000", "20099"]
        assert pod.sh(container, "cat /proc/sys/kernel/shm_rmid_forced") == "1"


def test_limits_are_each_containers_own(pod: Pod, pair: tuple[str, str]) -> None:
    limits = [pod.sh(container, "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight") for container in pair]
    first, second = (limit.splitlines() for limit in limits)
    assert first[:2] == [str(64 * MIB), "20000 100000"]
    assert second[:2] == [str(96 * MIB), "max 100000"]
    assert first[2] != second[2]
    # A fifth of a CPU, measured from within: CPU time used over time gone by, both in microseconds.
    script = (
        "now() { set -- $(cat /sys/fs/cgroup/cpu.stat /proc/uptime); echo $2; shift $(($# - 2));"
        " echo ${1%.*}${1#*.}0000; }; a=$(now); timeout 2 sh -c 'while :; do :; done'; echo $a $(now)"
    )
    used, at, used_then, then = map(int, pod.sh(pair[0], script).split())
    assert (used_then - used) / (then - at) < 0.35


def test_a_container_over_its_limit_dies_alone(pod: Pod, pair: tuple[str, str]) -> None:
    greedy = pod.run(
        "sh", "-c", "x=$(dd if=/dev/zero bs=1M count=48 | tr '\\0' a)", image=BUSYBOX,
        resources={"memory_limit_in_bytes": 32 * MIB},
    )  # fmt: skip
    try:
        status = pod.wait_exit(greedy)  # a kernel that looks for memory takes its time on a busy machine
    finally:
        pod.remove_container(greedy)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert pod.sh(pair[0], "echo alive") == "alive"


def test_figures_are_each_containers_own(pod: Pod, pair: tuple[str, str]) -> None:
    pod.sh(pair[0], "dd if=/dev/zero of=/dev/shm/10m bs=1M count=10")
    answer = pod.cri.call("ListContainerStats", filter={"pod_sandbox_id": pod.id})
    stats = {each.attributes.id: each for each in answer.stats}
    pod.sh(pair[0], "rm /dev/shm/10m")
    assert set(stats) == set(pair)
    used = [stats[container].memory.usage_bytes.value for container in pair]
    assert used[0] > 10 * MIB > used[1]
    assert all(each.cpu.usage_core_nano_seconds.value > 0 for each in stats.values())


def test_the_vms_own_cost_is_the_pods_containers(pod: Pod, pair: tuple[str, str], tmp_path: Path) -> None:
    """What VMM and daemons use, told with the pod's own container, once."""
    api = Api(pod.cri.containerd.address, "k8s.io", tmp_path)
    try:
        used = {name: memory(metrics(api, name))[0] for name in (pod.id, *pair)}
    finally:
        api.close()
    assert used[pod.id] > 40 * MIB > max(used[name] for name in pair)


def test_the_pod_outlives_a_container_which_can_be_started_again(pod: Pod, pair: tuple[str, str]) -> None:
    boot = boot_id(pod, pair[0])
    first = pod.run("sh", "-c", "echo once; exit 3", image=BUSYBOX)
    assert pod.wait_exit(first).exit_code == 3
    assert pod.output(first) == "once\n"
    assert pod.state() == "SANDBOX_READY"
    second = pod.run(*SLEEP, image=BUSYBOX)
    pod.wait_output(second, "ready")
    assert boot_id(pod, second) == boot
    pod.stop_container(second, grace=30)
    assert pod.status(second).exit_code == 7, "it got the time to end by itself"
    share = pod.cri.containerd.share_dir(pod.id) / "rw/passthrough"
    left = os.listdir(share)
    assert not [name for name in left if first in name or second in name], "CRI deletes the task at its exit"
    assert [name for name in left if pair[0] in name], "the others keep theirs"
    for container in (first, second):
        pod.remove_container(container)
        pod.remove_container(container)  # again, as kubelet does
    assert pod.sh(pair[0], "echo alive") == "alive"


def test_a_pod_outlives_containerd(pod: Pod, pair: tuple[str, str]) -> None:
    boot = boot_id(pod, pair[0])
    containerd = pod.cri.containerd
    containerd.halt(signal.SIGKILL)
    containerd.boot()
    pod.cri.wait_until_up()
    assert pod.state() == "SANDBOX_READY"
    assert [boot_id(pod, container) for container in pair] == [boot, boot]
    late = pod.run("sh", "-c", "echo late; exit 4", image=BUSYBOX)
    assert pod.wait_exit(late).exit_code == 4
    assert pod.output(late) == "late\n"
    pod.remove_container(late)


def test_shared_pids(cri: Cri) -> None:
    """shareProcessNamespace: all see all, the pause is PID 1 and reaps, and nobody's end ends the rest."""
    pod = cri.run_pod(namespaces={"pid": "POD"})
    a = pod.run(*SLEEP, image=BUSYBOX)
    b = pod.run(*SLEEP, image=BUSYBOX)
    pod.wait_output(b, "ready")
    assert namespaces(pod, a, "pid") == namespaces(pod, b, "pid")
    processes = pod.sh(a, "ps -o pid,args").splitlines()
    assert [line.split() for line in processes if line.split()[0] == "1"] == [["1", "/pause"]]
    assert len([line for line in processes if "sleep 100000 & wait" in line]) == 2
    # An orphan goes to PID 1, which reaps it: the process that it was is gone, not a zombie.
    pod.sh(a, "sh -c 'sleep 0.1 & echo $! >/dev/shm/orphan'")
    pod.sh(b, "while [ -e /proc/$(cat /dev/shm/orphan) ]; do sleep 0.05; done")
    pod.stop_container(a)
    assert pod.status(a).exit_code == 137
    assert pod.sh(b, "ps -o args").count("sleep 100000 & wait") == 1, "b's own"
    pod.stop()
    pod.stop()  # again, as kubelet does
    assert pod.state() == "SANDBOX_NOTREADY"
    assert pod.status(b).exit_code == 137
    assert programs(pod) == []
    with pytest.raises(grpc.RpcError):
        pod.run(*SLEEP, image=BUSYBOX)
    pod.remove()
    assert left_of(pod) == []
