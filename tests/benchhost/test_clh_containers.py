"""The real Cloud Hypervisor, by containerd, with a shared directory and without: a container's life, one that
grows, the end of its VMM, and nothing left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import Containerd
from testing.guest import Value
from tests.benchhost.clhs import keys, needs_clh
from tests.benchhost.conftest import BUSYBOX, PATIENCE
from tests.benchhost.lives import start, stopped
from tests.security.test_confinement import bits, table

pytestmark = [pytest.mark.benchhost, needs_clh]


@pytest.fixture(scope="module", params=["virtio-fs", "none"])
def overrides(request: pytest.FixtureRequest) -> dict[str, dict[str, Value | None]]:
    section: dict[str, Value | None] = {**keys(), "shared_fs": request.param}
    return {"hypervisor.clh": section, "runtime": {"hypervisor_name": "cloud-hypervisor"}}


def _vmms() -> list[Path]:
    """/proc/PID of those that run in here."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().startswith("cloud-hyperviso"):
                found.append(process)
    return found


def test_a_container_lives(
    containerd: Containerd, tmp_path: Path, overrides: dict[str, dict[str, Value | None]]
) -> None:
    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    (tmp_path / "file").write_text("from the host\n")
    name = containerd.new_id("clh")
    start(containerd, name, "--mount", f"type=bind,src={tmp_path},dst=/volume,options=rbind:ro")
    (process,) = _vmms()
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    row = table()["Cloud Hypervisor"]
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == bits(row["capabilities"])
    assert (status["Uid"].split()[0], status["NoNewPrivs"]) == (row["user"], "1")

    def exec_(exec_id: str, *command: str, stdin: bytes | None = None) -> bytes:
        return containerd.ctr(
            "task", "exec", "--exec-id", exec_id, name, *command, stdin=stdin, timeout=60
        ).out

    assert exec_("e1", "cat", "/volume/file") == b"from the host\n"
    text = bytes(range(256)) * 8000
    assert exec_("e2", "sha256sum", stdin=text).split()[0].decode() == hashlib.sha256(text).hexdigest()
    if overrides["hypervisor.clh"]["shared_fs"] == "none":
        assert exec_("e3", "head", "-1", "/proc/mounts").startswith(b"overlay")  # over disks, plugged for it
    containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    assert "exit code 42" in stopped(containerd, name)
    assert leaks.settle(before, snapshot, timeout=30) == {}


def test_a_limit_makes_the_vm_grow(containerd: Containerd) -> None:
    """256 MiB and what the container may have."""
    script = "nproc; grep MemTotal /proc/meminfo"
    limits = ("--memory-limit", str(512 << 20), "--cpus", "1")
    said = containerd.run(BUSYBOX, "sh", "-c", script, options=limits, timeout=PATIENCE).text.split()
    assert (int(said[0]), int(said[2]) > 600_000) == (2, True)


def test_the_exit_code_comes_back(containerd: Containerd) -> None:
    done = containerd.run(BUSYBOX, "sh", "-c", "uname -r; exit 9", timeout=PATIENCE, check=False)
    assert done.code == 9


def test_the_end_of_the_vmm_is_the_containers(containerd: Containerd) -> None:
    name = containerd.new_id("clh")
    start(containerd, name)
    (process,) = _vmms()
    os.kill(int(process.name), signal.SIGKILL)
    assert "exit code 255" in stopped(containerd, name)
    assert _vmms() == []
