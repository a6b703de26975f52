"""The disks of a Firecracker VM: all there from the boot on, filled and emptied later.

What: `Drives` has a slot for each disk: those that the VM boots with, then `block_device_slots` empty ones of
each kind, read-only and writable, which is fixed for a drive. Filling a slot is a PATCH with a host file,
emptying it a PATCH with the empty file.
Why: Firecracker has no hot-plug. The guest hears of a new size by an interrupt; the agent waits for it.
Invariants: a slot has one user; a slot that could not be filled is free again, with nothing lent; one PATCH
at a time. The guest names disks in the order of the slots, so a slot's name is known beforehand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from devices.config import BlockConfig
from devices.errors import HostError, HypervisorError
from devices.threads import acquire
from hypervisors.firecracker import boot
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.jail import Den
from hypervisors.http_api import HttpApi

__all__ = ["EMPTY", "Drives", "disk_path"]

EMPTY = "empty-disk"  # a file in the den
_CALL = 10.0  # seconds


@dataclass(slots=True)
class _Slot:
    """One disk of the VM. `user`: the device in it, "" while it holds the empty file."""

    drive: str
    index: int
    read_only: bool
    user: str = ""


def disk_path(index: int) -> str:
    """The guest's name of a slot's disk: virtio-mmio disks are found in the order of their making."""
    return f"/dev/vd{chr(ord('a') + index)}"


class Drives:
    """See the module's docstring."""

    def __init__(self, section: FirecrackerConfig, den: Den) -> None:
        self._section = section
        self._den = den
        self._slots: list[_Slot] = []
        self._lock = asyncio.Lock()

    async def boot_with(self, disks: Sequence[BlockConfig]) -> list[boot.Call]:
        """The calls that make all slots, these disks in the first ones. Raises OSError."""
        calls = []
        for device in disks:
            slot = self._add(device.read_only, device.id)
            path = await acquire(self._den.lend, device.path, slot.drive, read_only=device.read_only)
            calls.append(boot.drive(self._section, slot.drive, path, read_only=device.read_only))
        for number in range(2 * self._section.block_device_slots):
            slot = self._add(number < self._section.block_device_slots)
            calls.append(boot.drive(self._section, slot.drive, EMPTY, read_only=slot.read_only))
        return calls

    async def fill(self, device: BlockConfig, api: HttpApi) -> str:
        """Put the disk into a free slot; its name in the guest. Raises HypervisorError, HostError."""
        async with self._lock:
            slot = next(
                (one for one in self._slots if not one.user and one.read_only == device.read_only), None
            )
            if slot is None:
                kind = "read-only" if device.read_only else "writable"
                raise HypervisorError(
                    f"no free slot for the {kind} disk {device.id}: this VM has"
                    f" {self._section.block_device_slots} of them",
                    phase="devices",
                    code="RESOURCE_EXHAUSTED",
                    hint="raise [hypervisor.firecracker] block_device_slots",
                )
            try:
                path = await acquire(self._den.lend, device.path, slot.drive, read_only=device.read_only)
                await _patch(api, slot, path)
            except OSError as error:
                await acquire(self._den.take_back, slot.drive)
                raise HostError(f"cannot lend {device.path} to the VM: {error}", phase="devices") from error
            except BaseException:
                await acquire(self._den.take_back, slot.drive)
                raise
            slot.user = device.id
            return disk_path(slot.index)

    async def empty(self, device_id: str, api: HttpApi) -> bool:
        """Take the disk out of its slot; False if it is in none. Raises HypervisorError: it stays then."""
        async with self._lock:
            slot = self._of(device_id)
            if slot is None:
                return False
            await _patch(api, slot, EMPTY)
            await acquire(self._den.take_back, slot.drive)
            slot.user = ""
            return True

    async def announce(self, device: BlockConfig, api: HttpApi) -> bool:
        """Have the guest look at the disk's size again; False if it is in no slot. Raises HypervisorError."""
        async with self._lock:
            slot = self._of(device.id)
            if slot is None:
                return False
            await _patch(api, slot, slot.drive if self._den.jailed else device.path)
            return True

    def has(self, device_id: str) -> bool:
        """Whether the disk is in a slot."""
        return self._of(device_id) is not None

    def _of(self, device_id: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.user == device_id), None)

    def _add(self, read_only: bool, user: str = "") -> _Slot:
        slot = _Slot(f"drive{len(self._slots)}", len(self._slots), read_only, user)
        self._slots.append(slot)
        return slot


async def _patch(api: HttpApi, slot: _Slot, path: str) -> None:
    body = {"drive_id": slot.drive, "path_on_host": path}
    await api.patch(f"/drives/{slot.drive}", body, timeout=_CALL)
