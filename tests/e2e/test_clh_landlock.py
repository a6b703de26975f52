"""Under Landlock the real Cloud Hypervisor starts, and opens nothing that it did not start with.

No guest has to run for that; it needs a /dev/kvm that opens, and a kernel with Landlock 3 (Linux 6.2).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devices.config import BlockConfig, ConsoleConfig, RngConfig, ShareFsConfig, VsockConfig
from devices.errors import HypervisorError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.cloud_hypervisor.plugin import landlock_abi, plugin
from tests.benchhost.clhs import needs_clh, section

pytestmark = [
    needs_clh,
    pytest.mark.skipif(landlock_abi() < 3, reason="this kernel has no Landlock 3"),
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm does not open"),
]


async def test_it_opens_nothing_that_it_did_not_start_with(tmp_path: Path) -> None:
    made = plugin.adjust_config(section(landlock=True))
    plugin.validate_config(made)
    for name in ("state", "share"):
        (tmp_path / name).mkdir()
    late = tmp_path / "late.img"
    late.write_bytes(bytes(1 << 20))
    undo = MemoryUndo()
    vm = plugin.create(made, sandbox_id="vm", state_dir=str(tmp_path / "state"), undo=undo)
    try:
        await vm.prepare_vm("vm", None)
        await vm.add_device(BlockConfig(id="image", path=made.image, read_only=True))
        for device in (VsockConfig(), RngConfig(), ConsoleConfig()):
            await vm.add_device(device)
        await vm.add_device(ShareFsConfig(source=str(tmp_path / "share")))
        await vm.start_vm(120)
        await vm.check()
        with pytest.raises(UnsupportedByHypervisor, match="landlock = true"):
            await vm.add_device(BlockConfig(id="late", path=str(late)))
        with pytest.raises(HypervisorError, match="Permission denied"):  # whoever asks it
            await vm._put("vm.add-disk", {"id": "late", "path": str(late), "image_type": "Raw"})
    finally:
        await vm.cleanup()
    assert (list((tmp_path / "state").iterdir()), undo.entries) == ([], [])
