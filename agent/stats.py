"""Counters of a cgroup (version 2), of the network and of a volume, in the terms of the agent's protocol.

What: text of cgroup files and of /proc/net/dev in, `StatsContainerResponse` out.
Why lenient: a controller that is off has no files; its counters are then zero.
Invariants: times in nanoseconds, sizes in bytes; a limit of "max" is 2**64 - 1 for memory (as
cgroup v1 has no limit) and 0 for pids, as Kata's agent reports them. What memory.events counts, for
which the protocol has no field, is in the map `stats` under `memory.events.NAME`.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from proto import agent_pb2, csi_pb2
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent.container import Container

__all__ = ["PROCESSES_MAX", "container_stats", "flat", "process_list", "volume_stats"]

PROCESSES_MAX = 1024

_UNLIMITED = 2**64 - 1
# io.stat key -> (field of BlkioStats, operation)
_IO = {
    "rbytes": ("io_service_bytes_recursive", "read"),
    "wbytes": ("io_service_bytes_recursive", "write"),
    "rios": ("io_serviced_recursive", "read"),
    "wios": ("io_serviced_recursive", "write"),
}


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(text: str, unlimited: int = 0) -> int:
    text = text.strip()
    if text == "max":
        return unlimited
    return int(text) if text.isdigit() else 0


def flat(text: str) -> dict[str, int]:
    """A flat-keyed cgroup file: one `key number` per line."""
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdigit():
            found[key] = int(value)
    return found


def _cpu(cgroup: str, stats: agent_pb2.CpuStats) -> None:
    cpu = flat(_read(f"{cgroup}/cpu.stat"))
    stats.cpu_usage.total_usage = cpu.get("usage_usec", 0) * 1000
    stats.cpu_usage.usage_in_usermode = cpu.get("user_usec", 0) * 1000
    stats.cpu_usage.usage_in_kernelmode = cpu.get("system_usec", 0) * 1000
    stats.throttling_data.periods = cpu.get("nr_periods", 0)
    stats.throttling_data.throttled_periods = cpu.get("nr_throttled", 0)
    stats.throttling_data.throttled_time = cpu.get("throttled_usec", 0) * 1000


def _memory(cgroup: str, stats: agent_pb2.MemoryStats) -> None:
    detail = flat(_read(f"{cgroup}/memory.stat"))
    events = flat(_read(f"{cgroup}/memory.events"))
    stats.cache = detail.get("file", 0)
    stats.use_hierarchy = True
    stats.usage.usage = _number(_read(f"{cgroup}/memory.current"))
    stats.usage.max_usage = _number(_read(f"{cgroup}/memory.peak"))  # Linux 5.19
    stats.usage.limit = _number(_read(f"{cgroup}/memory.max"), _UNLIMITED)
    stats.usage.failcnt = events.get("max", 0)
    stats.swap_usage.usage = _number(_read(f"{cgroup}/memory.swap.current"))
    stats.swap_usage.limit = _number(_read(f"{cgroup}/memory.swap.max"), _UNLIMITED)
    stats.kernel_usage.usage = detail.get("kernel", 0)
    for key, value in detail.items():
        stats.stats[key] = value
    for key, value in events.items():
        stats.stats[f"memory.events.{key}"] = value


def _blkio(cgroup: str, stats: agent_pb2.BlkioStats) -> None:
    for line in _read(f"{cgroup}/io.stat").splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key in _IO and value.isdigit() and major.isdigit() and minor.isdigit():
                field, operation = _IO[key]
                getattr(stats, field).add(major=int(major), minor=int(minor), op=operation, value=int(value))


def _hugetlb(cgroup: str, stats: agent_pb2.CgroupStats) -> None:
    try:
        names = os.listdir(cgroup)
    except OSError:
        return
    for name in names:
        kind, _, rest = name.partition(".")
        size, _, counter = rest.partition(".")
        if kind == "hugetlb" and counter == "current":
            huge = stats.hugetlb_stats[size]
            huge.usage = _number(_read(f"{cgroup}/{name}"))
            huge.failcnt = flat(_read(f"{cgroup}/hugetlb.{size}.events")).get("max", 0)


def _network(text: str, response: agent_pb2.StatsContainerResponse) -> None:
    """The links of /proc/net/dev but the loopback: the VM's, so of all containers alike; proc(5)."""
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        counters = rest.split()
        if not colon or len(counters) < 16 or name.strip() == "lo" or not all(map(str.isdigit, counters)):
            continue
        numbers = [int(counter) for counter in counters]
        names = ("bytes", "packets", "errors", "dropped")
        fields = {f"rx_{key}": value for key, value in zip(names, numbers[:4], strict=True)}
        fields |= {f"tx_{key}": value for key, value in zip(names, numbers[8:12], strict=True)}
        response.network_stats.add(name=name.strip(), **fields)


def container_stats(cgroup: str, links: str = "/proc/net/dev") -> agent_pb2.StatsContainerResponse:
    """Everything the cgroup directory and the list of links tell."""
    response = agent_pb2.StatsContainerResponse()
    _network(_read(links), response)
    stats = response.cgroup_stats
    _cpu(cgroup, stats.cpu_stats)
    _memory(cgroup, stats.memory_stats)
    stats.pids_stats.current = _number(_read(f"{cgroup}/pids.current"))
    stats.pids_stats.limit = _number(_read(f"{cgroup}/pids.max"))
    _blkio(cgroup, stats.blkio_stats)
    _hugetlb(cgroup, stats)
    return response


def process_list(container: Container) -> str:
    """JSON: `{"pid": N}` for each process of the container, with `"exec": ID` for those that the host knows.

    The init's exec id is empty. At most `PROCESSES_MAX` processes are listed.
    """
    known = {process.pid: process.exec_id for process in container.execs.values() if process.alive}
    if container.init is not None:
        known[container.init.pid] = ""
    pids = container.pids()[:PROCESSES_MAX]
    return json.dumps([{"pid": pid, "exec": known[pid]} if pid in known else {"pid": pid} for pid in pids])


def volume_stats(path: str) -> csi_pb2.VolumeStatsResponse:
    """statvfs of a mounted volume. Raises RpcError(NOT_FOUND) when there is nothing at `path`."""
    try:
        info = os.statvfs(path)
    except OSError as error:
        raise RpcError(Code.NOT_FOUND, f"volume {path[:200]!r}: {error.strerror}") from None
    response = csi_pb2.VolumeStatsResponse()
    response.usage.add(
        available=info.f_bavail * info.f_frsize,
        total=info.f_blocks * info.f_frsize,
        used=(info.f_blocks - info.f_bfree) * info.f_frsize,
        unit=csi_pb2.VolumeUsage.BYTES,
    )
    response.usage.add(
        available=info.f_favail,
        total=info.f_files,
        used=info.f_files - info.f_ffree,
        unit=csi_pb2.VolumeUsage.INODES,
    )
    return response
