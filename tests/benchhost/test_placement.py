"""One containerd, two VMMs at once: Firecracker by the name of its class, a microvm by its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration
from tests.benchhost.conftest import BUSYBOX, KERNEL_PARAMS, PATIENCE
from tests.benchhost.firecrackers import section

pytestmark = pytest.mark.benchhost

_AGENT: dict[str, Value | None] = {"reconnect_timeout_ms": int(PATIENCE * 1000)}


def _programs(containerd: Containerd) -> dict[str, list[str]]:
    """Task name -> the command line of the process that containerd calls the task's: its VMM."""
    lines = [line.split() for line in containerd.ctr("task", "ls").text.splitlines()[1:]]
    return {
        name: Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        for name, pid, status in lines
        if status == "RUNNING"
    }


def test_firecracker_and_qemu_run_side_by_side(containerd: Containerd, tmp_path: Path) -> None:
    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    # kata-fc is a link, whose name says which file to read; the microvm is told by the runtime's options.
    (containerd.root / "bin" / "containerd-shim-kata-fc-v2").symlink_to("containerd-shim-kata-v2")
    write_configuration(
        containerd.root / "configuration-fc.toml",
        {
            "hypervisor.firecracker": section(tmp_path, jailed=True),
            "runtime": {"hypervisor_name": "firecracker"},
            "agent.kata": _AGENT,
        },
    )
    micro = write_configuration(
        tmp_path / "micro.toml",
        {
            "hypervisor.qemu": {"machine_type": "microvm", "kernel_params": KERNEL_PARAMS},
            "agent.kata": _AGENT,
        },
    )
    classes = {
        "fc": ("--runtime", "io.containerd.kata-fc.v2"),
        "micro": ("--runtime", KATA, "--runtime-config-path", str(micro)),
    }
    names = {key: containerd.new_id(key) for key in classes}
    for key, options in classes.items():
        containerd.ctr("run", "--detach", *options, BUSYBOX, names[key], "sleep", "100000", timeout=PATIENCE)
    programs = _programs(containerd)
    assert programs.keys() == set(names.values())
    assert Path(programs[names["fc"]][0]).name == "firecracker"
    machine = next(word for word in programs[names["micro"]] if "accel=kvm" in word)
    assert machine.startswith("microvm,")
    for key, name in names.items():
        done = containerd.ctr(
            "task", "exec", "--exec-id", "e", name, "sh", "-c", f"echo {key}; exit 5", check=False, timeout=60
        )
        assert (done.code, done.text) == (5, key), key
    containerd.remove(names["fc"], timeout=60)
    assert _programs(containerd).keys() == {names["micro"]}
    for name in names.values():
        containerd.remove(name, timeout=60)
    assert leaks.settle(before, snapshot, timeout=30) == {}
