"""A part of the walk over all failpoints (tests/fault/walk.py): each action at passages all over a life."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testing.guest import guest_files
from tests.fault.points import ACTIONS
from tests.fault.walk import Walk, walking

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="VMs need root")]

STRIDE = 21
"""Every so many pairs of passage and action; no multiple of the number of actions, so that all are met."""


@pytest.fixture(scope="module")
def walk() -> Iterator[Walk]:
    missing = [name for name, path in guest_files().items() if not path.exists()]
    if missing:
        pytest.fail(f"the guest is not built: {', '.join(missing)}; run `make guest`", pytrace=False)
    with walking() as walk:
        yield walk


def test_a_life_with_a_fault_leaves_nothing_and_the_next_one_works(walk: Walk) -> None:
    names = walk.count()
    for way in ("thread", "spawn", "qmp", "agent", "vsock"):
        assert any(name.startswith(f"{way} ") for name in names), f"no passage by {way}"
    pairs = [(number, action) for number in range(1, len(names) + 1) for action in ACTIONS]
    wrong = []
    for number, action in pairs[::STRIDE]:
        life = walk.broken(number, action)
        wrong += [f"{number} {names[number - 1]}, {action}: {line}" for line in life.wrong]
    assert wrong == []
    assert walk.live().steps[-1] == "delete"


@pytest.mark.parametrize("directory", ["/run/kata-shim", "/run/kata-containers"])
@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_a_host_that_takes_no_more_files(walk: Walk, directory: str, fault: str) -> None:
    """The caller is told so, nothing stays, and with room the same id works."""
    with walk.over(directory, "ro" if fault == "read-only" else "size=4k,nr_inodes=2"):
        life = walk.live()
    assert life.wrong == []
    assert life.steps[0].startswith("FAILED_PRECONDITION"), life.steps
    told = "Read-only file system" if fault == "read-only" else "No space left on device"
    assert told in life.steps[0]
    assert walk.live().steps[-1] == "delete"


def test_a_shim_that_may_open_no_more_files(walk: Walk) -> None:
    """Whichever step the descriptors end at: all are refused cleanly."""
    wrong, untold = [], []
    for limit in range(12, 28, 3):  # with some more it is the VMM that starves, and boots until its deadline
        with walk.shims_with(
            f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
        ):
            life = walk.live()
        untold += [step for step in life.steps if "Too many open files" not in step or "OSError" in step]
        wrong += [f"{limit} descriptors: {line}" for line in life.wrong]
    assert wrong == []
    assert untold == [], untold
    assert walk.live().steps[-1] == "delete"


def test_a_clock_that_jumps(walk: Walk) -> None:
    """Two days back and forth each second: nothing ends early or hangs, for no limit is of that clock."""
    days = "(-86400, 86400)[int(real()) % 2]"
    with walk.shims_with(f"import time; real = time.time; time.time = lambda: real() + {days}"):
        life = walk.live()
    assert life.wrong == []
    assert life.steps[-1] == "delete"


def test_a_shim_that_may_start_no_more_threads(walk: Walk) -> None:
    """The limit of its cgroup, or of the service: wherever it is met the caller is told, nothing stays, and
    with a higher one the same id works."""
    wrong, untold = [], []
    with limited_processes() as (cgroup, limit):
        for number in range(1, 12, 2):
            limit.write_text(str(number))
            with walk.shims_with(f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')"):
                life = walk.live()
            told = ("limit of processes", "Cannot allocate memory")  # the kernel's word for some forks
            if life.steps[-1] != "delete" and not any(word in life.steps[-1] for word in told):
                untold.append(f"{number}: {life.steps}")
            wrong += [f"{number} processes: {line}" for line in life.wrong]
    assert wrong == []
    assert untold == [], untold
    assert walk.live().steps[-1] == "delete"


@contextmanager
def limited_processes() -> Iterator[tuple[Path, Path]]:
    """A cgroup on the host, and its file with the limit of processes."""
    for root in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
        made = Path(root, f"kata-few-{os.getpid()}")
        if (Path(root) / "cgroup.procs").exists():
            break
    made.mkdir()
    try:
        if not (made / "pids.max").exists():
            pytest.skip("this host has no pids controller")
        yield made, made / "pids.max"
    finally:
        made.rmdir()
