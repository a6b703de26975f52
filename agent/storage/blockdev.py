"""Block devices: from the host's name for them to the node in the guest's /dev.

What: `find_device` waits until the kernel has the device and answers its path, `wait_for_link` and
`wait_for_address` the same for a network card; `resolve_devices` puts guest numbers into a spec that was
written with the host's.
Why by uevent: hot-plug takes some 50 ms and the kernel announces its end; nothing is polled.
Invariants: the host's text only selects among what sysfs lists, it never becomes a path of ours;
waiting ends at `HOTPLUG_DEADLINE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import stat
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from agent import deadlines
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from proto import agent_pb2

__all__ = [
    "find_device",
    "on_uevent",
    "pci_directory",
    "resolve_devices",
    "wait_for_address",
    "wait_for_link",
    "wait_for_size",
]

T = TypeVar("T")

HOTPLUG_DEADLINE = deadlines.HOTPLUG  # seconds
SYSFS = "/sys"
_MODULES = {"scsi": ("virtio_scsi", "sd_mod"), "nvdimm": ("nfit", "nd_pmem")}  # nobody else loads them
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def pci_directory(path: str, sysfs: str = SYSFS) -> str | None:
    """The sysfs directory of a Kata PCI path: hexadecimal `slot[.function]` joined by "/", from the
    root bus. None while it does not exist. Raises RpcError(INVALID_ARGUMENT) for another text.
    """
    directory = f"{sysfs}/devices/pci0000:00"
    bus = "0000:00"
    for step in path.split("/"):
        slot, _, function = step.partition(".")
        try:
            number, minor = int(slot, 16), int(function or "0", 16)
        except ValueError:
            raise RpcError(Code.INVALID_ARGUMENT, f"{path[:80]!r} is no PCI path") from None
        if bus == "":
            return None
        directory += f"/{bus}:{number:02x}.{minor:x}"
        # Behind a bridge the bus number is whatever the kernel gave it.
        buses = _listdir(f"{directory}/pci_bus")
        bus = buses[0] if buses else ""
    return directory if os.path.isdir(directory) else None


def _blk(source: str, sysfs: str) -> str | None:
    if source.startswith("/dev/"):
        return _node(source)
    name = _virtio(source, "block", sysfs)
    return _made(name) if name else None


def _made(name: str) -> str | None:
    """The disk's node. sysfs has the disk a moment before /dev has it; the event comes after both."""
    node = f"/dev/{name}"
    return node if _there(node) else None


_there = os.path.exists


def _virtio(source: str, kind: str, sysfs: str) -> str | None:
    """The kernel's name of what the virtio device at this PCI path is: "vda", "eth0"."""
    directory = pci_directory(source, sysfs)
    if directory is None:
        return None
    for below in _listdir(directory):
        for name in _listdir(f"{directory}/{below}/{kind}") if below.startswith("virtio") else []:
            return name
    return None


def _scsi(source: str, sysfs: str) -> str | None:
    target, _, lun = source.partition(":")
    if not (target.isdigit() and lun.isdigit()):
        raise RpcError(Code.INVALID_ARGUMENT, f"{source[:80]!r} is no SCSI address id:lun")
    base = f"{sysfs}/class/scsi_device"
    for address in _listdir(base):
        if address.endswith(f":0:{int(target)}:{int(lun)}"):
            for name in _listdir(f"{base}/{address}/device/block"):
                return _made(name)
    return None


def _node(source: str) -> str | None:
    """A node that the host predicted, /dev/vdX or /dev/pmemN."""
    if not source.startswith("/dev/") or not source[5:].isalnum():
        raise RpcError(Code.INVALID_ARGUMENT, f"{source[:80]!r} is no device node")
    return source if os.path.exists(source) else None


def _pmem(source: str, sysfs: str) -> str | None:
    """The host predicts /dev/pmemN from the slot for memory, N, but the kernel counts in the order in which
    it finds them. The slot is in the handle that the firmware gives the device: QEMU has one more than it."""
    node = _node(source)
    slot = source.removeprefix("/dev/pmem")
    base = f"{sysfs}/bus/nd/devices"
    if not slot.isdigit():
        return node
    for region in (name for name in _listdir(base) if name.startswith("region")):
        dimm = _text(f"{base}/{region}/mapping0").split(",")[0]
        if _text(f"{base}/{dimm}/nfit/handle") == hex(int(slot) + 1):
            for below in _listdir(f"{base}/{region}"):
                for name in _listdir(f"{base}/{region}/{below}/block"):
                    return _made(name)
    return None if _listdir(base) else node


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _find(driver: str, source: str, sysfs: str) -> str | None:
    if driver == "blk":
        return _blk(source, sysfs)
    if driver == "scsi":
        return _scsi(source, sysfs)
    if driver == "nvdimm":
        return _pmem(source, sysfs)
    if driver == "mmioblk":
        return _node(source)
    raise RpcError(Code.UNIMPLEMENTED, f"block driver {driver[:40]!r} is not supported by this agent")


