"""A real thing behind each kind of device: what the contract plugs, cell by cell of the table.

What: `Gear.make` gives a `DeviceConfig` of a kind: an image, a tap, a directory.
Why: the table of kinds and operations must have no cell that nobody tried; who adds a kind adds it here, and
a kind that is missing here fails the suite.
Invariants: what was made is gone after `Gear.close`. A kind whose host part is missing here (a device to pass
through) is named by `missing`, and the suite skips by that name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from conformance.back_ends import Passt, StorageDaemon, passt_missing, storage_missing
from devices.config import (
    BalloonConfig,
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    ProtectionConfig,
    RngConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VsockConfig,
)
from devices.kinds import Kind
from devices.pci_driver import give_to_vfio
from devices.undo import MemoryUndo
from devices.vfio import read_function

__all__ = ["DISK_SIZE", "INSTEAD_OF_VSOCK", "KINDS", "PLUGGED_AS_SIZE", "Gear", "words"]

PLUGGED_AS_SIZE = frozenset({Kind.VCPU, Kind.DIMM, Kind.VIRTIO_MEM})
"""What comes and goes by `resize_vcpu` and `resize_memory`, not as a device."""

INSTEAD_OF_VSOCK = frozenset({Kind.PORT})
"""The agent's channel in a VM that has no vsock."""

DISK_SIZE = 1 << 20
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

_SPARE = {(0x1234, 0x11E8), (0x1B36, 0x0010)}  # QEMU's edu and NVMe: tests/benchhost/machine.py


def words(name: str) -> str:
    """What the disk of the device of this id begins with, so that a guest can tell it from all others."""
    return f"conformance {name}."


Maker = Callable[["Gear", str], Awaitable[DeviceConfig]]


class Gear:
    """`directory`: where files go; `vsock_daemon` as in the configuration; `tap_by_name`: the VMM opens a tap
    itself instead of getting it open."""

    def __init__(self, directory: Path, *, vsock_daemon: str = "", tap_by_name: bool = False) -> None:
        self.directory = directory
        self.vsock_daemon = vsock_daemon
        self.tap_by_name = tap_by_name
        self.stack = contextlib.AsyncExitStack()
        self.count = 0
        self.taken: set[str] = set()  # PCI devices

    async def close(self) -> None:
        """Take everything away again."""
        await self.stack.aclose()

    def missing(self, kind: Kind) -> str:
        """What this host lacks for this kind; "" if nothing."""
        if kind is Kind.NET and not os.path.exists("/dev/net/tun"):
            return "/dev/net/tun"
        if kind is Kind.VFIO and not _spare(self.taken):
            return "a PCI device to spare (the bench host has some)"
        if kind is Kind.VHOST_USER_NET:
            return passt_missing()
        if kind is Kind.VHOST_USER_BLK:
            return storage_missing()
        return ""

    async def make(self, kind: Kind) -> DeviceConfig:
        """A device of this kind with something real behind it, and an id of its own."""
        self.count += 1
        return await _MAKERS[kind](self, f"{kind.name.lower().replace('_', '-')}-{self.count}")

    def resized(self, device: DeviceConfig) -> DeviceConfig:
        """The same, and what is behind it has another size now."""
        assert isinstance(device, BlockConfig)
        os.truncate(device.path, 2 * DISK_SIZE)
        return device

    def image(self, name: str) -> Path:
        """A file that can be a disk."""
        path = self.directory / f"{name}.img"
        path.write_bytes(words(name).encode().ljust(DISK_SIZE, b"\0"))
        path.chmod(0o666)  # a jailed VMM is another user
        return path


async def _disk(gear: Gear, name: str) -> DeviceConfig:
    return BlockConfig(id=name, path=str(gear.image(name)))


async def _scsi(gear: Gear, name: str) -> DeviceConfig:
    return BlockConfig(id=name, path=str(gear.image(name)), driver=Kind.SCSI)


async def _pmem(gear: Gear, name: str) -> DeviceConfig:
    return BlockConfig(id=name, path=str(gear.image(name)), driver=Kind.PMEM, read_only=True)


