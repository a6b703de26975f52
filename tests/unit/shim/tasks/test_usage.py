"""The figures of a pod's containers add up to what the pod costs the host, and each has its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devices.errors import GuestError
from proto import agent_pb2, metrics_v2_pb2
from shim.protocols import HostUsage
from shim.tasks import container_manager
from tests.unit.shim.fakes import TaskClient

MIB = 1 << 20
MS = 1_000_000  # ns


def used(cpu_ms: int, memory: int) -> agent_pb2.StatsContainerResponse:
    """What the guest answers for one container; the links are the VM's."""
    response = agent_pb2.StatsContainerResponse()
    response.cgroup_stats.cpu_stats.cpu_usage.total_usage = cpu_ms * MS
    response.cgroup_stats.memory_stats.usage.usage = memory
    response.network_stats.add(name="eth0", rx_bytes=100)
    return response


@pytest_asyncio.fixture
async def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TaskClient]:
    """A pod with its sandbox container and a and b."""
    monkeypatch.setattr(container_manager, "host_is_unified", lambda: True)
    client = TaskClient(tmp_path, pod="pod")
    for name in ("pod", "a", "b"):
        await client.create(name)
        await client.start(name)
    client.agent.stats_of.update(pod=used(10, MIB), a=used(200, 20 * MIB), b=used(300, 30 * MIB))
    client.sandbox.usage = HostUsage(cpu=900 * MS, memory=160 * MIB)
    yield client
    await client.close()


async def stats(shim: TaskClient, name: str) -> Any:
    answer = await shim.call("Stats", id=name)
    return metrics_v2_pb2.Metrics.FromString(answer.stats.value)


async def test_the_containers_add_up_to_the_pod(shim: TaskClient) -> None:
    found = [await stats(shim, name) for name in ("pod", "a", "b")]
    assert [figures.cpu.usage_usec for figures in found] == [400_000, 200_000, 300_000]
    assert [figures.memory.usage for figures in found] == [110 * MIB, 20 * MIB, 30 * MIB]
    assert found[0].cpu.system_usec == 390_000, "what the VM costs is no time of the container's program"


async def test_the_links_are_told_once(shim: TaskClient) -> None:
    found = [await stats(shim, name) for name in ("pod", "a", "b")]
    assert [[link.name for link in figures.network] for figures in found] == [["eth0"], [], []]


async def test_cpu_time_never_goes_back(shim: TaskClient) -> None:
    """Neither when a container goes with what it had used, nor when the two clocks disagree."""
    first = (await stats(shim, "pod")).cpu.usage_usec
    shim.guest("a").exit(0)
    await shim.wait("a")
    await shim.delete("a")
    assert (await stats(shim, "pod")).cpu.usage_usec == first, "a's time is not charged to the sandbox"
    shim.agent.stats_of["b"] = used(350, 0)
    assert (await stats(shim, "pod")).cpu.usage_usec == first
    shim.agent.stats_of["b"] = used(100, 0)
    assert (await stats(shim, "pod")).cpu.usage_usec == first


async def end(shim: TaskClient, name: str) -> None:
    shim.guest(name).exit(0)
    await shim.wait(name)


async def test_what_had_been_used_is_told_after_the_end(shim: TaskClient) -> None:
    """As the guest says at the end; it is asked once, and no more when its answer is there."""
    await stats(shim, "a")
    shim.agent.stats_of["a"] = used(250, MIB)
    await end(shim, "a")
    shim.agent.stats_of["a"] = used(0, 0)
    found = [await stats(shim, "a") for _ in range(2)]
    assert [(figures.cpu.usage_usec, figures.memory.usage) for figures in found] == [(250_000, MIB)] * 2
    assert [link.name for link in found[0].network] == []


async def test_a_guest_that_went_with_its_figures(shim: TaskClient) -> None:
    """What was told last stays, and zeros where nothing was."""
    first = await stats(shim, "pod")
    shim.sandbox.die()
    for name in ("pod", "a"):
        await shim.wait(name)
    assert await stats(shim, "pod") == first
    assert (await stats(shim, "a")).cpu.usage_usec == 0


async def test_an_exit_does_not_wait_for_the_last_figures(shim: TaskClient) -> None:
    answer = asyncio.Event()

    async def until() -> None:
        await answer.wait()

    shim.agent.before["stats_container"] = until
    await asyncio.wait_for(end(shim, "a"), 20)
    asked = asyncio.create_task(stats(shim, "a"))
    await shim.delete("a")
    assert (await asked).cpu.usage_usec == 0
    assert not answer.is_set()


async def test_a_container_that_goes_meanwhile_hurts_nobody(shim: TaskClient) -> None:
    async def gone() -> None:
        if shim.agent.calls[-1] == ("stats_container", "a", ""):
            raise GuestError("no such container", code="NOT_FOUND")

    shim.agent.before["stats_container"] = gone
    assert (await stats(shim, "pod")).cpu.usage_usec == 600_000


async def test_a_single_container_has_its_own_figures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit holds in the guest, so the VM's memory must not be counted against it."""
    monkeypatch.setattr(container_manager, "host_is_unified", lambda: True)
    shim = TaskClient(tmp_path)
    await shim.create()
    shim.agent.stats = used(10, MIB)
    shim.sandbox.usage = HostUsage(cpu=900 * MS, memory=160 * MIB)
    figures = await stats(shim, "c")
    assert (figures.cpu.usage_usec, figures.memory.usage, figures.network[0].name) == (10_000, MIB, "eth0")
    await shim.close()


async def test_a_guest_that_counts_to_the_end(shim: TaskClient) -> None:
    """Its numbers are as large as they can be; they are told, and the VM's cost cannot be added."""
    most = (1 << 64) - 1
    for name in ("pod", "a"):
        figures = shim.agent.stats_of[name].cgroup_stats
        figures.cpu_stats.cpu_usage.total_usage = figures.cpu_stats.cpu_usage.usage_in_kernelmode = most
        figures.memory_stats.usage.usage = most
    shim.sandbox.usage = HostUsage(cpu=1 << 70, memory=1 << 70)
    for name in ("pod", "a"):
        found = await stats(shim, name)
        assert (found.cpu.usage_usec, found.memory.usage) == (most // 1000, most)
