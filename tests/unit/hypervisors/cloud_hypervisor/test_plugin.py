"""[hypervisor.clh]: Kata's own files of both ages load, and what cannot work is told by its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from devices.errors import ConfigError
from devices.kinds import Kind, Op
from hypervisors.cloud_hypervisor import plugin as module
from hypervisors.cloud_hypervisor.abilities import abilities
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.plugin import landlock_abi, plugin
from hypervisors.registry import get_plugin


@pytest.fixture
def section(tmp_path: Path) -> ClhConfig:
    """One that is valid here."""
    program = tmp_path / "cloud-hypervisor"
    program.write_text("")
    program.chmod(0o755)
    for name in ("kernel", "image"):
        (tmp_path / name).write_text("")
    return ClhConfig(
        path=str(program), kernel=str(tmp_path / "kernel"), image=str(tmp_path / "image"), shared_fs="none"
    )


def test_it_has_all_the_names_that_kata_gives_it() -> None:
    assert get_plugin("clh") is get_plugin("cloud-hypervisor") is plugin


def test_what_was_left_to_default(section: ClhConfig) -> None:
    one = plugin.adjust_config(dataclasses.replace(section, default_vcpus=1, network_queues=8, num_queues=0))
    assert (one.block_device_driver, one.vm_rootfs_driver) == ("virtio-blk-pci", "virtio-blk-pci")
    assert (one.network_queues, one.num_queues) == (1, 1)  # no more than vCPUs
    assert one.default_maxmemory > 0
    assert plugin.adjust_config(one) == one
    plugin.validate_config(one)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("path", "/nope", "does not exist"),
        ("block_device_driver", "virtio-scsi", "is not allowed; allowed: virtio-blk-pci"),
        ("hot_plug_vfio", "bridge-port", "is not allowed; allowed: no-port, root-port"),
        ("rootless", True, "opens disks by their paths"),
        ("queue_size", 100, "is no power of two"),
        ("num_queues", 1000, "is not in 1..254"),
        ("hotplug_timeout", 0.0, "is no number of seconds"),
    ],
)
def test_what_cannot_work_is_told_by_its_key(section: ClhConfig, key: str, value: Any, words: str) -> None:
    wanted = plugin.adjust_config(dataclasses.replace(section, **{key: value}))
    with pytest.raises(ConfigError, match=words) as caught:
        plugin.validate_config(wanted)
    assert caught.value.key == key


def test_virtio_mem_does_not_go_with_devices_of_vfio(section: ClhConfig) -> None:
    both = dataclasses.replace(section, enable_virtio_mem=True, hot_plug_vfio="root-port")
    with pytest.raises(ConfigError, match="does not go with devices of VFIO") as caught:
        plugin.validate_config(plugin.adjust_config(both))
    assert caught.value.key == "enable_virtio_mem"


def test_landlock_needs_a_kernel_that_has_it(section: ClhConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert landlock_abi() >= 0
    wanted = plugin.adjust_config(dataclasses.replace(section, landlock=True))
    for abi, text in ((0, "this kernel has none"), (2, "this kernel has 2")):
        monkeypatch.setattr(module, "landlock_abi", lambda abi=abi: abi)
        with pytest.raises(ConfigError, match=f"needs Landlock 3 .Linux 6.2.; {text}"):
            plugin.validate_config(wanted)
    monkeypatch.setattr(module, "landlock_abi", lambda: 3)
    plugin.validate_config(wanted)


def test_what_it_can_follows_from_its_configuration(section: ClhConfig) -> None:
    def able(**keys: Any) -> Any:
        return abilities(dataclasses.replace(section, default_vcpus=1, default_maxvcpus=1, **keys))

    still = able(default_maxmemory=1)
    assert "default_maxmemory" in still.why_not(Kind.DIMM, Op.HOT)
    assert "default_maxvcpus" in still.why_not(Kind.VCPU, Op.HOT)
    assert (still.snapshot, still.restore) == (True, True)
    grows = able(default_maxmemory=8192, enable_virtio_mem=True)
    assert (grows.more_memory, grows.less_memory, grows.can(Kind.DIMM, Op.HOT)) == (True, True, False)
    shares = able(shared_fs="virtio-fs")
    assert (shares.snapshot, shares.can(Kind.SHARE_FS, Op.UNPLUG)) == (False, True)
    closed = able(landlock=True)
    assert "landlock" in closed.why_not(Kind.BLK, Op.HOT)
    assert (closed.can(Kind.BLK, Op.COLD), closed.snapshot) == (True, False)
    assert able(hot_plug_vfio="root-port").can(Kind.VFIO, Op.UNPLUG)
