"""What a task uses and may use: Stats, Pids and Update through containerd's API, seen from within too."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from proto import metrics_v1_pb2, metrics_v2_pb2
from shim.tasks.stats import host_is_unified
from testing.api import Api, Task

Create = Callable[..., Task]
TASKS = "containerd.services.tasks.v1.Tasks"
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
MIB = 1 << 20


def metrics(api: Api, container: str) -> Any:
    """The container's figures, of the kind that the host's cgroup version wants."""
    (metric,) = api.call(TASKS, "Metrics", filters=[f"id=={container}"]).metrics
    kinds = (metrics_v1_pb2.Metrics, metrics_v2_pb2.Metrics)
    kind = kinds[host_is_unified()]
    assert metric.data.type_url == kind.DESCRIPTOR.full_name
    return kind.FromString(metric.data.value)


def memory(figures: Any) -> tuple[int, int]:
    """(usage, limit) in bytes."""
    if host_is_unified():
        return figures.memory.usage, figures.memory.usage_limit
    return figures.memory.usage.usage, figures.memory.usage.limit


def cpu(figures: Any) -> float:
    """Seconds."""
    return float(figures.cpu.usage_usec / 1e6 if host_is_unified() else figures.cpu.usage.total / 1e9)


def update(api: Api, task: Task, resources: dict[str, Any]) -> None:
    value = json.dumps(resources).encode()
    api.call(TASKS, "Update", container_id=task.container, resources={"type_url": RESOURCES, "value": value})


def output(task: Task, exec_id: str, script: str, *arguments: str) -> list[str]:
    """The lines that a shell script writes inside; `arguments` are its $0 and on."""
    process = task.exec("sh", "-c", script, *arguments, exec_id=exec_id, stdin=False)
    process.start()
    assert process.wait() == 0
    text = process.io.finish()[0].decode()
    process.delete()
    return text.splitlines()


def test_limits_are_filled_in_and_can_be_changed(api: Api, create: Create) -> None:
    task = create("sh", "-c", "sleep 1000 & sleep 1000 & echo ready; wait", stdin=False)
    usage, limit = memory(metrics(api, task.container))
    assert limit > 1 << 62, "before it runs, and without a limit"
    task.start()
    task.io.wait_for(b"ready", timeout=60)
    update(api, task, {"memory": {"limit": 64 * MIB, "swap": 64 * MIB}, "pids": {"limit": 50}})
    figures = metrics(api, task.container)
    usage, limit = memory(figures)
    assert 0 < usage < limit == 64 * MIB
    assert (figures.pids.current, figures.pids.limit) == (3, 50)
    before = cpu(figures)
    output(task, "burn", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    assert cpu(metrics(api, task.container)) > before

    entries = api.call(TASKS, "ListPids", container_id=task.container).processes
    assert len(entries) == 3, "the children too, each once"
    assert task.pid in [entry.pid for entry in entries]
    # The shell, as the first process of its namespace, does not even see a signal that it does not trap.
    task.kill(signal.SIGTERM, everyone=True)
    assert task.wait() == 0
    task.delete()


def test_figures_are_told_after_the_end(api: Api, create: Create) -> None:
    """With a single container its VM has gone, so they may be those that were told last."""
    burn = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ready; cat"
    task = create("sh", "-c", burn, stdin=False)
    task.start()
    task.io.wait_for(b"ready", timeout=60)
    used = cpu(metrics(api, task.container))
    task.kill(signal.SIGKILL)
    assert task.wait() == 137
    assert cpu(metrics(api, task.container)) >= used > 0
    listing = subprocess.run([sys.executable, "-m", "ctl", "list", "--json"], capture_output=True, check=True)
    states = {each["id"]: (each["state"], each["pid"]) for each in json.loads(listing.stdout)}
    assert states[task.container] == ("stopped", 0)
    task.delete()


#: Prints the container's own limits, whatever cgroup namespace it is in.
SHOW = (
    'cd "/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)" && for f in $0; do echo "$f $(cat "$f")"; done'
)
FILES = "cpu.weight cpu.max cpuset.cpus memory.max memory.swap.max memory.low memory.high pids.max"


@pytest.mark.kata_only
def test_each_limit_holds_inside_the_guest(api: Api, create: Create) -> None:
    mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"
    task = create("sleep", "1000", stdin=False, options=("--mount", mount))
    task.start()
    update(api, task, {
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"},
        "memory": {"limit": 64 * MIB, "swap": 80 * MIB, "reservation": 8 * MIB},
        "pids": {"limit": 50},
        "unified": {"memory.high": str(48 * MIB)},
    })  # fmt: skip
    limits = dict(line.split(" ", 1) for line in output(task, "set", SHOW, FILES))
    assert limits == {
        "cpu.weight": "20", "cpu.max": "50000 100000", "cpuset.cpus": "0", "memory.max": str(64 * MIB),
        "memory.swap.max": str(16 * MIB), "memory.low": str(8 * MIB), "memory.high": str(48 * MIB),
        "pids.max": "50",
    }  # fmt: skip

    for resources, status in (
        ({"cpu": {"quota": 100_000_000, "period": 100_000}}, "FAILED_PRECONDITION"),
        ({"memory": {"limit": 1 << 50}}, "FAILED_PRECONDITION"),
        ({"memory": {"limit": 64 * MIB, "swap": 32 * MIB}}, "INVALID_ARGUMENT"),
        ({"pids": {"limit": 60}, "unified": {"memory.nonsense": "1"}}, "INVALID_ARGUMENT"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            update(api, task, resources)
        assert (resources, error.value.code().name) == (resources, status)

    # A set with CPUs that only the host has is no error: a kubelet sends such to everybody.
    lifted = {"cpu": {"quota": -1, "cpus": "0,4095"}, "memory": {"limit": -1}, "pids": {"limit": -1}}
    update(api, task, lifted)
    after = dict(line.split(" ", 1) for line in output(task, "lifted", SHOW, FILES))
    lifted = {"cpu.max": "max 100000", "memory.max": "max", "memory.swap.max": "max", "pids.max": "max"}
    assert after == limits | lifted
    task.kill(signal.SIGKILL)
    task.wait()
    task.delete()
