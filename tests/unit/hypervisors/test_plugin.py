"""QEMU's section is completed as Kata does it, refused with key, value and reason; KVM is probed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from devices.errors import ConfigError, HostError
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.kvm import Accelerator, choose_accelerator
from hypervisors.qemu.plugin import plugin


@pytest.fixture
def section(tmp_path: Path) -> HypervisorConfig:
    for name in ("vmlinux", "initrd.img", "qemu"):
        (tmp_path / name).write_text("x")
    (tmp_path / "qemu").chmod(0o755)
    return plugin.adjust_config(
        HypervisorConfig(
            path=str(tmp_path / "qemu"),
            kernel=str(tmp_path / "vmlinux"),
            initrd=str(tmp_path / "initrd.img"),
            default_memory=128,
        )
    )


def test_a_sound_section_passes(section: HypervisorConfig) -> None:
    plugin.validate_config(section)
    assert plugin.adjust_config(section) == section


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": "/nope/vmlinux"}, 'kernel = "/nope/vmlinux" does not exist'),
        ({"kernel": ""}, "kernel .* is needed"),
        ({"initrd": ""}, "neither image nor initrd"),
        ({"image": "/nope/image"}, 'image = "/nope/image" does not exist'),
        ({"machine_type": "pc"}, 'machine_type = "pc" is not allowed; allowed: q35'),
        ({"accelerator": "hax"}, "accelerator"),
        ({"shared_fs": "virtio-9p"}, "shared_fs"),
        ({"virtio_fs_queue_size": 1000}, "power of two"),
        ({"default_memory": 32}, "less than 64 MiB"),
        ({"pcie_root_port": 99}, "0..16"),
        ({"machine_type": "microvm", "pcie_root_port": 1}, "needs PCI"),
        ({"virtio_fs_daemon": "/nope/virtiofsd"}, "virtio_fs_daemon .* does not exist"),
        ({"path": "/"}, 'path = "/" is not executable'),
        ({"machine_type": "microvm"}, "vm_rootfs_driver .* allowed: virtio-blk-mmio"),
        ({"vm_rootfs_driver": "virtio-pmem"}, "vm_rootfs_driver .* allowed: virtio-blk-pci"),
        ({"block_device_driver": "virtio-blk-mmio"}, "allowed: virtio-blk-pci, virtio-scsi, virtio-pmem"),
        ({"block_device_aio": "posix"}, "allowed: threads, native, io_uring"),
        ({"block_device_aio": "native", "block_device_cache_direct": True}, "needs block_device_cache_set"),
        ({"queue_size": 100}, "queue_size = 100 is no power of two from 2 to 1024"),
        ({"block_device_logical_sector_size": 256}, "no power of two from 512"),
        (
            {"block_device_logical_sector_size": 4096, "block_device_physical_sector_size": 512},
            "is less than the logical 4096",
        ),
        ({"num_queues": 0}, "num_queues = 0 is not in 1..256"),
        ({"network_queues": 257}, "network_queues = 257 is not in 0..256"),
        ({"rx_rate_limiter_max_rate": 100}, "rx_rate_limiter_max_rate = 100 is neither 0 nor in 8000.."),
        ({"tx_rate_limiter_max_rate": 1 << 40}, "tx_rate_limiter_max_rate = 1099511627776 is neither"),
        ({"disk_rate_limiter_ops_max_rate": -1}, "disk_rate_limiter_ops_max_rate = -1"),
    ],
)
def test_what_cannot_work_is_refused(
    section: HypervisorConfig, change: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        plugin.validate_config(dataclasses.replace(section, **change))  # type: ignore[arg-type]

    assert caught.value.phase == "config"


@pytest.mark.parametrize("asked", [0, 2, 500])
def test_a_vm_grows_to_the_hosts_size_at_most(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """The CPUs that we may run on: of a cpuset, its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7})
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    adjusted = plugin.adjust_config(HypervisorConfig(default_maxvcpus=asked, default_maxmemory=asked << 20))

    assert adjusted.default_maxvcpus == min(asked or 3, 3)
    assert adjusted.default_maxmemory == host
    assert plugin.adjust_config(HypervisorConfig(default_maxmemory=512)).default_maxmemory == 512


def test_zero_and_empty_mean_choose_for_me() -> None:
    adjusted = plugin.adjust_config(
        HypervisorConfig(
            default_vcpus=-1,
            default_memory=0,
            virtio_fs_cache="",
            shared_fs="",
            machine_type="",
            network_queues=0,
        )
    )

    assert adjusted.default_vcpus == len(os.sched_getaffinity(0))
    assert (adjusted.default_memory, adjusted.virtio_fs_cache) == (128, "never")
    assert (adjusted.shared_fs, adjusted.machine_type) == ("virtio-fs", "q35")
    assert adjusted.network_queues == 1
    assert adjusted.path.endswith("qemu-system-x86_64")


def test_check_reports_and_never_raises() -> None:
    names = {result.name for result in plugin.check()}
    assert names == {"qemu", "accelerator", "vsock", "virtiofsd", "confidential"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu svm sse", Accelerator.KVM), ("fpu vmx", Accelerator.KVM), ("fpu svmx notvmx", Accelerator.TCG)],
)
def test_kvm_needs_a_cpu_that_virtualises(tmp_path: Path, flags: str, expected: Accelerator) -> None:
    (tmp_path / "kvm").write_text("")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    choice = choose_accelerator(
        "auto", kvm=str(tmp_path / "kvm"), cpuinfo=str(tmp_path / "cpuinfo"), machine="x86_64"
    )

    assert choice.accelerator is expected
    assert ("neither vmx nor svm" in choice.reason) is (expected is Accelerator.TCG)


def test_no_kvm_means_tcg_with_the_reason(tmp_path: Path) -> None:
    choice = choose_accelerator("auto", kvm=str(tmp_path / "kvm"))

    assert choice.accelerator is Accelerator.TCG
    assert "does not open" in choice.reason


def test_the_configuration_can_force_either(tmp_path: Path) -> None:
    assert choose_accelerator("tcg").accelerator is Accelerator.TCG
    with pytest.raises(HostError, match="forces KVM"):
        choose_accelerator("kvm", kvm=str(tmp_path / "kvm"))
    (tmp_path / "kvm").write_text("")
    assert choose_accelerator("kvm", kvm=str(tmp_path / "kvm")).accelerator is Accelerator.KVM
    with pytest.raises(ConfigError, match="xen"):
        choose_accelerator("xen")
