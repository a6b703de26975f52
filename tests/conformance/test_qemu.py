"""QEMU keeps the contract: under TCG here, under KVM in the bench host, with PCI and as a microvm."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from conformance.contract import HypervisorContract
from conformance.subject import Subject
from devices.undo import MemoryUndo
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.kvm import Accelerator, choose_accelerator
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.vmm import VHOST_VSOCK
from testing.guest import PROJECT, guest_files
from tests.benchhost.conftest import KERNEL_PARAMS


def _vsock_daemon() -> str:
    local = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
    return str(local) if local.exists() else ""


def _section(**changes: object) -> HypervisorConfig:
    files = {key: str(path) for key, path in guest_files().items()}
    return HypervisorConfig(default_memory=256, vsock_daemon=_vsock_daemon(), **files, **changes)  # type: ignore[arg-type]


def qemu_subject(**changes: object) -> Subject:
    return Subject(
        plugin=plugin,
        section=functools.partial(_section, **changes),
        vsock_daemon=_vsock_daemon(),
        # vhost-device-vsock 0.3.0 loses a connection made right after `cont` now and then (1 in 30).
        resumes_vsock=os.path.exists(VHOST_VSOCK),
        patience=240.0 if changes["accelerator"] == "kvm" else 60.0,
    )


class TestQemuTcg(HypervisorContract):
    """This machine's accelerator; disks may be memory, which needs a machine with nvdimm."""

    subject = qemu_subject(accelerator="tcg", block_device_driver="virtio-pmem")


class TestMicrovmTcg(HypervisorContract):
    """Devices on virtio-mmio, nothing to plug."""

    subject = qemu_subject(accelerator="tcg", machine_type="microvm")


@pytest.mark.benchhost
class TestQemuKvm(HypervisorContract):
    """The bench host's accelerator, and its kernel's vsock."""

    subject = qemu_subject(
        accelerator="kvm",
        kernel_params=KERNEL_PARAMS,
        cold_plug_vfio="root-port",
        hot_plug_vfio="root-port",
        pcie_root_port=2,
    )


@pytest.mark.benchhost
class TestMicrovmKvm(HypervisorContract):
    """Both."""

    subject = qemu_subject(accelerator="kvm", kernel_params=KERNEL_PARAMS, machine_type="microvm")


async def _accelerator(directory: Path) -> str:
    vm = plugin.create(
        plugin.adjust_config(_section()), sandbox_id="probe", state_dir=str(directory), undo=MemoryUndo()
    )
    await vm.prepare_vm("probe", None)
    try:
        await vm.start_vm(240)
        return (await vm.save_state()).accelerator
    finally:
        await vm.cleanup()


@pytest.mark.skipif(
    choose_accelerator("auto").accelerator is Accelerator.KVM, reason="this machine's KVM can be used"
)
async def test_a_kvm_that_cannot_be_used_is_not_chosen(tmp_path: Path) -> None:
    assert await _accelerator(tmp_path) == "tcg"


@pytest.mark.benchhost(ci=True)
async def test_a_kvm_that_can_be_used_is_chosen(tmp_path: Path) -> None:
    assert await _accelerator(tmp_path) == "kvm"
