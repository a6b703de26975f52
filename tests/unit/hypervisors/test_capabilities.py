"""A VM never can more than its plugin says of its kind: the published table is true."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.errors import UnsupportedByHypervisor
from devices.kinds import OPERATIONS, YES, Kind, Op, Support
from devices.undo import MemoryUndo
from hypervisors.base import Capabilities
from hypervisors.registry import get_plugin


@pytest.mark.parametrize("name", ["qemu", "firecracker"])
async def test_a_vms_capabilities_are_among_its_plugins(name: str, tmp_path: Path) -> None:
    plugin = get_plugin(name)
    section = plugin.adjust_config(plugin.section())
    vm = plugin.create(section, sandbox_id="s", state_dir=str(tmp_path), undo=MemoryUndo())
    try:
        if name == "qemu":  # what it can do depends on the accelerator
            await vm.prepare_vm("s", None)
        able = await vm.capabilities()
    finally:
        await vm.cleanup()
    most = plugin.capabilities
    for kind, operations in OPERATIONS.items():
        assert [op for op in operations if able.can(kind, op) and not most.can(kind, op)] == []
    assert [
        name
        for name in ("own_vsock", "pause", "snapshot", "restore")
        if getattr(able, name) and not getattr(most, name)
    ] == []
    assert able.can(Kind.BLK, Op.COLD)


def test_what_nobody_answers_is_refused() -> None:
    able = Capabilities(devices={Kind.RNG: Support(cold=YES)})
    able.require("vmm", Kind.RNG, Op.COLD)
    with pytest.raises(
        UnsupportedByHypervisor, match="vmm does not support hot-plug of virtio-rng: it has none"
    ):
        able.require("vmm", Kind.RNG, Op.HOT)
    assert not any(able.can(kind, op) for kind in Kind for op in Op if (kind, op) != (Kind.RNG, Op.COLD))
