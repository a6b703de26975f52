"""A device that is or will be plugged into a VM, and how often it is used.

What: the mission's `Device` as a protocol, and `PluggedDevice`, which serves every kind of
`devices.config`: plugging is the VMM's matter, so the kinds differ in data only.
Why counts: two containers of a pod may use the same disk; it is plugged once and unplugged when the
last one lets go.
Invariants: a count above 0 means plugged: a plug that fails gives its count back. Who lets go of a device
is no user any more, whatever comes of the unplug. One that fails leaves the device `leaving`: it has to
be gone for good before anybody can have it again. Where the VMM cannot unplug at all the device stays
plugged without users, and the next one finds it there.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import Protocol

from devices.config import BlockConfig, DeviceConfig, VhostUserBlkConfig, VhostUserNetConfig
from devices.errors import BugError, CallerError, UnsupportedByHypervisor
from devices.threads import look

__all__ = ["ChangingHost", "Device", "DeviceHost", "PluggedDevice"]


class DeviceHost(Protocol):
    """What a device needs of a hypervisor: a part of `hypervisors.base.Hypervisor`."""

    async def add_device(self, device: DeviceConfig) -> str:
        """Plug it; returns its guest PCI path."""
        ...

    async def remove_device(self, device_id: str) -> None:
        """Unplug it."""
        ...


class ChangingHost(DeviceHost, Protocol):
    """One that can change what is plugged."""

    async def update_device(self, device: DeviceConfig) -> None:
        """Make the plugged device what is asked for now."""
        ...


class Device(Protocol):
    """The mission's trait, method by method."""

    async def attach(self, h: DeviceHost) -> None: ...
    async def detach(self, h: DeviceHost) -> int | None: ...
    async def device_id(self) -> str: ...
    async def set_device_info(self, device_info: DeviceConfig) -> None: ...
    async def get_device_info(self) -> DeviceConfig: ...
    async def get_major_minor(self) -> tuple[int, int]: ...
    async def get_host_path(self) -> str: ...
    async def get_bdf(self) -> str | None: ...
    async def get_attach_count(self) -> int: ...
    async def increase_attach_count(self) -> bool: ...
    async def decrease_attach_count(self) -> bool: ...


class PluggedDevice:
    """One device of any kind. `index`: of a disk, for its name in the guest; None for other kinds."""

    def __init__(self, config: DeviceConfig, index: int | None = None) -> None:
        self._config = config
        self._count = 0
        self.index = index
        self.guest_path = ""
        self.plugged = False
        self.leaving = False
        self.claim = -1  # a disk's, see `devices.in_use`; whoever knows the device closes it

    async def attach(self, h: DeviceHost) -> None:
        """Plug it into the VM, unless it is plugged already. Raises what the hypervisor raises."""
        if self.leaving:
            await self.detach(h)
        if await self.increase_attach_count() or self.plugged:
            return
        try:
            self.guest_path = await h.add_device(self._config)
            self.plugged = True
        except BaseException:
            self._count -= 1
            raise

    async def detach(self, h: DeviceHost) -> int | None:
        """Unplug it, unless others use it still; the index that is free now. Raises likewise.

        Of a device that nobody uses, but that is there still, it tries the unplug again.
        """
        if self._count == 0 and not self.plugged:
            raise CallerError(f"device {self._config.id} is not attached")
        if self._count and await self.decrease_attach_count():
            return None
        self.leaving = True
        try:
            await h.remove_device(self._config.id)
        except UnsupportedByHypervisor:
            self.leaving = False
            raise
        self.leaving = self.plugged = False
        self.guest_path = ""
        return self.index

    async def device_id(self) -> str:
        """Unique in the sandbox."""
        return self._config.id

    async def set_device_info(self, device_info: DeviceConfig) -> None:
        """Change what it is, but not its id. Raises CallerError while it is plugged."""
        if self._count or self.plugged:
            raise CallerError(f"device {self._config.id} is in use")
        self._config = replace(device_info, id=self._config.id)

    async def update(self, h: ChangingHost, device_info: DeviceConfig) -> None:
        """Change it while it is plugged, as far as the hypervisor can. Raises CallerError while it is not."""
        if not self.plugged:
            raise CallerError(f"device {self._config.id} is not attached")
        changed = replace(device_info, id=self._config.id)
        await h.update_device(changed)
        self._config = changed

    async def get_device_info(self) -> DeviceConfig:
        """Its configuration."""
        return self._config

    async def get_major_minor(self) -> tuple[int, int]:
        """Of the host's block device behind it; (-1, -1) for an image file and for other kinds."""
        path = await self.get_host_path()
        info = await look(os.stat, path) if path else None
        if info is None or not stat.S_ISBLK(info.st_mode):
            return (-1, -1)
        return (os.major(info.st_rdev), os.minor(info.st_rdev))

    async def get_host_path(self) -> str:
        """The file, block device or socket behind it; "" for kinds without."""
        behind = BlockConfig | VhostUserBlkConfig | VhostUserNetConfig
        return self._config.path if isinstance(self._config, behind) else ""

    async def get_bdf(self) -> str | None:
        """Its PCI path in the guest; None while it is not plugged and for what is no PCI device."""
        return self.guest_path or None

    async def get_attach_count(self) -> int:
        """How many users it has."""
        return self._count

    async def increase_attach_count(self) -> bool:
        """Count one more user; True: it is plugged already, skip the real attach."""
        self._count += 1
        return self._count > 1

    async def decrease_attach_count(self) -> bool:
        """Count one user less; True: others use it still, skip the real detach. Raises BugError at 0."""
        if self._count == 0:
            raise BugError(f"device {self._config.id} is detached more often than attached")
        self._count -= 1
        return self._count > 0
