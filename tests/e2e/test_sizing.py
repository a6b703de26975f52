"""A container gets what its limits allow: the VM starts with it, or grows for it while it runs."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable

import grpc
import pytest

from testing.api import Task

pytestmark = pytest.mark.kata_only

Create = Callable[..., Task]
MIB = 1 << 20
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
WAITS = ("sh", "-c", "trap 'exit 0' TERM; echo on; while :; do sleep 0.1; done")
IDLES = ("sleep", "1000")

_names = itertools.count(1)


def cpus(count: int) -> tuple[str, ...]:
    """`ctr container create` has no --cpus."""
    return ("--cpu-quota", str(count * 100_000), "--cpu-period", "100000")


def execute(task: Task, *command: str) -> str:
    """An exec's output."""
    process = task.exec(*command, exec_id=f"e{next(_names)}")
    process.start()
    assert process.wait() == 0
    out = process.io.finish()[0].decode()
    process.delete()
    return out


def memory(task: Task) -> int:
    """MiB that the guest's kernel has."""
    return int(execute(task, "grep", "MemTotal", "/proc/meminfo").split()[1]) >> 10


def comes_down_to(task: Task, size: int) -> None:
    """A VM shrinks behind the answer to the call that allows it."""
    end = time.monotonic() + 120
    while memory(task) > size + 20 and time.monotonic() < end:
        time.sleep(0.2)
    assert abs(memory(task) - size) <= 20


def update(task: Task, resources: dict[str, object]) -> None:
    task.api.call(
        "containerd.services.tasks.v1.Tasks",
        "Update",
        container_id=task.container,
        resources={"type_url": RESOURCES, "value": json.dumps(resources).encode()},
    )


def end(task: Task) -> None:
    task.kill(signal.SIGKILL)
    task.wait()
    task.delete()


def test_a_container_gets_the_cpus_and_the_memory_of_its_limits(create: Create) -> None:
    """In a VM that has 256 MB and one vCPU by default, 500 MB are used."""
    limits = ("--memory-limit", str(600 * MIB), *cpus(2))
    # dd has one buffer of that size, and fills it.
    task = create(
        "sh", "-c", "nproc; dd if=/dev/zero of=/dev/null bs=500M count=1 && echo ok", options=limits
    )
    task.start()

    assert task.wait() == 0
    assert task.io.finish()[0].split() == [b"2", b"ok"]
    task.delete()


def test_an_update_grows_the_vm(create: Create) -> None:
    task = create(*WAITS, options=("--memory-limit", str(64 * MIB)))
    task.start()
    before = memory(task)
    assert execute(task, "nproc").strip() == "1"
    update(task, {"memory": {"limit": 700 * MIB}, "cpu": {"quota": 200_000, "period": 100_000}})

    assert memory(task) - before >= 600
    assert execute(task, "nproc").strip() == "2"
    execute(task, "dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1")
    update(task, {"memory": {"limit": 64 * MIB}})
    comes_down_to(task, before)
    update(task, {"memory": {"limit": 400 * MIB}})
    assert memory(task) - before >= 300
    with pytest.raises(grpc.RpcError) as caught:
        update(task, {"cpu": {"quota": 100_000_000, "period": 100_000}})
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "default_maxvcpus" in caught.value.details()
    end(task)


def test_a_shrink_leaves_what_is_in_use(create: Create) -> None:
    """A container without a limit uses what came for another one: the VM keeps it when that one goes."""
    kind = "io.kubernetes.cri.container-type"
    pod = create(*IDLES, options=("--annotation", f"{kind}=sandbox"))
    pod.start()
    in_pod = (f"{kind}=container", f"io.kubernetes.cri.sandbox-id={pod.container}")
    joined = tuple(word for text in in_pod for word in ("--annotation", text))
    files = ("--mount", "type=tmpfs,src=tmpfs,dst=/big,options=size=400m:huge=always")
    first = create(*IDLES, options=(*joined, *files))
    first.start()
    before = memory(first)
    member = create(*IDLES, options=(*joined, "--memory-limit", str(384 * MIB)))
    member.start()
    execute(first, "dd", "if=/dev/zero", "of=/big/x", "bs=1M", "count=280")
    end(member)
    # For this one the VM grows by another DIMM, which can go again.
    other = create(*IDLES, options=(*joined, "--memory-limit", str(512 * MIB)))
    other.start()
    end(other)

    comes_down_to(first, before + 384)
    assert execute(first, "stat", "-c", "%s", "/big/x").strip() == str(280 * MIB)
    execute(first, "rm", "/big/x")
    last = create(*IDLES, options=(*joined, "--memory-limit", str(64 * MIB)))
    last.start()
    end(last)
    comes_down_to(first, before)
    end(first)
    end(pod)


def test_a_pod_grows_with_each_container(create: Create) -> None:
    kind = "io.kubernetes.cri.container-type"
    pod = create(*WAITS, options=("--annotation", f"{kind}=sandbox"))
    pod.start()
    in_pod = (f"{kind}=container", f"io.kubernetes.cri.sandbox-id={pod.container}")
    joined = tuple(word for text in in_pod for word in ("--annotation", text))
    first = create(*WAITS, options=joined)
    first.start()
    before = memory(first)
    member = create(*WAITS, options=(*joined, "--memory-limit", str(500 * MIB), *cpus(1)))
    member.start()

    assert memory(member) - before >= 490
    assert execute(member, "nproc").strip() == "2"
    end(member)
    comes_down_to(first, before)
    assert execute(first, "nproc").strip() == "2"  # no vCPU is taken away under TCG
    end(first)
    end(pod)
