"""Firecracker's section is completed as Kata does it, and refused with key, value and reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from devices.config import BlockConfig, BlockOptions, IoLimits
from devices.errors import ConfigError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.plugin import plugin


@pytest.fixture
def section(tmp_path: Path) -> FirecrackerConfig:
    for name in ("vmlinux", "rootfs.img", "firecracker", "jailer"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o755)
    return plugin.adjust_config(
        FirecrackerConfig(
            path=str(tmp_path / "firecracker"),
            jailer_path=str(tmp_path / "jailer"),
            kernel=str(tmp_path / "vmlinux"),
            image=str(tmp_path / "rootfs.img"),
            default_memory=0,
        )
    )


def test_a_sound_section_passes(section: FirecrackerConfig) -> None:
    plugin.validate_config(section)
    assert plugin.adjust_config(section) == section
    assert section.default_memory == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "/nope"}, 'path = "/nope" does not exist'),
        ({"jailer_path": "/nope"}, 'jailer_path = "/nope" does not exist'),
        ({"path": "/bin/sh"}, "its name must contain firecracker"),
        ({"kernel": ""}, "kernel .* is needed"),
        ({"image": ""}, "neither image nor initrd"),
        ({"initrd": "/nope"}, 'initrd = "/nope" does not exist'),
        ({"boot_from_template": True}, 'device_state_path = "" is needed with boot_from_template'),
        ({"shared_fs": "virtio-fs"}, "nothing that Firecracker has"),
        ({"default_memory": 64}, "less than 128 MiB"),
        ({"block_device_slots": 9}, "0..6"),
        ({"jailer_uid": -1}, "jailer_uid"),
        ({"jailer_cgroups": ("pids.max",)}, "FILE=VALUE"),
        ({"jailer_cgroups": ("../x.y=1",)}, "FILE=VALUE"),
    ],
)
def test_what_cannot_work_is_refused(
    section: FirecrackerConfig, change: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plugin.validate_config(dataclasses.replace(section, **change))  # type: ignore[arg-type]


def test_the_check_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    results = {result.name: result for result in plugin.check()}
    assert not results["firecracker"].ok
    assert "install" in results["firecracker"].hint


async def test_options_of_a_single_disk_are_refused_and_not_lost(tmp_path: Path) -> None:
    """Firecracker's limits are those of the configuration, for all of its disks alike."""
    vm = plugin.create(FirecrackerConfig(), sandbox_id="s1", state_dir=str(tmp_path), undo=MemoryUndo())
    options = BlockOptions(limits=IoLimits(read_ops=1))
    with pytest.raises(UnsupportedByHypervisor, match="options of a single disk"):
        await vm.add_device(BlockConfig(id="disk", path="/d", options=options))
