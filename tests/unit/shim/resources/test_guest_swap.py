"""The guest's swap is a file of the configured size that the kernel takes, and goes with the sandbox."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from devices.config import BlockConfig, DeviceConfig
from devices.errors import GuestError, HostError
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from shim.resources.guest_swap import GuestSwap, SwapSettings

SIZE = 8 << 20
TOOLS = {**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"}


class Vm:
    """Plugs disks."""

    def __init__(self) -> None:
        self.plugged: list[str] = []

    async def add_device(self, device: DeviceConfig) -> str:
        assert isinstance(device, BlockConfig)
        self.plugged.append(device.path)
        return "02/05"

    async def remove_device(self, device_id: str) -> None:
        raise AssertionError(device_id)


class Agent:
    """Takes swap, or does not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.paths: list[str] = []

    async def add_swap(self, pci_path: str) -> None:
        self.paths.append(pci_path)
        if self.error is not None:
            raise self.error


async def test_it_is_made_plugged_used_and_removed(tmp_path: Path) -> None:
    undo, vm, agent = MemoryUndo(), Vm(), Agent()
    swap = GuestSwap(SwapSettings(str(tmp_path / "swap"), SIZE), "s1", undo)
    await swap.start(DeviceManager(), vm, agent)
    path = tmp_path / "swap/s1.swap"
    info = path.stat()

    assert (vm.plugged, agent.paths) == ([str(path)], ["02/05"])
    assert (info.st_size, stat.S_IMODE(info.st_mode)) == (SIZE, 0o600)
    assert info.st_blocks * 512 < 1 << 20
    probe = ["blkid", "-p", "-o", "value", "-s", "TYPE", str(path)]
    done = subprocess.run(probe, capture_output=True, text=True, check=False, env=TOOLS)
    assert done.stdout.strip() == "swap"
    assert [(entry.kind, entry.facts["path"]) for entry in undo.entries] == [("file", str(path))]
    await swap.close()
    await swap.close()
    assert not path.exists()
    assert undo.entries == []


async def test_a_guest_that_does_not_take_it_fails_the_start(tmp_path: Path) -> None:
    undo = MemoryUndo()
    swap = GuestSwap(SwapSettings(str(tmp_path), SIZE), "s1", undo)
    with pytest.raises(GuestError):
        await swap.start(DeviceManager(), Vm(), Agent(GuestError("no")))
    await swap.close()
    assert list(tmp_path.iterdir()) == []


async def test_a_file_system_without_room_is_told_before_anything_is_plugged(tmp_path: Path) -> None:
    vm = Vm()
    swap = GuestSwap(SwapSettings(str(tmp_path), 1 << 60), "s1", MemoryUndo())
    with pytest.raises(HostError, match="no room for the guest's swap"):
        await swap.start(DeviceManager(), vm, Agent())
    await swap.close()
    assert (vm.plugged, list(tmp_path.iterdir())) == ([], [])
