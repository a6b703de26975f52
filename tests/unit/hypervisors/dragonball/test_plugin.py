"""[hypervisor.dragonball]: defaults, what cannot work is told by its key, and what the process may."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from devices.config import BlockConfig, NetworkConfig, ShareFsConfig
from devices.errors import ConfigError
from devices.kinds import Kind, Op
from hypervisors.dragonball.abilities import abilities
from hypervisors.dragonball.config import INLINE, DragonballConfig
from hypervisors.dragonball.confinement import confinement
from hypervisors.dragonball.plugin import plugin
from hypervisors.registry import get_plugin


@pytest.fixture
def section(tmp_path: Path) -> DragonballConfig:
    """One that is valid here."""
    program = tmp_path / "dragonball-process"
    program.write_text("")
    program.chmod(0o755)
    for name in ("kernel", "image"):
        (tmp_path / name).write_text("")
    return DragonballConfig(path=str(program), kernel=str(tmp_path / "kernel"), image=str(tmp_path / "image"))


def test_it_is_built_in() -> None:
    assert get_plugin("dragonball") is plugin


def test_what_was_left_to_default(section: DragonballConfig) -> None:
    wanted = dataclasses.replace(
        section, shared_fs="", block_device_driver="virtio-blk-pci", default_vcpus=-1, virtio_fs_cache="none"
    )
    one = plugin.adjust_config(wanted)
    assert (one.block_device_driver, one.vm_rootfs_driver) == ("virtio-blk-mmio", "virtio-blk-mmio")
    assert (one.shared_fs, one.virtio_fs_cache) == (INLINE, "never")
    assert one.default_vcpus >= 1
    assert plugin.adjust_config(one) == one
    plugin.validate_config(one)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("path", "/nope", "does not exist"),
        ("block_device_driver", "virtio-scsi", "is not allowed; allowed: virtio-blk-mmio"),
        ("shared_fs", "virtio-fs", f"is not allowed; allowed: none, {INLINE}"),
        ("virtio_fs_cache", "sometimes", "is not allowed; allowed: never, auto, always"),
        ("virtio_fs_queue_size", 1000, "is no power of two"),
        ("queue_size", 100, "is no power of two"),
        ("hotplug_timeout", 0.0, "is no number of seconds"),
        ("rx_rate_limiter_max_rate", 8000, "does not go with vhost"),
        ("rootless", True, "with the rights of the guest's users"),
    ],
)
def test_what_cannot_work_is_told_by_its_key(
    section: DragonballConfig, key: str, value: Any, words: str
) -> None:
    wanted = plugin.adjust_config(dataclasses.replace(section, **{key: value}))
    with pytest.raises(ConfigError, match=words) as caught:
        plugin.validate_config(wanted)
    assert caught.value.key == key


def test_what_comes_later_needs_the_upcall_server(section: DragonballConfig) -> None:
    for upcall in (False, True):
        able = abilities(dataclasses.replace(section, upcall=upcall))
        for kind, op in ((Kind.BLK, Op.HOT), (Kind.BLK, Op.UNPLUG), (Kind.NET, Op.HOT)):
            assert able.can(kind, op) is upcall
        assert not able.can(Kind.SHARE_FS, Op.HOT)
        assert not able.snapshot
    assert abilities(dataclasses.replace(section, shared_fs="none")).snapshot


def test_it_sees_no_more_than_it_needs(section: DragonballConfig, tmp_path: Path) -> None:
    """As long as that is known at the start; else the host's files, and then with fewer rights if it can."""
    share = ShareFsConfig(source=str(tmp_path))
    disk = BlockConfig(id="disk", path=section.image)
    locked = BlockConfig(id="locked", path=section.kernel, read_only=True)
    card = NetworkConfig(id="card", mac="02:00:00:00:00:01", tap="tap0")
    one = confinement(section, [share, disk, locked, card], netns=None, state_dir="/state")
    assert one.view is not None
    assert {bind.path: bind.writable for bind in one.view.binds} == {
        "/state/m": True,
        "/sys/devices/system": False,
        section.kernel: False,
        str(tmp_path): False,  # "follows": it can be written all the same
        section.image: True,
    }
    assert one.view.nodes == ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net")
    assert "chown" in one.capabilities
    assert "mknod" not in one.capabilities
    for wide in (
        confinement(section, [disk], netns=None, state_dir="/state"),
        confinement(dataclasses.replace(section, upcall=True), [share], netns=None, state_dir="/state"),
    ):
        assert wide.view is None
    assert confinement(section, [disk], netns=None, state_dir="/state").capabilities == ("dac_override",)
