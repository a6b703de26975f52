"""The measurement of a vCPU ends in time, whatever /dev/kvm does, and is told in words.

No test opens /dev/kvm: `kata-ctl check` does, and the bench host's suite has a real one.
"""

from __future__ import annotations

import os
import time

import pytest

from ctl import vcpu
from ctl.vcpu import Measured, judge, measure


def children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return set(file.read().split())


def test_a_result_comes_back_from_the_child() -> None:
    before = children()
    assert measure("/x", work=lambda device: float(len(device))) == Measured(ratio=2.0)
    assert children() == before


def test_what_never_ends_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu, "LIMIT", 0.1)

    def sleep(_: str) -> float:
        time.sleep(600)
        return 1.0

    before = children()
    assert measure("/x", work=sleep) == Measured(timed_out=True)
    assert children() == before


def test_an_error_is_told_with_its_file() -> None:
    problem = measure("/no/such/kvm", work=vcpu._ratio).problem
    assert problem == "/no/such/kvm: No such file or directory"


def test_a_device_that_is_no_kvm(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("kvm") / "kvm"
    path.write_bytes(b"")
    assert measure(str(path), work=vcpu._ratio).problem == f"{path}: Inappropriate ioctl for device"


def test_the_hosts_loop_takes_time_by_its_rounds() -> None:
    short, long = min(vcpu._host_loop(10_000) for _ in range(5)), vcpu._host_loop(10_000_000)
    assert long > 20 * short


@pytest.mark.parametrize(
    ("measured", "useful", "words"),
    [
        (Measured(ratio=1.0), True, "works: a loop on a vCPU takes 1.0 times"),
        (Measured(ratio=4.9), True, "works"),
        (Measured(ratio=97.0), False, "opens but emulates the CPU: a loop on a vCPU takes about 100 times"),
        (Measured(ratio=21544.0), False, "about 20000 times as long as on the host; TCG is faster"),
        (Measured(timed_out=True), False, "did not end within 2 s"),
        (Measured(problem="/dev/kvm: Permission denied"), False, "Permission denied"),
    ],
)
def test_the_words(measured: Measured, useful: bool, words: str) -> None:
    told = judge(measured)
    assert told[0] is useful
    assert words in told[1]
