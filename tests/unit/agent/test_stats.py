"""Cgroup v2 files become the agent protocol's counters, and missing files become zeros."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.oom import oom_kills
from agent.stats import container_stats, volume_stats
from ttrpc import Code, RpcError

# As /proc/net/dev has it, proc(5).
LINKS = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls
    lo: 7 7 0 0 0 0 0 0 7 7 0 0 0 0 0 0
  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
"""


def test_a_full_cgroup(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\n"
        "nr_periods 4\nnr_throttled 3\nthrottled_usec 2\n",
        "memory.stat": "anon 5\nfile 6\nkernel 7\n",
        "memory.events": "low 0\nmax 9\noom 1\noom_kill 1\n",
        "memory.current": "100\n",
        "memory.peak": "200\n",
        "memory.max": "max\n",
        "memory.swap.current": "3\n",
        "memory.swap.max": "4\n",
        "pids.current": "2\n",
        "pids.max": "10\n",
        "io.stat": "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
        "hugetlb.2MB.current": "2097152\n",
        "hugetlb.2MB.events": "max 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    (tmp_path / "dev").write_text(LINKS)
    response = container_stats(str(tmp_path), str(tmp_path / "dev"))
    stats = response.cgroup_stats

    (link,) = response.network_stats
    assert (link.name, link.rx_bytes, link.rx_packets, link.rx_errors, link.rx_dropped) == (
        "eth0",
        1,
        2,
        3,
        4,
    )
    assert (link.tx_bytes, link.tx_packets, link.tx_errors, link.tx_dropped) == (9, 10, 11, 12)
    assert stats.cpu_stats.cpu_usage.total_usage == 30_000
    assert stats.cpu_stats.cpu_usage.usage_in_usermode == 20_000
    assert stats.cpu_stats.throttling_data.throttled_time == 2_000
    assert stats.memory_stats.usage.usage == 100
    assert stats.memory_stats.usage.max_usage == 200
    assert stats.memory_stats.usage.limit == 2**64 - 1
    assert stats.memory_stats.usage.failcnt == 9
    assert stats.memory_stats.swap_usage.limit == 4
    assert stats.memory_stats.cache == 6
    events = {f"memory.events.{key}": value for key, value in [("low", 0), ("max", 9), ("oom", 1)]}
    events["memory.events.oom_kill"] = 1
    assert dict(stats.memory_stats.stats) == {"anon": 5, "file": 6, "kernel": 7, **events}
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (2, 10)
    entries = [(e.major, e.minor, e.op, e.value) for e in stats.blkio_stats.io_service_bytes_recursive]
    assert entries == [(254, 0, "read", 1), (254, 0, "write", 2)]
    assert [e.value for e in stats.blkio_stats.io_serviced_recursive] == [3, 4]
    assert stats.hugetlb_stats["2MB"].usage == 2097152
    assert stats.hugetlb_stats["2MB"].failcnt == 1


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    stats = container_stats(str(tmp_path / "gone")).cgroup_stats

    assert stats.cpu_stats.cpu_usage.total_usage == 0
    assert stats.pids_stats.limit == 0


def test_odd_text_counts_as_zero(tmp_path: Path) -> None:
    (tmp_path / "io.stat").write_text("254:0\nnonsense a=b\n:: rbytes=1\n")
    (tmp_path / "memory.current").write_text("")
    (tmp_path / "cpu.stat").write_text("usage_usec\n")

    stats = container_stats(str(tmp_path)).cgroup_stats

    assert not stats.blkio_stats.io_service_bytes_recursive
    assert stats.memory_stats.usage.usage == 0


def test_a_volume(tmp_path: Path) -> None:
    usage = volume_stats(str(tmp_path)).usage

    assert usage[0].total >= usage[0].used > 0
    with pytest.raises(RpcError) as caught:
        volume_stats(str(tmp_path / "gone"))
    assert caught.value.code == Code.NOT_FOUND


def test_oom_kills() -> None:
    assert oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 1\n") == 2
    assert oom_kills("") == 0
