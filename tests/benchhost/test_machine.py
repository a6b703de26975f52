"""The bench host cannot write to this machine, ends when it must, and is tried again for one reason only."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from testing.guest import PROJECT
from tests.benchhost.machine import Event, Result, Settings, events, run, soft_lockup

_STUCK = "[   40.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [qemu-system-x86:412]\n"
_PANIC = "[   40.2] Kernel panic - not syncing: softlockup: hung tasks\n"
_BARE = Settings(limit=10, modules=(), memory=1024)


@pytest.mark.parametrize(
    ("console", "verdict"),
    [
        ("", False),
        (_STUCK, False),  # it recovered: the machine died of something else
        (_PANIC, False),
        (_STUCK + "[   40.2] Modules linked in: kvm_amd kvm\n" + _PANIC, True),
        (_STUCK + "[   40.2] Kernel panic - not syncing: Attempted to kill init!\n", False),
        ("[   40.1] watchdog: Watchdog detected hard LOCKUP on cpu 1\n" + _PANIC, False),
    ],
)
def test_only_a_panic_after_a_soft_lockup_has_the_signature(console: str, verdict: bool) -> None:
    assert soft_lockup(console) is verdict


@pytest.mark.e2e
def test_root_inside_cannot_write_here_and_a_job_that_hangs_is_ended() -> None:
    victim = PROJECT / f"written-by-the-bench-host-{time.time_ns()}"
    job = f"""
        mkdir /tmp/rw
        mount -t virtiofs -o rw host /tmp/rw && echo mounted read-write
        touch /tmp/rw{victim} || echo no file
        mount -o remount,rw /tmp/rw
        echo changed >>/tmp/rw{PROJECT}/Makefile || echo no change
        mknod /tmp/rw/tmp/disk b 254 0 || echo no device
        touch {victim} && echo written to memory
        exec sleep infinity
    """
    begin = time.monotonic()
    before = (PROJECT / "Makefile").read_bytes()
    result = run(job, _BARE)
    for word in ("mounted read-write", "no file", "no change", "no device", "written to memory"):
        assert word in result.text, result.explain()
    assert result.text.count("Read-only file system") == 3, result.explain()
    assert not victim.exists()
    assert (PROJECT / "Makefile").read_bytes() == before
    assert (result.code, result.reason) == (None, "the job did not end within 10 s")
    assert 10 <= result.seconds <= time.monotonic() - begin


@pytest.mark.e2e
def test_a_soft_lockup_is_tried_again_once_and_another_panic_is_not() -> None:
    crash = "echo c >/proc/sysrq-trigger"
    lines = [line.partition("] ")[2].strip() for line in (_STUCK, _PANIC)]
    signature = "; ".join(f"echo '<0>{line}' >/dev/kmsg" for line in lines)
    jobs = iter([f"echo one; {signature}; {crash}", f"echo two; {crash}"])
    results: list[Result] = []
    seen: list[Event] = list(events(lambda: next(jobs), _BARE, results.append))
    assert [event.kind for event in seen] == ["output", "retry", "output"]
    assert [seen[0].data, seen[2].data] == [b"one\n", b"two\n"]
    assert b"softlockup: hung tasks" in seen[1].data
    assert results[0].code is None
    assert "before its job" in results[0].reason
    assert "Kernel panic - not syncing: sysrq triggered crash" in results[0].console


@pytest.mark.benchhost(ci=True)
def test_inside_there_is_what_this_machine_lacks() -> None:
    assert all(Path(f"/dev/{name}").is_char_device() for name in ("kvm", "vhost-vsock", "vhost-net"))
    assert "svm" in Path("/proc/cpuinfo").read_text().split()
    assert (Path("/sys/fs/cgroup") / "cgroup.controllers").exists()  # cgroup v2, unified


@pytest.mark.benchhost(ci=True)
def test_inside_a_device_can_be_given_to_vfio() -> None:
    """QEMU's edu device, behind an IOMMU with interrupt remapping."""
    subprocess.run(["modprobe", "-a", "vfio-pci", "vfio_iommu_type1"], check=True, timeout=60)
    (edu,) = [
        path.parent
        for path in Path("/sys/bus/pci/devices").glob("*/device")
        if (path.parent / "vendor").read_text() + path.read_text() == "0x1234\n0x11e8\n"
    ]
    group = (edu / "iommu_group").resolve()
    assert [path.name for path in (group / "devices").iterdir()] == [edu.name]
    (edu / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(edu.name)
    with Path("/dev/vfio", group.name).open("r+b", buffering=0) as opened:
        assert opened.fileno() > 0
