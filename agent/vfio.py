"""PCI devices of the host that the VM was given: from their guest PCI paths to what a container uses.

What: `forget` takes the host's nodes out of a container's spec. `attach` serves two types of devices:
"vfio-pci-gk" (guest-kernel: the guest's own driver has it; the container gets the nodes that the driver
makes, a disk for example) and "vfio-pci" (it is bound to vfio-pci here; the container gets its group's node).
`rename` turns the host's PCI addresses in PCIDEVICE_* variables into the guest's.
Why nodes in guest-kernel mode: whoever was given a whole device may use all that the kernel makes of it, and
without a node and a rule the container could see it in /sys only. (Kata's agent leaves that to the image.)
Invariants: the host's text selects among what sysfs lists; each wait is for the kernel's events and ends at
`HOTPLUG_DEADLINE`; a device that is said to be there and is not, or that has no driver, is an error.
Source: kata.md 3.4 and 4.2; Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from agent import log
from agent.modules import modprobe
from agent.reaper import Reaper
from agent.storage.blockdev import HOTPLUG_DEADLINE, SYSFS, on_uevent, pci_directory
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from proto import agent_pb2

__all__ = ["KINDS", "attach", "forget", "rename"]

KINDS = ("vfio-pci", "vfio-pci-gk")
_VFIO_PCI = "vfio-pci"
_CONTROL = "vfio/vfio"
_MAX_FUNCTIONS = 64
_BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_IN_TEXT = re.compile(
    r"(?<![0-9a-fA-F:])[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7](?![0-9a-fA-F])"
)
_NVME_PATH = re.compile(r"nvme(\d+)c\d+n(\d+)")  # of a disk that may have several controllers
# What a driver of such a class makes; other devices are ready as soon as they are there.
_EXPECTED = {0x01: "block", 0x02: "net"}


async def attach(
    devices: Iterable[agent_pb2.Device],
    config: MutableMapping[str, Any],
    reaper: Reaper,
    *,
    sysfs: str = SYSFS,
    dev: str = "/dev",
    timeout: float = HOTPLUG_DEADLINE,
) -> dict[str, str]:
    """Give the devices to the container with this config.json; its PCI addresses, host's -> guest's.

    Raises RpcError: INVALID_ARGUMENT for what makes no sense, NOT_FOUND for what does not appear,
    FAILED_PRECONDITION for what this guest lacks.
    """
    addresses: dict[str, str] = {}
    for device in devices:
        nodes: list[str] = []
        for host, path in _functions(device):
            if not path:  # Kata's way to say that the guest is to do nothing
                continue
            directory = await _appeared(path, sysfs, timeout)
            addresses[host] = os.path.basename(directory)
            if device.type == _VFIO_PCI:
                nodes.append(await _for_vfio(directory, reaper, sysfs))
            else:
                nodes += await _by_driver(directory, reaper, dev, timeout)
        if device.type == _VFIO_PCI and nodes:
            nodes.append(_CONTROL)
        await asyncio.to_thread(_add_nodes, dict.fromkeys(nodes), config, dev)
    config["process"]["env"] = rename(config["process"].get("env", []), addresses)
    return addresses


def rename(env: Iterable[str], addresses: Mapping[str, str]) -> list[str]:
    """The environment, and in its PCIDEVICE_* variables the guest's PCI addresses instead of the host's."""

    def guests(found: re.Match[str]) -> str:
        return addresses.get(found[0].lower(), found[0])

    return [_IN_TEXT.sub(guests, word) if word.startswith("PCIDEVICE_") else word for word in env]


def _functions(device: agent_pb2.Device) -> list[tuple[str, str]]:
    """Its options: "<host address>=<guest PCI path>" for each function."""
    if not 0 < len(device.options) <= _MAX_FUNCTIONS:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"device {device.id[:40]!r} has {len(device.options)} functions"
        )
    pairs = []
    for option in device.options:
        host, equals, path = option.partition("=")
        if not equals or not _BDF.fullmatch(host):
            raise RpcError(Code.INVALID_ARGUMENT, f"{option[:80]!r} is no <PCI address>=<PCI path>")
        pairs.append((host, path))
    return pairs


async def _appeared(path: str, sysfs: str, timeout: float) -> str:
    directory = pci_directory(path, sysfs)
    if directory is None:
        try:
            directory = await on_uevent(lambda: pci_directory(path, sysfs), timeout)
        except TimeoutError:
            raise RpcError(
                Code.NOT_FOUND, f"no PCI device {path[:80]} appeared within {timeout:g} s"
            ) from None
    return directory


# --- guest-kernel mode


async def _by_driver(directory: str, reaper: Reaper, dev: str, timeout: float) -> list[str]:
    """The nodes below /dev that the guest's driver has made, once it has made what its class is for."""
    alias = _text(f"{directory}/modalias")
    if alias and not _driver(directory):
        await modprobe(reaper, alias)  # that nothing has this alias shows below
    expected = _EXPECTED.get(int(_text(f"{directory}/class") or "0", 16) >> 16)
    if expected is not None and not _made(directory, expected, dev):
        try:
            await on_uevent(lambda: _made(directory, expected, dev) or None, timeout)
        except TimeoutError:
            driver = _driver(directory)
            ids = f"{_text(f'{directory}/vendor')} {_text(f'{directory}/device')}"
            what = f"{os.path.basename(directory)} ({ids})"
            if not driver:
                raise RpcError(
                    Code.FAILED_PRECONDITION, f"the guest has no driver for the PCI device {what}"
                ) from None
            log.error(f"{driver} has made no {expected} device of {what} within {timeout:g} s")
    return _nodes(directory)


