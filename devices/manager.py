"""All devices of one VM: who has what, under which name, how often.

What: `DeviceManager`, the mission's device manager (`try_add_device`, `try_remove_device`,
`generate_agent_device`, `get_device_guest_path`, `get_driver_options`).
Why: a disk asked for twice is plugged once, whatever path led to it, and names in the guest are given
out and taken back in one place.
Invariants: one operation at a time on each device, none waits for another's; a device that could not be
plugged is not known afterwards, and its index is free again; one that could not be unplugged is given to
nobody before it is.
"""

from __future__ import annotations

import asyncio
import os
import stat
import weakref
from dataclasses import asdict, dataclass, replace

from devices.config import BlockConfig, DeviceConfig, IoLimits, VhostUserBlkConfig, VhostUserNetConfig
from devices.device import ChangingHost, DeviceHost, PluggedDevice
from devices.errors import BugError, CallerError, HostError
from devices.kinds import Kind
from devices.threads import look

__all__ = ["AgentDevice", "DeviceManager", "PluggedDevice", "disk_name"]

# How the agent calls what has a place of its own in the guest; a disk without PCI is "mmioblk".
_AGENT_TYPES = {
    Kind.BLK: "blk",
    Kind.VHOST_USER_BLK: "blk",
    Kind.SCSI: "scsi",
    Kind.PMEM: "nvdimm",
    Kind.VFIO: "vfio-pci-gk",
}

# Whose nodes in the guest are /dev/vdX, X by their number.
_LETTERED = frozenset({Kind.BLK, Kind.VHOST_USER_BLK})

_DRIVERS = {Kind.BLK: "virtio-blk-pci", Kind.SCSI: "virtio-scsi", Kind.PMEM: "virtio-pmem"}

Source = tuple[object, ...]  # what makes two requests mean the same device


@dataclass(frozen=True, slots=True)
class AgentDevice:
    """What the agent is told of a device: its `Device` message without protobuf."""

    id: str  # PCI slots from the root, "02/00"; "0:5" of a SCSI disk; the node where there is no bus
    type: str  # "blk", "mmioblk", "scsi", "nvdimm"
    vm_path: str  # "/dev/vda"; "" for what is no disk, and for a SCSI disk, whose name is the guest's choice


