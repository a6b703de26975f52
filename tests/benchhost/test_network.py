"""A pod's network under KVM: QEMU with the kernel's vhost-net and several queues, Firecracker in its jail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration
from tests.benchhost.conftest import BUSYBOX, KERNEL_PARAMS, PATIENCE
from tests.benchhost.firecrackers import section
from tests.netlab import ECHO, NetLab

QEMU = pytest.param("qemu", marks=pytest.mark.benchhost(ci=True))
FIRECRACKER = pytest.param("firecracker", marks=pytest.mark.benchhost(ci=True))
MACVTAP = pytest.param("macvtap", marks=pytest.mark.benchhost)


def _configuration(variant: str, folder: Path) -> Path:
    overrides: dict[str, dict[str, Value | None]] = {"agent.kata": {"reconnect_timeout_ms": 240_000}}
    if variant == "firecracker":
        overrides["runtime"] = {"hypervisor_name": "firecracker"}
        overrides["hypervisor.firecracker"] = section(folder, jailed=True)
    else:
        keys: dict[str, Value | None] = {
            "network_queues": 2,
            "default_vcpus": 2,
            "kernel_params": KERNEL_PARAMS,
        }
        overrides["hypervisor.qemu"] = keys
        if variant == "macvtap":
            overrides["runtime"] = {"internetworking_model": "macvtap"}
    return write_configuration(folder / "configuration.toml", overrides)


def _open_vhosts() -> int:
    """How many descriptors of vhost-net the one QEMU has."""
    found = 0
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found += (
                os.readlink(link) == "/dev/vhost-net"
                and "qemu" in (link.parent.parent / "cmdline").read_text()
            )
        except OSError:
            continue
    return found


@pytest.mark.parametrize("variant", [QEMU, FIRECRACKER, MACVTAP])
def test_traffic_goes_both_ways(containerd: Containerd, tmp_path: Path, variant: str) -> None:
    if variant == "macvtap":
        subprocess.run(["modprobe", "macvtap"], check=True, timeout=60)
    name = containerd.new_id("net")
    configuration = _configuration(variant, tmp_path)
    with NetLab() as lab:
        options = ("--with-ns", f"network:{lab.pod}", "--runtime-config-path", str(configuration))
        containerd.ctr(
            "run", "--detach", "--runtime", KATA, *options, BUSYBOX, name, *ECHO, timeout=PATIENCE
        )  # fmt: skip
        numbers = iter(range(100))

        def run(script: str) -> str:
            exec_id = f"e{next(numbers)}"
            argv = ("task", "exec", "--exec-id", exec_id, name, "sh", "-c", script)
            return containerd.ctr(*argv, timeout=PATIENCE).text

        try:
            lab.speaks(run)
            if variant != "firecracker":
                assert _open_vhosts() == 2
                assert run("ls /sys/class/net/eth0/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
            assert "kata" in lab.traces()
        finally:
            containerd.remove(name, timeout=PATIENCE)
        assert lab.traces() == ""