def _made(directory: str, expected: str, dev: str) -> bool:
    """Whether there is something of this class below the device, and every node of it."""
    folders = (folder for folder, _, _ in os.walk(directory))
    if not any(os.path.basename(_link(f"{folder}/subsystem")) == expected for folder in folders):
        return False
    return all(os.path.exists(f"{dev}/{name}") for name in _nodes(directory))


def _nodes(directory: str) -> list[str]:
    """The names below /dev of all that is below the device, in a fixed order."""
    found = []
    for folder, folders, files in os.walk(directory):
        folders.sort()
        if "dev" in files and folder != directory:
            lines = _text(f"{folder}/uevent").splitlines()
            names = [line[8:] for line in lines if line.startswith("DEVNAME=")]
            found += [name for name in names if ".." not in name.split("/")]
        elif path := _NVME_PATH.fullmatch(os.path.basename(folder)):
            found.append(f"nvme{path[1]}n{path[2]}")  # the disk itself is no child of any of its controllers
    return found


# --- vfio mode


async def _for_vfio(directory: str, reaper: Reaper, sysfs: str) -> str:
    """Bind it to vfio-pci in this guest; its node below /dev."""
    address = os.path.basename(directory)
    group = os.path.basename(_link(f"{directory}/iommu_group"))
    if not group:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f'vfio_mode = "vfio" needs an IOMMU in the guest, and {address} has none: enable_iommu = true',
        )
    if _driver(directory) != _VFIO_PCI:
        await modprobe(reaper, _VFIO_PCI)
        try:
            await asyncio.to_thread(_bind, directory, address, sysfs)
        except OSError as error:
            raise RpcError(
                Code.INTERNAL, f"cannot bind {address} to vfio-pci: {error.filename}: {error.strerror}"
            ) from None
        if _driver(directory) != _VFIO_PCI:
            raise RpcError(Code.FAILED_PRECONDITION, f"vfio-pci of this guest does not take {address}")
    return f"vfio/{group}"


def _bind(directory: str, address: str, sysfs: str) -> None:
    _write(f"{directory}/driver_override", _VFIO_PCI)
    if os.path.exists(f"{directory}/driver"):
        _write(f"{directory}/driver/unbind", address)
    _write(f"{sysfs}/bus/pci/drivers_probe", address)


# --- the container's spec


def forget(devices: Iterable[agent_pb2.Device], linux: MutableMapping[str, Any]) -> None:
    """Take the host's nodes of these devices out, and the rules for their numbers, which mean others here."""
    paths = {device.container_path for device in devices if device.type in KINDS}
    for entry in [entry for entry in linux.get("devices", []) if entry["path"] in paths]:
        linux["devices"].remove(entry)
        old = (entry["type"], entry.get("major"), entry.get("minor"))
        rules = linux.get("resources", {}).get("devices", [])
        rules[:] = [r for r in rules if (r.get("type"), r.get("major"), r.get("minor")) != old]


def _add_nodes(names: Iterable[str], config: MutableMapping[str, Any], dev: str) -> None:
    """The nodes, for the container's user, and a rule for each. Raises RpcError for one that is none."""
    linux, user = config["linux"], config["process"].get("user", {})
    have = {entry["path"] for entry in linux.setdefault("devices", [])}
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    for name in names:
        path = f"/dev/{name}"
        try:
            info = os.stat(f"{dev}/{name}")
        except OSError as error:
            raise RpcError(Code.NOT_FOUND, f"the guest's {path} is gone: {error.strerror}") from None
        kind = "b" if stat.S_ISBLK(info.st_mode) else "c"
        numbers = {"major": os.major(info.st_rdev), "minor": os.minor(info.st_rdev)}
        if path not in have:
            owner = {"fileMode": 0o660, "uid": user.get("uid", 0), "gid": user.get("gid", 0)}
            linux["devices"].append({"path": path, "type": kind, **numbers, **owner})
        rules.append({"allow": True, "type": kind, **numbers, "access": "rwm"})


# --- small things


def _driver(directory: str) -> str:
    return os.path.basename(_link(f"{directory}/driver"))


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
