"""All devices of one VM: who has what, under which name, how often.

What: `DeviceManager`, the mission's device manager (`try_add_device`, `try_remove_device`,
`generate_agent_device`, `get_device_guest_path`, `get_driver_options`).
Why: a disk asked for twice is plugged once, whatever path led to it, and names in the guest are given
out and taken back in one place.
Invariants: one operation at a time; a device that could not be plugged is not known afterwards, and
its index is free again.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import asdict, dataclass

from devices.config import BlockConfig, DeviceConfig
from devices.device import DeviceHost, PluggedDevice
from devices.errors import CallerError, HostError

__all__ = ["AgentDevice", "DeviceManager", "disk_name"]

_BLOCK_DRIVER = "virtio-blk-pci"


@dataclass(frozen=True, slots=True)
class AgentDevice:
    """What the agent is told of a disk: the agent's `Device` message without protobuf."""

    id: str
    type: str  # "blk": the agent finds it by its PCI path
    vm_path: str  # /dev/vdX
    guest_path: str  # PCI slots from the root, "02/00"


def disk_name(index: int) -> str:
    """The kernel's name of the virtio disk with this index: vda ... vdz, vdaa ..."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return f"vd{letters}"


class DeviceManager:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._devices: dict[str, PluggedDevice] = {}
        self._by_source: dict[tuple[object, ...], str] = {}
        self._lock = asyncio.Lock()

    async def try_add_device(self, dev_info: DeviceConfig, h: DeviceHost) -> str:
        """Plug it, or use what is plugged for the same source; the id to remove it by.

        Raises HostError when a disk's source is not there, CallerError when it is in use with other
        properties or the id is taken, and what the hypervisor raises.
        """
        async with self._lock:
            source = _source(dev_info)
            known = self._devices.get(self._by_source.get(source, ""))
            if known is not None:
                config = await known.get_device_info()
                if _properties(config) != _properties(dev_info):
                    raise CallerError(
                        f"{config.id} is in use already with other properties than asked for now"
                    )
                await known.attach(h)
                return config.id
            if dev_info.id in self._devices:
                raise CallerError(f"there is a device {dev_info.id} already", code="ALREADY_EXISTS")
            device = PluggedDevice(
                dev_info, self._free_index() if isinstance(dev_info, BlockConfig) else None
            )
            await device.attach(h)
            self._devices[dev_info.id] = device
            self._by_source[source] = dev_info.id
            return dev_info.id

    async def try_remove_device(self, device_id: str, h: DeviceHost) -> int | None:
        """Let go of it; unplug it when nobody uses it any more. The freed disk index, if one was.

        Raises CallerError for an unknown id, and what the hypervisor raises: the device stays then.
        """
        async with self._lock:
            device = self._known(device_id)
            freed = await device.detach(h)
            if await device.get_attach_count() == 0:
                del self._devices[device_id]
                self._by_source = {key: name for key, name in self._by_source.items() if name != device_id}
            return freed

    async def generate_agent_device(self, device_id: str) -> AgentDevice:
        """How the agent finds a disk. Raises CallerError for an unknown id and for what is no disk."""
        device = self._known(device_id)
        if device.index is None:
            raise CallerError(f"device {device_id} is no disk", code="INVALID_ARGUMENT")
        return AgentDevice(device_id, "blk", f"/dev/{disk_name(device.index)}", device.guest_path)

    async def get_device_guest_path(self, id: str) -> str | None:  # noqa: A002  (the mission's name)
        """Its PCI path in the guest; None for an unknown id and for what has none."""
        device = self._devices.get(id)
        return device.guest_path or None if device is not None else None

    async def get_driver_options(self) -> str:
        """The driver of its disks, in the agent's words."""
        return _BLOCK_DRIVER

    def _known(self, device_id: str) -> PluggedDevice:
        device = self._devices.get(device_id)
        if device is None:
            raise CallerError(f"there is no device {device_id}", code="NOT_FOUND")
        return device

    def _free_index(self) -> int:
        taken = {device.index for device in self._devices.values()}
        return next(index for index in range(len(taken) + 1) if index not in taken)


def _source(config: DeviceConfig) -> tuple[object, ...]:
    """What makes two requests mean the same device: for a disk the thing itself, not the path to it."""
    if not isinstance(config, BlockConfig):
        return (type(config).__name__, config.id)
    try:
        info = os.stat(config.path)
    except OSError as error:
        raise HostError(f"cannot use {config.path} as a disk: {error.strerror}", phase="devices") from error
    if stat.S_ISBLK(info.st_mode):
        return ("block", info.st_rdev)
    return ("file", info.st_dev, info.st_ino)


def _properties(config: DeviceConfig) -> dict[str, object]:
    """What two requests for one device must agree on: all but its names."""
    return {name: value for name, value in asdict(config).items() if name not in ("id", "path")}
