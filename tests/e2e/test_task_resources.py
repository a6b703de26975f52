"""What a task uses and may use: Stats, Pids and Update through containerd's API, seen from within too."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

from proto import metrics_v1_pb2, metrics_v2_pb2
from shim.stats import host_is_unified
from testing.api import Api, Task

Create = Callable[..., Task]
TASKS = "containerd.services.tasks.v1.Tasks"
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
MIB = 1 << 20


def metrics(api: Api, task: Task) -> Any:
    """The task's figures, of the kind that the host's cgroup version wants."""
    (metric,) = api.call(TASKS, "Metrics", filters=[f"id=={task.container}"]).metrics
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


def output(task: Task, exec_id: str, script: str) -> list[str]:
    """The lines that a shell script writes inside."""
    process = task.exec("sh", "-c", script, exec_id=exec_id, stdin=False)
    process.start()
    assert process.wait() == 0
    text = process.io.finish()[0].decode()
    process.delete()
    return text.splitlines()


def test_limits_are_filled_in_and_can_be_changed(api: Api, create: Create) -> None:
    task = create("sleep", "1000", stdin=False)
    usage, limit = memory(metrics(api, task))
    assert limit > 1 << 62, "before it runs, and without a limit"
    task.start()
    update(api, task, {"memory": {"limit": 64 * MIB, "swap": 64 * MIB}, "pids": {"limit": 50}})
    figures = metrics(api, task)
    usage, limit = memory(figures)
    assert 0 < usage < limit == 64 * MIB
    assert (figures.pids.current, figures.pids.limit) == (1, 50)
    before = cpu(figures)
    output(task, "burn", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    assert cpu(metrics(api, task)) > before
    task.kill(signal.SIGKILL)
    task.wait()
    task.delete()
