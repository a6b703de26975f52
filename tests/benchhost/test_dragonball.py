"""The real Dragonball, by containerd: a container's life in a shared directory, the VMM's end, a panic."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from devices.config import BlockConfig, ConsoleConfig, VsockConfig
from devices.undo import MemoryUndo
from hypervisors.dragonball.plugin import plugin
from testing import leaks
from testing.containerd import Containerd
from testing.guest import Value
from tests.benchhost.conftest import BUSYBOX, PATIENCE
from tests.benchhost.dragonballs import keys, needs_dragonball, section
from tests.benchhost.lives import start, stopped
from tests.security.test_confinement import bits, table

pytestmark = [pytest.mark.benchhost, needs_dragonball]


@pytest.fixture(scope="module")
def overrides() -> dict[str, dict[str, Value | None]]:
    return {"hypervisor.dragonball": keys(), "runtime": {"hypervisor_name": "dragonball"}}


def _vmms() -> list[Path]:
    """/proc/PID of those that run in here."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().split(b"\0")[0].decode() == keys()["path"]:
                found.append(process)
    return found


def test_a_container_lives(containerd: Containerd, tmp_path: Path) -> None:
    """In files that the VMM itself serves, with a volume, under what SECURITY.md says of it."""

    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    (tmp_path / "file").write_text("from the host\n")
    name = containerd.new_id("dragonball")
    start(containerd, name, "--mount", f"type=bind,src={tmp_path},dst=/volume,options=rbind")
    (process,) = _vmms()
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    row = table()["Dragonball"]
    with_share, _, alone = row["capabilities"].partition("; without a shared directory: ")
    assert alone == "dac_override"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == bits(with_share)
    assert (status["Uid"].split()[0], status["NoNewPrivs"]) == (row["user"], "1")
    assert not (process / "root" / "home").exists()  # it has a view of its own

    script = "cat /volume/file; echo back >/volume/answer; chown 7:8 /volume/answer; nproc"
    said = containerd.ctr("task", "exec", "--exec-id", "e1", name, "sh", "-c", script, timeout=60).text
    assert said.split("\n")[:2] == ["from the host", "1"]
    answer = tmp_path / "answer"
    assert (answer.read_text(), answer.stat().st_uid, answer.stat().st_gid) == ("back\n", 7, 8)
    containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    assert "exit code 42" in stopped(containerd, name)
    assert leaks.settle(before, snapshot, timeout=30) == {}


def test_the_exit_code_comes_back(containerd: Containerd) -> None:
    done = containerd.run(BUSYBOX, "sh", "-c", "uname -r; exit 9", timeout=PATIENCE, check=False)
    assert done.code == 9


def test_the_end_of_the_vmm_is_the_containers(containerd: Containerd) -> None:
    name = containerd.new_id("dragonball")
    start(containerd, name)
    (process,) = _vmms()
    os.kill(int(process.name), signal.SIGKILL)
    assert "exit code 255" in stopped(containerd, name)
    assert _vmms() == []


async def test_a_guest_that_panics_has_ended(tmp_path: Path) -> None:
    kernel_params = f"{keys()['kernel_params']} rdinit=/nope"
    made = plugin.adjust_config(section(shared_fs="none", kernel_params=kernel_params))
    plugin.validate_config(made)
    state, undo = tmp_path / "panics", MemoryUndo()
    state.mkdir()
    vm = plugin.create(made, sandbox_id="panics", state_dir=str(state), undo=undo)
    try:
        await vm.prepare_vm("panics", None)
        await vm.add_device(BlockConfig(id="image", path=made.image, read_only=True))
        await vm.add_device(VsockConfig())
        await vm.add_device(ConsoleConfig())
        await vm.start_vm(PATIENCE)
        ended = await asyncio.wait_for(vm.wait_vm(), PATIENCE)
        assert "the guest kernel panicked" in ended.reason
        assert await vm.get_pids() == []
    finally:
        await vm.cleanup()
    assert (list(state.iterdir()), undo.entries) == ([], [])
