"""QEMU under KVM with the kernel's vsock, by containerd: a container's whole life, and nothing left."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value
from tests.benchhost.conftest import BUSYBOX, PATIENCE

_BULK = 3_000_000  # bytes: more than all buffers between the container and `ctr`


def _argv_of_qemu() -> list[str]:
    """The command line of the one QEMU that runs in here."""
    found = [p.read_bytes().split(b"\0") for p in Path("/proc").glob("[0-9]*/cmdline")]
    (argv,) = [argv for argv in found if b"qemu-system" in argv[0]]
    return [word.decode() for word in argv]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("q35", marks=pytest.mark.benchhost(ci=True)),
        pytest.param("microvm", marks=pytest.mark.benchhost),
    ],
)
def machine(request: pytest.FixtureRequest) -> str:
    """QEMU's machine types: with PCI, and with virtio-mmio alone."""
    return str(request.param)


@pytest.fixture(scope="module")
def overrides(machine: str) -> dict[str, dict[str, Value | None]]:
    """The configuration of this machine type."""
    return {"hypervisor.qemu": {"machine_type": machine}}


def test_a_container_lives_under_kvm(containerd: Containerd, machine: str) -> None:
    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    name = containerd.new_id("life")
    script = "trap 'exit 42' TERM; touch /trapped; while :; do sleep 0.1; done"
    containerd.ctr(
        "run", "--detach", "--runtime", KATA, BUSYBOX, name, "sh", "-c", script, timeout=PATIENCE
    )  # fmt: skip
    argv = _argv_of_qemu()
    assert argv[argv.index("-machine") + 1].startswith(f"{machine},accel=kvm,")
    vsock = "vhost-vsock-pci" if machine == "q35" else "vhost-vsock-device"
    assert any(word.startswith(f'{{"driver": "{vsock}"') for word in argv)
    assert [p for p in containerd.processes() if "vhost-device-vsock" in str(p)] == []

    # exec: exit code and both streams; standard input; more than fits into any buffer
    waiting = "until test -e /trapped; do sleep 0.1; done; echo out; echo err >&2; exit 7"
    done = containerd.ctr(
        "task", "exec", "--exec-id", "e1", name, "sh", "-c", waiting, check=False, timeout=60
    )
    assert (done.code, done.out, done.err) == (7, b"out\n", b"err\n")
    text = bytes(range(256)) * (_BULK // 256)
    done = containerd.ctr("task", "exec", "--exec-id", "e2", name, "sha256sum", stdin=text, timeout=60)
    assert done.text.split()[0] == hashlib.sha256(text).hexdigest()
    done = containerd.ctr(
        "task", "exec", "--exec-id", "e3", name, "sh", "-c", f"yes | head -c {_BULK}", timeout=60
    )
    assert done.out == b"y\n" * (_BULK // 2)

    # this host has cgroup v2 alone, so containerd wants v2's statistics
    metrics = json.loads(containerd.ctr("task", "metrics", "--format", "json", name).text)
    assert metrics["pids"]["current"] >= 1  # between two sleeps the shell is alone
    assert metrics["memory"]["usage"] > 100_000
    assert metrics["cpu"]["usage_usec"] > 0

    containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    deadline = time.monotonic() + 60
    while "STOPPED" not in containerd.ctr("task", "ls").text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "exit code 42" in containerd.ctr("task", "rm", name).error  # `ctr` warns of it
    containerd.ctr("container", "rm", name)
    assert leaks.settle(before, snapshot, timeout=30) == {}
