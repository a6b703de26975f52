"""Disks that come and go while the VM runs.

Invariants: what a disk stands on goes with it, and when it could not be plugged; the guest lets go of it
before it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Collection

from devices.addresses import PciTopology
from devices.config import BlockConfig
from devices.errors import HypervisorError
from devices.threads import look
from hypervisors.qemu.qmp import QmpClient, QmpEvent
from kata_tinyvmm.arguments import node

__all__ = ["Plugged"]

_UNPLUG = 30.0  # seconds in which the guest lets go of a disk


class Plugged:
    """Those of one VM. `control` answers QEMU's control connection, or raises if there is none."""

    def __init__(self, topology: PciTopology, control: Callable[[], QmpClient]) -> None:
        self._topology = topology
        self._control = control
        self._numbers = itertools.count(1)
        self._sets: dict[str, int] = {}  # by the disk's id: the set of its descriptor

    @property
    def ids(self) -> Collection[str]:
        """Of the disks that are there, or are coming."""
        return self._sets.keys()

    async def add(self, device: BlockConfig) -> str:
        """Into a port; its guest path. QEMU has only the files in its view that it began with: it gets this
        one open."""
        qmp, number = self._control(), next(self._numbers)
        place = self._topology.allocate(device.id, hotplug=True)
        self._sets[device.id] = number
        try:
            flags = os.O_RDONLY if device.read_only else os.O_RDWR
            fd = await look(os.open, device.path, flags | os.O_CLOEXEC)
            try:
                await qmp.execute("add-fd", {"fdset-id": number}, fds=[fd])
            finally:
                os.close(fd)
            await qmp.execute("blockdev-add", node(device, f"/dev/fdset/{number}"))
            front = {"driver": "virtio-blk-pci", "id": device.id, "drive": f"node-{device.id}"}
            await qmp.execute("device_add", {**front, **place.properties})
        except BaseException:
            await self._drop(device.id)
            raise
        return place.guest_path

    async def remove(self, device_id: str) -> None:
        """Raises HypervisorError, with the disk still there."""
        qmp = self._control()
        with qmp.expect(lambda event: _is_gone(event, device_id)) as gone:
            await qmp.execute("device_del", {"id": device_id})
            try:
                await asyncio.wait_for(gone, _UNPLUG)
            except TimeoutError:
                raise HypervisorError(
                    f"the guest did not let go of {device_id} within {_UNPLUG:g} s",
                    phase="devices",
                    code="DEADLINE_EXCEEDED",
                    hint="see whether a container uses it still",
                ) from None
        await self._drop(device_id)

    async def _drop(self, device_id: str) -> None:
        """What a disk stands on, as far as it is there."""
        for command, arguments in (
            ("blockdev-del", {"node-name": f"node-{device_id}"}),
            ("remove-fd", {"fdset-id": self._sets.pop(device_id)}),
        ):
            with contextlib.suppress(HypervisorError):
                await self._control().execute(command, arguments)
        self._topology.release(device_id)


def _is_gone(event: QmpEvent, device_id: str) -> bool:
    data = event.get("data")
    return event["event"] == "DEVICE_DELETED" and isinstance(data, dict) and data.get("device") == device_id
