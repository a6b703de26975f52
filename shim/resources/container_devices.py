"""The host's devices that a container gets: plugged into the VM, found by the agent, gone with the container.

What: `check` refuses those that cannot be had before anything is done for a sandbox; `ContainerDevices.add`
plugs them and says how the agent finds each.
Why by number: `linux.devices` has the container's paths, which are not the host's.
Invariants: a disk that the host uses is refused (`devices.in_use`); one disk is plugged once per VM, however
many containers use it, and for all of them in the same way; a container whose rules do not let it write gets
a disk that the VMM does not let it write, unless a vhost-user back end serves it (then the guest's rules
hold it back). What `add` plugged is among the container's holdings.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence

from devices.config import DeviceConfig
from devices.errors import HostError
from devices.holdings import Holdings
from devices.in_use import device_node, probe
from devices.manager import DeviceManager
from devices.threads import look
from proto import agent_pb2
from shim.resources.disks import DiskStyle
from shim.resources.vhost_user_store import MAJORS, find
from shim.spec.guest_devices import HostDevice

__all__ = ["ContainerDevices", "check"]

_PHASE = "devices"
_BLKROGET = 0x125E


def check(devices: Sequence[HostDevice], store: str = "") -> None:
    """Raise CallerError or HostError for the first that cannot be had. `store`: see `DiskStyle`. Blocks."""
    for device in devices:
        if device.major in MAJORS:
            find(store, device.major, device.minor, device.path)
            continue
        path = _node(device)
        probe(path, read_only=_read_only(path, device))


class ContainerDevices:
    """The plugged ones of one sandbox."""

    def __init__(self, devices: DeviceManager, holdings: Holdings, style: DiskStyle) -> None:
        self._devices = devices
        self._holdings = holdings
        self._style = style

    async def add(self, container_id: str, wanted: Sequence[HostDevice]) -> list[agent_pb2.Device]:
        """Plug them; what the agent is told. Raises KataError; releasing the container's holdings undoes what
        was done."""
        found = []
        for device in wanted:
            held = await self._holdings.take(container_id, await self.disk(device))
            there = await self._devices.generate_agent_device(held)
            found.append(
                agent_pb2.Device(
                    id=there.id, type=there.type, vm_path=there.vm_path, container_path=device.path
                )
            )
        return found

    async def disk(self, device: HostDevice) -> DeviceConfig:
        """What is plugged for it. Raises HostError for what is not there."""
        name = f"b{device.major}-{device.minor}"
        if device.major in MAJORS:
            store = self._style.store
            return self._style.served(name, await look(find, store, device.major, device.minor, device.path))
        path = await look(_node, device)
        read_only = await look(_read_only, path, device)
        return await self._style.disk(name, path, read_only=read_only, limits=device.limits)


def _node(device: HostDevice) -> str:
    node = device_node(os.makedev(device.major, device.minor))
    if not node:
        raise HostError(
            f"{device.path[:200]}: this host has no block device {device.major}:{device.minor}", phase=_PHASE
        )
    return node


def _read_only(path: str, device: HostDevice) -> bool:
    """By the container's rules, or because the device is so itself."""
    if "w" not in device.access:
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return bool(struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"{path} cannot be used: {error.strerror}", phase=_PHASE) from error
