"""Statistics of the guest arrive in the host's form, with every limit filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto import agent_pb2, metrics_v1_pb2, metrics_v2_pb2
from shim.tasks import container_manager
from shim.tasks.stats import to_any
from tests.unit.shim.fakes import TaskClient

UNLIMITED = 1 << 62


def sample() -> agent_pb2.StatsContainerResponse:
    """As our agent answers: cgroup v2 names in memory.stat, times in ns."""
    response = agent_pb2.StatsContainerResponse()
    group = response.cgroup_stats
    group.pids_stats.current, group.pids_stats.limit = 3, 100
    usage = group.cpu_stats.cpu_usage
    usage.total_usage, usage.usage_in_usermode, usage.usage_in_kernelmode = 9_000_000, 5_000_000, 4_000_000
    group.cpu_stats.throttling_data.throttled_time = 7_000
    group.memory_stats.usage.usage = 1000
    group.memory_stats.usage.limit = 4096
    group.memory_stats.stats.update(anon=600, file=300, inactive_file=200, pgfault=11, pgmajfault=2)
    for op, size, count in (("Read", 4096, 1), ("Write", 8192, 2)):
        group.blkio_stats.io_service_bytes_recursive.add(major=254, minor=0, op=op, value=size)
        group.blkio_stats.io_serviced_recursive.add(major=254, minor=0, op=op, value=count)
    group.hugetlb_stats["2MB"].usage = 5
    response.network_stats.add(name="eth0", rx_bytes=10, tx_dropped=1)
    return response


def test_of_a_host_with_cgroup_v2() -> None:
    packed = to_any(sample(), unified=True)
    assert packed.type_url == "io.containerd.cgroups.v2.Metrics"
    metrics = metrics_v2_pb2.Metrics.FromString(packed.value)
    assert (metrics.pids.current, metrics.pids.limit) == (3, 100)
    assert (metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.system_usec) == (9000, 5000, 4000)
    assert metrics.cpu.throttled_usec == 7
    memory = metrics.memory
    assert (memory.usage, memory.usage_limit, memory.anon, memory.file) == (1000, 4096, 600, 300)
    assert (memory.inactive_file, memory.pgfault, memory.pgmajfault) == (200, 11, 2)
    (device,) = metrics.io.usage
    assert (device.major, device.rbytes, device.wbytes, device.rios, device.wios) == (254, 4096, 8192, 1, 2)
    assert (metrics.hugetlb[0].pagesize, metrics.hugetlb[0].current) == ("2MB", 5)
    assert (metrics.network[0].name, metrics.network[0].rx_bytes) == ("eth0", 10)
    assert metrics.network[0].tx_dropped == 1


def test_of_a_host_with_cgroup_v1() -> None:
    packed = to_any(sample(), unified=False)
    assert packed.type_url == "io.containerd.cgroups.v1.Metrics"
    metrics = metrics_v1_pb2.Metrics.FromString(packed.value)
    assert metrics.cpu.usage.total == 9_000_000
    memory = metrics.memory
    assert (memory.usage.usage, memory.usage.limit) == (1000, 4096)
    assert (memory.total_rss, memory.rss, memory.total_cache, memory.total_inactive_file) == (
        600,
        600,
        300,
        200,
    )
    assert (memory.total_pg_fault, memory.total_pg_maj_fault) == (11, 2)
    assert [entry.value for entry in metrics.blkio.io_service_bytes_recursive] == [4096, 8192]
    assert metrics.network[0].name == "eth0"


def test_out_of_memory_is_counted() -> None:
    """memory.events has no field in the agent's protocol; our agent puts it among the other counters."""
    response = agent_pb2.StatsContainerResponse()
    response.cgroup_stats.memory_stats.stats.update({"memory.events.oom": 3, "memory.events.oom_kill": 2})
    v1 = metrics_v1_pb2.Metrics.FromString(to_any(response, unified=False).value)
    v2 = metrics_v2_pb2.Metrics.FromString(to_any(response, unified=True).value)
    assert v1.memory_oom_control.oom_kill == 2
    assert (v2.memory_events.oom, v2.memory_events.oom_kill) == (3, 2)


def test_names_of_a_guest_with_cgroup_v1() -> None:
    """A stock guest may have either; v1's totals win over the container's own."""
    response = agent_pb2.StatsContainerResponse()
    response.cgroup_stats.memory_stats.stats.update(rss=1, total_rss=2, total_inactive_file=3, total_cache=4)
    metrics = metrics_v2_pb2.Metrics.FromString(to_any(response, unified=True).value)
    assert (metrics.memory.anon, metrics.memory.inactive_file, metrics.memory.file) == (2, 3, 4)


@pytest.mark.parametrize("limit", [0, (1 << 63) - 4096, (1 << 64) - 1])
def test_no_limit_is_above_what_any_memory_has(limit: int) -> None:
    response = agent_pb2.StatsContainerResponse()
    response.cgroup_stats.memory_stats.usage.limit = limit
    v1 = metrics_v1_pb2.Metrics.FromString(to_any(response, unified=False).value)
    v2 = metrics_v2_pb2.Metrics.FromString(to_any(response, unified=True).value)
    limits = [v1.memory.usage.limit, v1.memory.swap.limit, v2.memory.usage_limit, v2.memory.swap_limit]
    limits += [v1.memory.hierarchical_memory_limit, v1.memory.hierarchical_swap_limit, v2.pids.limit]
    assert all(value > UNLIMITED for value in limits)
    assert v1.pids.limit == 0, "what cgroup v1's readers take for none"


@pytest.mark.parametrize("unified", [True, False])
async def test_through_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unified: bool) -> None:
    """Also for a container that does not run yet."""
    monkeypatch.setattr(container_manager, "host_is_unified", lambda: unified)
    shim = TaskClient(tmp_path)
    await shim.create()
    shim.agent.stats = sample()
    answer = await shim.call("Stats", id="c")
    assert answer.stats.type_url == f"io.containerd.cgroups.v{2 if unified else 1}.Metrics"
    await shim.close()
