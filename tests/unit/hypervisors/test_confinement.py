"""QEMU's confinement follows from its plan: nothing that a container brings, and no device it has not."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from devices.config import BlockConfig, ProtectionConfig, RngConfig, VfioConfig
from devices.confine import Bind, Confinement
from devices.errors import HostError
from hypervisors.config import HypervisorConfig
from hypervisors.qemu import confinement as module
from hypervisors.qemu.cmdline import Plan
from hypervisors.qemu.confinement import check_readable, confinement, lend_nodes, take_back_nodes
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.recipes import Placed

SECTION = HypervisorConfig(path="/usr/bin/qemu", kernel="/g/vmlinux", initrd="/g/initrd", image="/g/image")
PLAN = Plan(sandbox_id="s", section=SECTION, accelerator=Accelerator.TCG, vcpus=1, qmp_fd=-1, devices=())
GPU = VfioConfig(id="gpu", address="0000:65:00.0")


def of(*devices: Any, accelerator: Accelerator = Accelerator.TCG, **keys: Any) -> Confinement:
    plan = dataclasses.replace(PLAN, section=dataclasses.replace(SECTION, **keys), accelerator=accelerator)
    placed = [Placed(device=device) for device in devices]
    return confinement(plan, placed, user=7, netns="/n", state_dir="/s", locked=0)


def paths(one: Confinement) -> list[str]:
    assert one.view is not None
    return [bind.path for bind in one.view.binds]


def test_a_plain_vm() -> None:
    """A disk's path is not among what it sees, and no bind can be written."""
    disk = BlockConfig(id="d", path="/secret/disk.img")
    one = of(disk, RngConfig())
    assert (one.user, one.mask, one.network, one.own_pids) == (7, 0, "/n", True)
    assert paths(one) == ["/s/m", "/g/vmlinux", "/g/initrd", "/sys/devices/system"]
    assert one.view is not None
    assert one.view.nodes == ("/dev/urandom",)
    assert not one.view.late_nodes
    assert not any(bind.writable or bind.follows for bind in one.view.binds)
    assert one.locked == 64 << 10


def test_what_more_some_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_node", lambda address, *, iommufd: f"/dev/vfio/{9 if iommufd else 8}")
    kvm = of(accelerator=Accelerator.KVM, firmware="/g/bios")
    assert paths(kvm) == ["/s/m", "/g/vmlinux", "/g/initrd", "/g/bios", "/sys/devices/system"]
    assert kvm.view is not None
    assert kvm.view.nodes == ("/dev/kvm",)
    later = of(hot_plug_vfio="root-port")
    assert later.view is not None
    assert later.view.late_nodes
    assert paths(later)[-1] == "/sys"
    passed = of(GPU, dataclasses.replace(GPU, id="b", iommufd=True))
    assert passed.view is not None
    assert passed.view.nodes == ("/dev/vfio/vfio", "/dev/vfio/8", "/dev/iommu", "/dev/vfio/9")
    secret = of(ProtectionConfig(technology="snp"))
    assert secret.view is not None
    assert secret.view.nodes == ("/dev/sev",)
    quotes = of(ProtectionConfig(technology="tdx", quote_socket="/q/s.sock"))
    assert quotes.view is not None
    assert Bind(path="/q") in quotes.view.binds


def test_a_guest_that_only_root_may_read_is_told(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.touch(mode=0o644)
    plan = dataclasses.replace(PLAN, section=dataclasses.replace(SECTION, kernel=str(kernel)))
    check_readable(plan)
    kernel.chmod(0o640)
    with pytest.raises(HostError, match=r"vmlinux cannot be read by the user .* try: chmod o\+r"):
        check_readable(plan)


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes are root's to make")
def test_nodes_come_and_go_with_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to QEMU's user; the control node, which all devices share, stays."""
    monkeypatch.setattr(module, "_nodes", lambda _: ["/dev/null", "/dev/zero"])
    monkeypatch.setattr(module, "_inside", lambda pid, path: f"{tmp_path}/{pid}{path}")
    old = os.umask(0o077)  # as the shim's
    try:
        lend_nodes(5, GPU, 1234)
        lend_nodes(5, GPU, 1234)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "5/dev").stat().st_mode) == 0o755
    made = {path.name: path.lstat() for path in (tmp_path / "5/dev").iterdir()}
    assert {name: (stat.S_ISCHR(info.st_mode), info.st_uid, info.st_rdev) for name, info in made.items()} == {
        "null": (True, 1234, os.stat("/dev/null").st_rdev),
        "zero": (True, 1234, os.stat("/dev/zero").st_rdev),
    }
    take_back_nodes(5, GPU)
    take_back_nodes(5, GPU)
    assert os.listdir(tmp_path / "5/dev") == ["null"]
