"""Disks and network cards that come and go while the VM runs under QEMU.

What: `Plugger.add` and `remove`: back end (blockdev-add, netdev_add), front end (device_add behind a
port or bridge), and both away again.
Why one transaction: QEMU has three objects for one disk (slot, node, device), each of which can fail to
come or to go; whoever plugs again must find neither a half nor a leak.
Invariants:
- What `add` did not finish it has undone, also when it was cancelled; the slot and the id are free then.
- A device is plugged until DEVICE_DELETED: only then its back end goes, and then its slot is free. A guest
  that does not let go keeps it, and `remove` can be tried again.
- `remove` of what is half gone, from an attempt that failed, goes on where that one ended.
Source: qapi/{block-core,net,qdev}.json of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import dataclass, field
from typing import Any

import structlog

from devices.addresses import PciTopology, Place
from devices.config import BlockConfig, NetworkConfig
from devices.errors import BugError, CallerError, HypervisorError, KataError, UnsupportedByHypervisor
from hypervisors.qemu.cmdline import block_node
from hypervisors.qemu.events import deleted
from hypervisors.qemu.qmp import QmpClient, QmpError

__all__ = ["Plugger", "is_block_device"]

_NOT_FOUND = "DeviceNotFound"  # QEMU's error class
_IN_USE = "is in use"
_MOMENT = 0.005  # seconds
_ABSENT = ("not found", "Failed to find node")  # and its words, where it has none

_log = structlog.get_logger("qemu.hotplug")


@dataclass(slots=True)
class _Plugged:
    """`back_end`: the commands that remove what the device stands on, in the order of its making. `whole`:
    it came, and nobody has tried to remove it."""

    place: Place
    back_end: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    whole: bool = False
    device_gone: bool = False


class Plugger:
    """Everything hot-plugged into one VM. `deadline`: seconds for the guest to let go of a device."""

    def __init__(self, qmp: QmpClient, topology: PciTopology, deadline: float) -> None:
        self._qmp = qmp
        self._topology = topology
        self._deadline = deadline
        self._plugged: dict[str, _Plugged] = {}

    def __contains__(self, device_id: str) -> bool:
        return device_id in self._plugged

    async def add(self, device: BlockConfig | NetworkConfig) -> str:
        """Plug it; its guest path. QEMU has realised it then, the guest's driver may still be at it.

        Raises HypervisorError when QEMU refuses or no slot is free; nothing is left then.
        """
        if (there := self._plugged.get(device.id)) is not None:
            if there.whole:
                raise BugError(f"there is a device {device.id} already")
            await self.remove(device.id)  # what an earlier attempt could not undo
        plugged = _Plugged(self._topology.allocate(device.id, hotplug=True))
        self._plugged[device.id] = plugged
        try:
            if isinstance(device, BlockConfig):
                front = await self._block(device, plugged)
            else:
                front = await self._network(device, plugged)
            front |= {"id": device.id, "bus": plugged.place.bus, "addr": f"{plugged.place.slot:#x}"}
            # Legacy virtio needs I/O ports, of which a bridge has few.
            await self._qmp.execute("device_add", {**front, "disable-legacy": "on"})
            plugged.whole = True
        except BaseException:
            try:
                await self.remove(device.id)
            except KataError as error:
                _log.error("what was plugged half did not go", device=device.id, error=str(error))
            raise
        return plugged.place.guest_path

    async def remove(self, device_id: str) -> None:
        """Unplug it. Raises HypervisorError when the guest does not let go in time: it stays plugged then."""
        plugged = self._plugged.get(device_id)
        if plugged is None:
            raise CallerError(f"no device {device_id} is plugged", code="NOT_FOUND")
        plugged.whole = False
        if not plugged.device_gone:
            await self._unplug(device_id)
            plugged.device_gone = True
        while plugged.back_end:
            await self._forget(*plugged.back_end[-1])
            plugged.back_end.pop()
        del self._plugged[device_id]
        self._topology.release(device_id)

    async def _unplug(self, device_id: str) -> None:
        with self._qmp.expect(deleted(device_id)) as gone:
            try:
                await self._qmp.execute("device_del", {"id": device_id})
            except QmpError as error:
                if error.kind == _NOT_FOUND:
                    return  # the guest let go of it after an earlier attempt gave up
                if "process of unplug" not in error.cause:
                    raise
            try:
                async with asyncio.timeout(self._deadline):
                    await gone
            except TimeoutError:
                raise HypervisorError(
                    f"the guest did not let go of {device_id} within {self._deadline:g} s",
                    phase="devices",
                    hint="see whether something in the guest still uses it; raise hotplug_timeout",
                    code="DEADLINE_EXCEEDED",
                ) from None

    # --- back ends: each gives device_add's arguments

    async def _block(self, device: BlockConfig, plugged: _Plugged) -> dict[str, Any]:
        node = block_node(device, host_device=await asyncio.to_thread(is_block_device, device.path))
        plugged.back_end.append(("blockdev-del", {"node-name": node["node-name"]}))
        await self._qmp.execute("blockdev-add", node)
        front = {"driver": "virtio-blk-pci", "drive": node["node-name"]}
        return front | ({"serial": device.serial} if device.serial else {})

    async def _network(self, device: NetworkConfig, plugged: _Plugged) -> dict[str, Any]:
        queues = len(device.tap_fds)
        if queues == 0:
            raise UnsupportedByHypervisor("qemu", "plugging a network card without a tap")
        netdev: dict[str, Any] = {"type": "tap", "id": f"net-{device.id}"}
        for key, fds in (("fds", device.tap_fds), ("vhostfds", device.vhost_fds)):
            names = [f"{key}-{device.id}-{number}" for number in range(len(fds))]
            for name, fd in zip(names, fds, strict=True):
                plugged.back_end.append(("closefd", {"fdname": name}))
                await self._qmp.execute("getfd", {"fdname": name}, fds=[fd])
            if names:
                netdev[key] = ":".join(names)
        if device.vhost_fds:
            netdev["vhost"] = True
        plugged.back_end.append(("netdev_del", {"id": netdev["id"]}))
        await self._qmp.execute("netdev_add", netdev)
        front: dict[str, Any] = {"driver": "virtio-net-pci", "netdev": netdev["id"], "mac": device.mac}
        return front | ({"mq": True, "vectors": 2 * queues + 2} if queues > 1 else {})

    async def _forget(self, command: str, arguments: dict[str, Any]) -> None:
        """Remove it; what never came is fine (a descriptor goes with its netdev, too).

        QEMU frees a device a moment after DEVICE_DELETED, and its node is in use until then.
        """
        end = asyncio.get_running_loop().time() + self._deadline
        while True:
            try:
                await self._qmp.execute(command, arguments)
            except QmpError as error:
                if error.kind == _NOT_FOUND or any(text in error.cause for text in _ABSENT):
                    return
                if _IN_USE not in error.cause or asyncio.get_running_loop().time() > end:
                    raise
                await asyncio.sleep(_MOMENT)  # nothing announces it
            else:
                return


def is_block_device(path: str) -> bool:
    """Whether QEMU must open it as `host_device`; False too for what is not there, which QEMU then says."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