def _open_tap(name: bytes) -> tuple[int, str]:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    answer = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, flags))
    return fd, answer[:16].rstrip(b"\0").decode()


def _remove_tap(name: str) -> None:
    fd, _ = _open_tap(name.encode())
    fcntl.ioctl(fd, _TUNSETPERSIST, 0)
    os.close(fd)


async def _card(gear: Gear, name: str) -> DeviceConfig:
    """A tap that lives as long as its descriptor, or, if the VMM wants its name, until the end."""
    fd, tap = _open_tap(b"kataconf%d")
    mac = f"02:00:00:00:00:{gear.count:02x}"
    if gear.tap_by_name:
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        os.close(fd)
        gear.stack.callback(_remove_tap, tap)
        return NetworkConfig(id=name, mac=mac, tap=tap)
    gear.stack.callback(os.close, fd)
    return NetworkConfig(id=name, mac=mac, tap=tap, tap_fds=(fd,))


async def _share(gear: Gear, name: str) -> DeviceConfig:
    source = gear.directory / name
    source.mkdir()
    (source / "whose").write_text(name)
    return ShareFsConfig(id=name, source=str(source), tag=name)


async def _vsock(gear: Gear, name: str) -> DeviceConfig:
    return VsockConfig(id=name, daemon=gear.vsock_daemon)


async def _rng(gear: Gear, name: str) -> DeviceConfig:
    return RngConfig(id=name)


async def _balloon(gear: Gear, name: str) -> DeviceConfig:
    return BalloonConfig(id=name)


async def _console(gear: Gear, name: str) -> DeviceConfig:
    return ConsoleConfig(id=name)


async def _protection(gear: Gear, name: str) -> DeviceConfig:
    return ProtectionConfig(id=name, technology="sev", c_bit=51, reduced_bits=1)


async def _passed(gear: Gear, name: str) -> DeviceConfig:
    """One of the bench host's spare devices, with vfio-pci until the end."""
    undo = MemoryUndo()
    gear.stack.push_async_callback(undo.release_all)
    address = _spare(gear.taken)[0]
    gear.taken.add(address)
    gear.stack.callback(gear.taken.discard, address)
    await give_to_vfio(read_function(address), undo)
    return VfioConfig(id=name, address=address)


def _spare(taken: set[str]) -> list[str]:
    """Functions that nobody misses: only inside the bench host, where they were put for it."""
    if not os.environ.get("KATA_BENCH_HOST"):
        return []
    found = [read_function(address) for address in sorted(os.listdir("/sys/bus/pci/devices"))]
    return [one.address for one in found if (one.vendor, one.device) in _SPARE and one.address not in taken]


async def _served_disk(gear: Gear, name: str) -> DeviceConfig:
    daemon = StorageDaemon(gear.image(name), gear.directory / f"{name}.sock")
    gear.stack.callback(daemon.close)
    return VhostUserBlkConfig(id=name, path=daemon.path)


async def _served_card(gear: Gear, name: str) -> DeviceConfig:
    passt = Passt(gear.directory / f"{name}.sock")
    gear.stack.callback(passt.close)
    return VhostUserNetConfig(id=name, path=passt.path, mac=f"02:00:00:00:01:{gear.count:02x}")


_MAKERS: dict[Kind, Maker] = {
    Kind.BLK: _disk,
    Kind.SCSI: _scsi,
    Kind.PMEM: _pmem,
    Kind.NET: _card,
    Kind.VHOST_USER_BLK: _served_disk,
    Kind.VHOST_USER_NET: _served_card,
    Kind.SHARE_FS: _share,
    Kind.VSOCK: _vsock,
    Kind.RNG: _rng,
    Kind.BALLOON: _balloon,
    Kind.CONSOLE: _console,
    Kind.VFIO: _passed,
    Kind.PROTECTION: _protection,
}
KINDS = tuple(_MAKERS)
"""Those that are devices; with `PLUGGED_AS_SIZE` and `INSTEAD_OF_VSOCK` they are all there are."""