def disk_name(index: int) -> str:
    """The kernel's name of the virtio disk with this index: vda ... vdz, vdaa ..."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return f"vd{letters}"


class DeviceManager:
    """See the module's docstring. `driver`: how its disks are plugged, unless they say so themselves."""

    def __init__(self, driver: Kind = Kind.BLK) -> None:
        self._driver = driver
        self._devices: dict[str, PluggedDevice] = {}
        self._sources: dict[str, Source] = {}
        self._locks: weakref.WeakValueDictionary[Source, asyncio.Lock] = weakref.WeakValueDictionary()

    async def try_add_device(self, dev_info: DeviceConfig, h: DeviceHost) -> str:
        """Plug it, or use what is plugged for the same source; the id to remove it by.

        Raises HostError when a disk's source is not there, CallerError when it is in use on the host, or here
        with other properties, BugError when the id is another device's, and what the hypervisor raises.
        """
        source = await look(_source, dev_info)
        async with self._lock(source):
            name = next((name for name, known in self._sources.items() if known == source), None)
            if name is not None and self._devices[name].leaving:
                await self._devices[name].detach(h)
                self._forget(name)
                name = None
            if name is not None:
                device = self._devices[name]
                if _properties(await device.get_device_info()) != _properties(dev_info):
                    raise CallerError(f"device {name} is in use already, but not as asked for now")
                await device.attach(h)
                return name
            if dev_info.id in self._devices:
                raise BugError(f"two devices are called {dev_info.id}")
            device = PluggedDevice(dev_info, self._free_index() if dev_info.kind in _LETTERED else None)
            self._devices[dev_info.id], self._sources[dev_info.id] = device, source
            try:
                if isinstance(dev_info, BlockConfig) and not dev_info.ours:
                    from devices.in_use import hold  # not on the usual start path

                    device.claim = await hold(dev_info.path, read_only=dev_info.read_only)
                await device.attach(h)
            except BaseException:
                self._forget(dev_info.id)
                raise
            return dev_info.id

    async def try_remove_device(self, device_id: str, h: DeviceHost) -> int | None:
        """Let go of it; unplug it when nobody uses it any more. The freed disk index, if one was.

        Raises CallerError for an unknown id, and what the hypervisor raises: nobody uses the device then,
        but it is known still, and its index taken, until this is called again and succeeds, or until
        `try_add_device` wants the same source, which finishes the unplug first.
        """
        self._known(device_id)
        async with self._lock(self._sources[device_id]):
            device = self._known(device_id)  # it may have gone, or failed to come, while we waited
            freed = await device.detach(h)
            if await device.get_attach_count() == 0:
                self._forget(device_id)
            return freed

    async def update_disk(
        self, device_id: str, h: ChangingHost, *, size: int = 0, limits: IoLimits | None = None
    ) -> None:
        """Have a plugged disk of `size` bytes (0: what its file or device has by now), with these limits.

        Raises CallerError for an unknown id and for what is no disk, and what the hypervisor raises.
        """
        self._known(device_id)
        async with self._lock(self._sources[device_id]):
            device = self._known(device_id)
            config = await device.get_device_info()
            if not isinstance(config, BlockConfig):
                raise CallerError(f"device {device_id} is no disk", code="INVALID_ARGUMENT")
            options = config.options if limits is None else replace(config.options, limits=limits)
            await device.update(h, replace(config, size=size, options=options))

    def close(self) -> None:
        """The VM is gone, and with it all that was plugged: whoever wants its disks can have them."""
        for name in list(self._devices):
            self._forget(name)

    async def generate_agent_device(self, device_id: str) -> AgentDevice:
        """How the agent finds it. Raises CallerError for an unknown id, and for what the agent is told of
        otherwise, such as a network card."""
        device = self._known(device_id)
        config = await device.get_device_info()
        kind = _AGENT_TYPES.get(config.kind)
        if kind is None:
            raise CallerError(
                f"device {device_id} ({config.kind.value}) is none of the agent's", code="INVALID_ARGUMENT"
            )
        if device.guest_path.startswith("/dev/"):  # on no bus: the VMM says the node's name itself
            node = device.guest_path
            return AgentDevice(node, kind if config.kind is Kind.PMEM else "mmioblk", node)
        path = "" if device.index is None else f"/dev/{disk_name(device.index)}"
        return AgentDevice(device.guest_path, kind, path)

    async def get_device_guest_path(self, id: str) -> str | None:  # noqa: A002  (the mission's name)
        """A disk's name in the guest, "/dev/vda"; None for an unknown id and for other kinds."""
        device = self._devices.get(id)
        return f"/dev/{disk_name(device.index)}" if device is not None and device.index is not None else None

    async def get_pci_path(self, device_id: str) -> str:
        """Where the guest finds it, "02/00"; "" for what is no PCI device. Raises CallerError if unknown."""
        return await self._known(device_id).get_bdf() or ""

    async def get_driver_options(self) -> str:
        """How disks are plugged that nobody wants otherwise, in Kata's words (`block_device_driver`)."""
        return _DRIVERS[self._driver]

    def _lock(self, source: Source) -> asyncio.Lock:
        """One per source, as long as somebody holds or awaits it."""
        return self._locks.setdefault(source, asyncio.Lock())

    def _forget(self, device_id: str) -> None:
        device = self._devices.pop(device_id)
        del self._sources[device_id]
        if device.claim >= 0:
            os.close(device.claim)
            device.claim = -1

    def _known(self, device_id: str) -> PluggedDevice:
        device = self._devices.get(device_id)
        if device is None:
            raise CallerError(f"there is no device {device_id}", code="NOT_FOUND")
        return device

    def _free_index(self) -> int:
        taken = {device.index for device in self._devices.values()}
        return next(index for index in range(len(taken) + 1) if index not in taken)


def _source(config: DeviceConfig) -> Source:
    """For what is behind a path the thing itself, not the path to it."""
    if not isinstance(config, BlockConfig | VhostUserBlkConfig | VhostUserNetConfig):
        return (type(config).__name__, config.id)
    try:
        info = os.stat(config.path)
    except OSError as error:
        raise HostError(f"{config.path} cannot be used: {error.strerror}", phase="devices") from error
    if stat.S_ISBLK(info.st_mode):
        return ("block", info.st_rdev)
    return ("file", info.st_dev, info.st_ino)


def _properties(config: DeviceConfig) -> dict[str, object]:
    """What two requests for one device must agree on: all but its names."""
    return {name: value for name, value in asdict(config).items() if name not in ("id", "path", "size")}
