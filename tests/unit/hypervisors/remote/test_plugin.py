"""The section of a remote hypervisor: no size of this host bounds it; what cannot be is told with its key."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from devices.errors import ConfigError
from hypervisors.remote.config import RemoteConfig
from hypervisors.remote.plugin import plugin
from tests.unit.hypervisors.remote.fake import FakeService


def test_its_size_is_not_this_hosts() -> None:
    section = plugin.adjust_config(RemoteConfig(default_vcpus=4096, default_memory=1 << 30))
    assert (section.default_vcpus, section.default_memory) == (4096, 1 << 30)
    plugin.validate_config(section)
    assert plugin.adjust_config(section) == section
    section = plugin.adjust_config(RemoteConfig(default_vcpus=0, default_memory=0, shared_fs=""))
    assert (section.default_vcpus, section.default_memory, section.shared_fs) == (1, 2048, "none")


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"remote_hypervisor_socket": "hypervisor.sock"}, "remote_hypervisor_socket", ""),
        ({"remote_hypervisor_socket": "/" + 107 * "x"}, "remote_hypervisor_socket", ""),
        ({"remote_hypervisor_timeout": 0}, "remote_hypervisor_timeout", ""),
        ({"kernel": "/vmlinux"}, "kernel", "take the key out"),
        ({"image": "/rootfs.img"}, "image", "take the key out"),
        ({"shared_fs": "virtio-fs"}, "shared_fs", 'shared_fs = "none"'),
        ({"default_memory": -1}, "default_memory", ""),
        ({"default_gpus": -1}, "default_gpus", ""),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], key: str, hint: str) -> None:
    section = plugin.adjust_config(dataclasses.replace(RemoteConfig(), **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        plugin.validate_config(section)
    assert caught.value.key == key
    assert hint in caught.value.hint


async def test_the_check_asks_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeService(tmp_path) as service:
        monkeypatch.setattr("hypervisors.remote.plugin.DEFAULT_SOCKET", service.path)
        (result,) = await asyncio.to_thread(plugin.check)
        assert (result.ok, result.text) == (True, f"{service.path}, version 0.0.0")
    (result,) = await asyncio.to_thread(plugin.check)
    assert not result.ok
    assert "cannot be reached" in result.text
    assert "cloud-api-adaptor" in result.hint
