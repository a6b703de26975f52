"""What the real Cloud Hypervisor does beyond the contract: its answers, a restored VM, a panic's end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devices.config import BlockConfig, ConsoleConfig, RngConfig, VsockConfig
from devices.undo import MemoryUndo
from devices.vsock import AGENT_PORT
from hypervisors.cloud_hypervisor.plugin import plugin
from hypervisors.cloud_hypervisor.vmm import CloudHypervisor
from tests.benchhost.clh_answers import RECORDED, record
from tests.benchhost.clhs import needs_clh, section

_PATIENCE = 240.0

pytestmark = [pytest.mark.benchhost, needs_clh]


@contextlib.asynccontextmanager
async def _vm(
    tmp_path: Path, name: str, *, home_call: bool = True, on_demand: bool = False
) -> AsyncIterator[CloudHypervisor]:
    """Prepared, with an image, vsock, entropy and a console."""
    made = plugin.adjust_config(section(shared_fs="none", restore_on_demand=on_demand))
    plugin.validate_config(made)
    state, undo = tmp_path / name, MemoryUndo()
    state.mkdir()
    vm = plugin.create(made, sandbox_id=name, state_dir=str(state), undo=undo)
    try:
        await vm.prepare_vm(name, None)
        await vm.add_device(BlockConfig(id="image", path=made.image, read_only=True))
        await vm.add_device(VsockConfig(home_call=home_call))
        await vm.add_device(RngConfig())
        await vm.add_device(ConsoleConfig())
        yield vm
    finally:
        await vm.cleanup()
    assert (list(state.iterdir()), undo.entries) == ([], [])


def test_it_answers_as_recorded(tmp_path: Path) -> None:
    """The fake of the unit tests has these answers; a version that answers otherwise is told here."""
    told, recorded = record(tmp_path), json.loads(RECORDED.read_text())
    for answers in (told, recorded):
        answers["ping"]["answer"] = None  # the version, and what it was built with
    assert told == recorded


async def test_a_saved_vm_becomes_another_one(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    async with _vm(tmp_path, "first") as vm:
        await vm.start_vm(_PATIENCE)
        await (await vm.get_agent_socket()).wait_ready(_PATIENCE)
        await vm.save_vm(str(saved))
        await vm.check()  # and goes on
    before = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    for on_demand in (False, True):
        async with _vm(tmp_path, f"again{on_demand}", home_call=False, on_demand=on_demand) as vm:
            await vm.restore_vm(str(saved), _PATIENCE)
            await vm.check()
            sock, _ = await (await vm.get_agent_socket()).connect(AGENT_PORT, _PATIENCE)
            sock.close()
    assert {path.name: path.stat().st_mtime_ns for path in saved.iterdir()} == before


async def test_a_guest_that_panics_has_ended(tmp_path: Path) -> None:
    """Cloud Hypervisor would boot it again, in the same process."""
    async with _vm(tmp_path, "panics") as vm:
        kernel = f"{vm._section.kernel_params} rdinit=/nope"
        vm._section = dataclasses.replace(vm._section, kernel_params=kernel)
        await vm.start_vm(_PATIENCE)
        ended = await asyncio.wait_for(vm.wait_vm(), _PATIENCE)
        assert "the guest kernel panicked" in ended.reason
        assert await vm.get_pids() == []