async def find_device(
    driver: str, source: str, *, sysfs: str = SYSFS, timeout: float = HOTPLUG_DEADLINE
) -> str:
    """The device node. Raises RpcError(NOT_FOUND) when it does not appear in `timeout` seconds."""
    found = _find(driver, source, sysfs)
    if found is None:
        loop = asyncio.get_running_loop()
        if driver in _MODULES:
            from agent.insmod import load

            await loop.run_in_executor(None, load, _MODULES[driver])
        scan = functools.partial(_scan_scsi, source, sysfs) if driver == "scsi" else None
        try:
            found = await on_uevent(lambda: _find(driver, source, sysfs), timeout, begin=scan)
        except TimeoutError:
            raise RpcError(
                Code.NOT_FOUND, f"no {driver} device {source[:80]} appeared within {timeout:g} s"
            ) from None
    return found


async def wait_for_link(path: str, *, sysfs: str = SYSFS, timeout: float = HOTPLUG_DEADLINE) -> None:
    """Return when the network card at this PCI path has a link. Raises RpcError(NOT_FOUND)."""
    if _virtio(path, "net", sysfs) is None:
        try:
            await on_uevent(lambda: _virtio(path, "net", sysfs), timeout)
        except TimeoutError:
            raise RpcError(
                Code.NOT_FOUND, f"no network card {path[:80]} appeared within {timeout:g} s"
            ) from None


async def wait_for_address(mac: str, *, sysfs: str = SYSFS, timeout: float = HOTPLUG_DEADLINE) -> None:
    """Return when a network card has this MAC address, or after the deadline: a card that is part of the VM
    from its start has a driver some time after the agent runs (LATE_MODULES of guest/contents.py)."""
    folder, wanted = f"{sysfs}/class/net", mac.lower()

    def is_there() -> bool | None:
        for name in _listdir(folder):
            try:
                with open(f"{folder}/{name}/address", encoding="ascii") as file:
                    if file.read().strip() == wanted:
                        return True
            except OSError:  # it went meanwhile
                continue
        return None

    if not is_there():
        with contextlib.suppress(TimeoutError):  # whoever looks for it next says so
            await on_uevent(is_there, timeout)


async def wait_for_size(
    device: str, size: int, *, exactly: bool = True, sysfs: str = SYSFS, timeout: float = HOTPLUG_DEADLINE
) -> None:
    """Return when the disk `device` has `size` bytes, or more unless `exactly`: a disk grows when the VMM's
    interrupt has come, also one in a slot that was empty. Raises RpcError(DEADLINE_EXCEEDED)."""
    path = f"{sysfs}/class/block/{os.path.basename(device)}/size"

    def has_it() -> bool | None:
        with open(path, encoding="ascii") as file:
            sectors = int(file.read())
        return sectors == size // 512 or (sectors > size // 512 and not exactly) or None

    if not has_it():
        try:
            await on_uevent(has_it, timeout)
        except TimeoutError:
            raise RpcError(
                Code.DEADLINE_EXCEEDED, f"{device} did not come to have {size} bytes within {timeout:g} s"
            ) from None


async def on_uevent(
    look: Callable[[], T | None], timeout: float, begin: Callable[[], None] | None = None
) -> T:
    """What `look` finds, asked again at each event of the kernel. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT)
    try:
        events.bind((0, _KERNEL_GROUP))
        events.setblocking(False)
        if begin is not None:
            await loop.run_in_executor(None, begin)
        async with asyncio.timeout(timeout):
            # Listen first, look then: an event between the two is not missed.
            while (found := look()) is None:
                await loop.sock_recv(events, 8192)
            return found
    finally:
        events.close()


def _scan_scsi(source: str, sysfs: str) -> None:
    """A SCSI host does not look by itself (`agent.insmod`). Only at this address: to look at all of the 256
    targets takes seconds under emulation."""
    target, _, lun = source.partition(":")
    for host in _listdir(f"{sysfs}/class/scsi_host"):
        try:
            with open(f"{sysfs}/class/scsi_host/{host}/scan", "w", encoding="ascii") as file:
                file.write(f"0 {int(target)} {int(lun)}")
        except OSError:
            pass  # a host without scanning


async def resolve_devices(devices: Iterable[agent_pb2.Device], linux: dict[str, Any]) -> None:
    """Give the spec's device entries (and the cgroup rules about them) the guest's numbers."""
    changed: dict[tuple[str, int, int], tuple[int, int]] = {}
    entries = {entry["path"]: entry for entry in linux.get("devices", [])}
    for device in devices:
        node = await find_device(device.type, device.id or device.vm_path)
        info = os.stat(node)
        entry = entries.get(device.container_path)
        if entry is None:
            raise RpcError(Code.INVALID_ARGUMENT, f"the spec has no device {device.container_path[:200]!r}")
        kind = "b" if stat.S_ISBLK(info.st_mode) else "c"
        old = (kind, entry.get("major", -1), entry.get("minor", -1))
        entry.update(major=os.major(info.st_rdev), minor=os.minor(info.st_rdev))
        changed[old] = (entry["major"], entry["minor"])
    for rule in linux.get("resources", {}).get("devices", []):
        numbers = changed.get((rule.get("type", ""), rule.get("major", -1), rule.get("minor", -1)))
        if numbers is not None:
            rule["major"], rule["minor"] = numbers
