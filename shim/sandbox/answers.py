"""What the agent answers, checked: how much of it there is, and whether it is what it should be.

What: `check_stats` for a container's statistics, `check_volume` for a volume's, `processes` for the list of a
container's processes.
Why: an answer of 4 MiB has room for two million devices or processes, and whoever walks through it keeps the
loop for seconds; a number that is none fails far from here, with an error that is nobody's.
Invariants: whatever is wrong is a GuestError; at most `ENTRIES` things are counted up in one answer, which a
few milliseconds walk through. Values are the guest's own and of 64 bits: what they mean is not checked.
Source: Kata's agent.proto; docs/guest.md for the list of processes.
"""

from __future__ import annotations

from devices import foreign_json
from devices.errors import GuestError
from proto import agent_pb2, csi_pb2
from shim.protocols import GuestProcess

__all__ = ["ENTRIES", "LIMIT", "PROCESSES", "check_stats", "check_volume", "processes"]

LIMIT = 256 << 10
"""Bytes of an answer, if its call does not say otherwise; the largest of an honest agent has 170 KiB."""
ENTRIES = 4096
"""Counters of devices, CPUs, links and the like in one container's statistics."""
PROCESSES = 1024
_USAGES = 16  # bytes and inodes are two
_MAX_PID = 1 << 22


def check_stats(answer: agent_pb2.StatsContainerResponse) -> agent_pb2.StatsContainerResponse:
    """`answer`, if it can be walked through. Raises GuestError."""
    group = answer.cgroup_stats
    lists = [answer.network_stats, group.hugetlb_stats, group.memory_stats.stats]
    lists += [group.cpu_stats.cpu_usage.percpu_usage]
    lists += [getattr(group.blkio_stats, name) for name in group.blkio_stats.DESCRIPTOR.fields_by_name]
    count = sum(map(len, lists))
    if count > ENTRIES:
        raise GuestError(
            f"the agent told {count} figures of one container, where {ENTRIES} are the most", phase="stats"
        )
    return answer


def check_volume(answer: csi_pb2.VolumeStatsResponse) -> csi_pb2.VolumeStatsResponse:
    """`answer`, if it can be walked through. Raises GuestError."""
    if len(answer.usage) > _USAGES:
        raise GuestError(f"the agent told {len(answer.usage)} figures of one volume", phase="volume")
    return answer


def processes(text: str) -> list[GuestProcess]:
    """The first `PROCESSES` of the list. Raises GuestError."""
    try:
        listed = foreign_json.loads(text)
    except ValueError as error:
        raise _none(str(error)) from error
    if not isinstance(listed, list):
        raise _none("it is no list")
    found = []
    for entry in listed[:PROCESSES]:
        pid = entry.get("pid") if isinstance(entry, dict) else None
        if not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid <= _MAX_PID:
            raise _none(f"{entry!r:.60} has no pid")
        exec_id = entry.get("exec")
        if not isinstance(exec_id, str | None):
            raise _none(f"{entry!r:.60} has an exec id that is no text")
        found.append(GuestProcess(pid, exec_id))
    return found


def _none(why: str) -> GuestError:
    return GuestError(f"the agent's list of processes is none: {why}", phase="agent")
