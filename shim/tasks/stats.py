"""A container's statistics in the form that containerd expects on this host.

What: `to_any` converts the agent's StatsContainerResponse into io.containerd.cgroups.v1.Metrics or
io.containerd.cgroups.v2.Metrics, packed with the bare message name that containerd 1.6 looks up.
Why by the host's mode: containerd's own metrics collector expects the mode of the host it runs on,
whatever the guest has. The guest's memory.stat names are understood of both modes.
Invariants: a memory limit is never 0: CRI subtracts the working set from it, unsigned. A container
without a limit has one above 2^62.
Source: facts/containerd-shim.md 3.3; cgroup-v1/memory and cgroup-v2 of the kernel's admin guide.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import any_pb2
from google.protobuf.message import Message

from proto import agent_pb2, metrics_v1_pb2, metrics_v2_pb2

__all__ = ["host_is_unified", "to_any"]

#: What cgroup v1 shows for "no limit", and cgroup v2's "max" as containerd writes it.
_V1_UNLIMITED = (1 << 63) - 4096
_V2_UNLIMITED = (1 << 64) - 1
_UNLIMITED_FROM = 1 << 62

#: fields of v1's MemoryStat whose name in the guest's memory.stat is neither theirs nor v2's
_V1_ALIASES = {
    "cache": ("file",),
    "rss": ("anon",),
    "rss_huge": ("anon_thp",),
    "mapped_file": ("file_mapped",),
    "dirty": ("file_dirty",),
    "writeback": ("file_writeback",),
    "pg_pg_in": ("pgpgin",),
    "pg_pg_out": ("pgpgout",),
    "pg_fault": ("pgfault",),
    "pg_maj_fault": ("pgmajfault",),
}
#: and of v2's
_V2_ALIASES = {
    "anon": ("total_rss", "rss"),
    "file": ("total_cache", "cache"),
    "file_mapped": ("total_mapped_file", "mapped_file"),
    "file_dirty": ("total_dirty", "dirty"),
    "file_writeback": ("total_writeback", "writeback"),
    "anon_thp": ("total_rss_huge", "anon_transparent_hugepages"),
}


def host_is_unified() -> bool:
    """Whether /sys/fs/cgroup is cgroup v2 alone, as on hosts without any v1 controller."""
    return os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def to_any(response: agent_pb2.StatsContainerResponse, *, unified: bool) -> any_pb2.Any:
    """The statistics packed for StatsResponse."""
    metrics: Message = _v2(response) if unified else _v1(response)
    return any_pb2.Any(type_url=metrics.DESCRIPTOR.full_name, value=metrics.SerializeToString())


def _limit(value: int, unlimited: int) -> int:
    return unlimited if value == 0 or value >= _UNLIMITED_FROM else value


def _copy_events(target: Any, stats: Mapping[str, int]) -> None:
    """What our agent counts of memory.events, into the fields of `target` with these names."""
    for field in target.DESCRIPTOR.fields:
        value = stats.get(f"memory.events.{field.name}")
        if value is not None:
            setattr(target, field.name, value)


def _copy_stats(
    target: Any, stats: Mapping[str, int], aliases: Mapping[str, Iterable[str]], prefix: str = ""
) -> None:
    """Fill the integer fields of `target` that `stats` has under their own or another name."""
    for field in target.DESCRIPTOR.fields:
        if field.message_type is not None:
            continue
        plain = field.name.removeprefix(prefix) if prefix else field.name
        names = (field.name, f"total_{field.name}", plain, *aliases.get(plain, ()))
        for name in names:
            if name in stats:
                setattr(target, field.name, stats[name])
                break


def _v1(response: agent_pb2.StatsContainerResponse) -> metrics_v1_pb2.Metrics:
    guest = response.cgroup_stats
    metrics = metrics_v1_pb2.Metrics()
    metrics.pids.current, metrics.pids.limit = guest.pids_stats.current, guest.pids_stats.limit
    usage, throttling = guest.cpu_stats.cpu_usage, guest.cpu_stats.throttling_data
    metrics.cpu.usage.total = usage.total_usage
    metrics.cpu.usage.kernel = usage.usage_in_kernelmode
    metrics.cpu.usage.user = usage.usage_in_usermode
    metrics.cpu.usage.per_cpu.extend(usage.percpu_usage)
    metrics.cpu.throttling.periods = throttling.periods
    metrics.cpu.throttling.throttled_periods = throttling.throttled_periods
    metrics.cpu.throttling.throttled_time = throttling.throttled_time
    memory = guest.memory_stats
    _copy_stats(metrics.memory, memory.stats, _V1_ALIASES, "total_")
    _copy_events(metrics.memory_oom_control, memory.stats)
    metrics.memory.cache = memory.cache or metrics.memory.cache
    metrics.memory.hierarchical_memory_limit = _limit(memory.usage.limit, _V1_UNLIMITED)
    metrics.memory.hierarchical_swap_limit = _limit(memory.swap_usage.limit, _V1_UNLIMITED)
    for entry, data in (
        (metrics.memory.usage, memory.usage),
        (metrics.memory.swap, memory.swap_usage),
        (metrics.memory.kernel, memory.kernel_usage),
    ):
        entry.usage, entry.max, entry.failcnt = data.usage, data.max_usage, data.failcnt
        entry.limit = _limit(data.limit, _V1_UNLIMITED)
    for name in metrics.blkio.DESCRIPTOR.fields_by_name:
        for item in getattr(guest.blkio_stats, name):
            getattr(metrics.blkio, name).add(op=item.op, major=item.major, minor=item.minor, value=item.value)
    for size, huge in guest.hugetlb_stats.items():
        metrics.hugetlb.add(usage=huge.usage, max=huge.max_usage, failcnt=huge.failcnt, pagesize=size)
    _network(metrics, response)
    return metrics


def _v2(response: agent_pb2.StatsContainerResponse) -> metrics_v2_pb2.Metrics:
    guest = response.cgroup_stats
    metrics = metrics_v2_pb2.Metrics()
    metrics.pids.current = guest.pids_stats.current
    metrics.pids.limit = guest.pids_stats.limit or _V2_UNLIMITED  # "max", as containerd's own reads it
    usage, throttling = guest.cpu_stats.cpu_usage, guest.cpu_stats.throttling_data
    metrics.cpu.usage_usec = usage.total_usage // 1000
    metrics.cpu.user_usec = usage.usage_in_usermode // 1000
    metrics.cpu.system_usec = usage.usage_in_kernelmode // 1000
    metrics.cpu.nr_periods = throttling.periods
    metrics.cpu.nr_throttled = throttling.throttled_periods
    metrics.cpu.throttled_usec = throttling.throttled_time // 1000
    memory = guest.memory_stats
    _copy_stats(metrics.memory, memory.stats, _V2_ALIASES)
    metrics.memory.usage = memory.usage.usage
    metrics.memory.usage_limit = _limit(memory.usage.limit, _V2_UNLIMITED)
    metrics.memory.max_usage = memory.usage.max_usage
    metrics.memory.swap_usage = memory.swap_usage.usage
    metrics.memory.swap_limit = _limit(memory.swap_usage.limit, _V2_UNLIMITED)
    metrics.memory.swap_max_usage = memory.swap_usage.max_usage
    metrics.memory_events.max = memory.usage.failcnt
    _copy_events(metrics.memory_events, memory.stats)
    devices: dict[tuple[int, int], metrics_v2_pb2.IOEntry] = {}
    for items, unit in (
        (guest.blkio_stats.io_service_bytes_recursive, "bytes"),
        (guest.blkio_stats.io_serviced_recursive, "ios"),
    ):
        for item in items:
            key = (item.major, item.minor)
            if key not in devices:
                devices[key] = metrics.io.usage.add(major=item.major, minor=item.minor)
            if item.op.lower() in {"read", "write"}:
                setattr(devices[key], item.op[0].lower() + unit, item.value)
    for size, huge in guest.hugetlb_stats.items():
        metrics.hugetlb.add(current=huge.usage, max=huge.max_usage, failcnt=huge.failcnt, pagesize=size)
    _network(metrics, response)
    return metrics


def _network(metrics: Any, response: agent_pb2.StatsContainerResponse) -> None:
    for link in response.network_stats:
        metrics.network.add(**{field.name: getattr(link, field.name) for field in link.DESCRIPTOR.fields})
