"""A VM never can more than its plugin says of its kind: the published table is true."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from devices.undo import MemoryUndo
from hypervisors.registry import get_plugin


@pytest.mark.parametrize("name", ["qemu", "firecracker"])
async def test_a_vms_capabilities_are_among_its_plugins(name: str, tmp_path: Path) -> None:
    plugin = get_plugin(name)
    section = plugin.adjust_config(plugin.section())
    vm = plugin.create(section, sandbox_id="s", state_dir=str(tmp_path), undo=MemoryUndo())
    try:
        if name == "qemu":  # what it can do depends on the accelerator
            await vm.prepare_vm("s", None)
        able = dataclasses.asdict(await vm.capabilities())
    finally:
        await vm.cleanup()
    most = dataclasses.asdict(plugin.capabilities)
    assert [what for what, can in able.items() if can and not most[what]] == []
    assert any(able.values())
