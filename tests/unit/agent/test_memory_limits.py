"""The kernel's limits grow with the guest's memory, and only those that nobody else has set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent import memory_limits as limits

MIB = 1 << 20


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Writes settings below a root of its own (`kernel(threads="5")`), and reads them all."""
    paths = {
        "threads": "kernel/threads-max",
        "watches": "fs/inotify/max_user_watches",
        "tcp": "net/ipv4/tcp_mem",
        "buffer": "net/ipv4/tcp_rmem",
        "tracked": "net/netfilter/nf_conntrack_max",
    }

    def change(**values: str) -> dict[str, str]:
        for name, value in values.items():
            path = tmp_path / paths[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value)
        found = {name: tmp_path / path for name, path in paths.items()}
        return {name: path.read_text() for name, path in found.items() if path.exists()}

    limits.note(200 * MIB)
    return change


def test_they_follow_in_proportion_up_to_their_bounds(
    kernel: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    kernel(threads="1600\n", watches="8192\n", tcp="2000\t3000\t4000\n", buffer="4096\t131072\t1000000\n")
    limits.follow(1000 * MIB, str(tmp_path))
    assert kernel() == {
        "threads": "8000",
        "watches": "40960",
        "tcp": "10000 15000 20000",
        "buffer": "4096 131072 5000000",
    }
    kernel(tracked="5000")  # its module was loaded meanwhile
    limits.follow(100_000 * MIB, str(tmp_path))
    assert kernel()["watches"] == str(1 << 20)
    assert kernel()["buffer"] == f"4096 131072 {6 << 20}"
    assert kernel()["tracked"] == str(1 << 18)


def test_nothing_is_lowered(kernel: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    before = kernel(threads="1600", buffer=f"4096 131072 {64 << 20}")
    for total in (100, 200, 205):
        limits.follow(total * MIB, str(tmp_path))
    assert kernel() == before
    limits.follow(400 * MIB, str(tmp_path))
    assert kernel()["buffer"] == before["buffer"]


def test_what_somebody_else_has_set_stays(kernel: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    kernel(threads="1600", watches="8192", tcp="1 2 3")
    limits.leave("net/ipv4/tcp_mem")  # a container's spec
    limits.follow(400 * MIB, str(tmp_path))
    kernel(watches="20000")  # a privileged container's own hand
    limits.follow(800 * MIB, str(tmp_path))
    assert kernel() == {"threads": "6400", "watches": "20000", "tcp": "1 2 3"}
    limits.follow(1600 * MIB, str(tmp_path))
    assert kernel()["watches"] == "20000"


def test_memory_is_read_as_the_kernel_tells_it(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:         218112 kB\nMemFree: 1 kB\n")
    assert limits.memory(str(tmp_path / "meminfo")) == 213 * MIB
    assert limits.memory() > 64 * MIB
