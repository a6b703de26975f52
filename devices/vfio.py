"""VFIO: from a node below /dev/vfio, or a PCI address, to the devices that it stands for.

What: `find_group` reads in sysfs what is behind /dev/vfio/<group>, /dev/vfio/devices/vfio<N> (iommufd's
node of one device) or a PCI address: an `IommuGroup`, whole, with each function's identity and driver.
Why whole groups: the IOMMU cannot keep the functions of one group apart, so the kernel gives a guest all of
them or none; a function that the host still drives could be attacked by the guest's.
Invariants: nothing is opened but sysfs files, nothing changed; what the node's name says is checked against
a pattern before it becomes part of a path; what cannot be passed on is refused by name, with what to do.
Source: Documentation/driver-api/vfio.rst, vfio-mediated-device.rst, ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from devices.errors import CallerError, HostError

__all__ = [
    "CONTROL_NODES",
    "IommuGroup",
    "PciFunction",
    "device_node",
    "find_group",
    "is_cdev",
    "is_vfio_node",
    "node_name",
    "read_function",
]

CONTROL_NODES = ("/dev/vfio/vfio", "/dev/iommu")
"""What every user of VFIO opens besides its device: no device by themselves."""

_GROUP = re.compile(r"/dev/vfio/(noiommu-)?([0-9]{1,9})")
_CDEV = re.compile(r"/dev/vfio/devices/(vfio[0-9]{1,9})")
_BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_VFIO_DRIVER = re.compile(r"(.*[_-])?vfio[_-]pci")  # vfio-pci, mlx5_vfio_pci, nvgrace-gpu-vfio-pci, ...
_BRIDGE = 0x06
_PCI_TO_PCI = (0x0604, 0x0609)
_MAX_GROUP = 256  # a bus has no more functions; a group that has is no group
_CONVENTIONAL = 256  # bytes of configuration space
_PHASE = "devices"


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function of the host. `class_code` has three bytes (0x010802 is NVMe), `driver` is "" for none.

    `express`: has PCI Express's configuration space.
    """

    address: str  # "0000:01:00.0"
    vendor: int
    device: int
    class_code: int
    driver: str = ""
    express: bool = True

    @property
    def is_bridge(self) -> bool:
        """Of the host's own tree: goes to no guest."""
        return self.class_code >> 16 == _BRIDGE

    @property
    def has_own_buses(self) -> bool:
        """A PCI-to-PCI bridge: the kernel allows it any driver, in whatever group it is."""
        return self.class_code >> 8 in _PCI_TO_PCI

    @property
    def for_vfio(self) -> bool:
        """Bound to vfio-pci, or to a vendor's variant of it."""
        return bool(_VFIO_DRIVER.fullmatch(self.driver))

    def __str__(self) -> str:
        what = f"{self.vendor:04x}:{self.device:04x}, class {self.class_code >> 8:04x}"
        return f"{self.address} ({what}{f', driver {self.driver}' if self.driver else ''})"


@dataclass(frozen=True, slots=True)
class IommuGroup:
    """`number`: as in /dev/vfio/<number>. `functions`: what goes to the guest, by address; `bridges`: what
    stays."""

    number: int
    functions: tuple[PciFunction, ...]
    bridges: tuple[PciFunction, ...] = ()

    @property
    def unbound(self) -> tuple[PciFunction, ...]:
        """Functions that are not with vfio-pci, bridges that the kernel counts as functions among them."""
        rest = tuple(one for one in self.bridges if one.driver and not one.has_own_buses)
        return tuple(one for one in (*self.functions, *rest) if not one.for_vfio)

    def check_bound(self) -> None:
        """Raise HostError unless every function is with vfio-pci, naming the first and what to do."""
        if not self.unbound:
            return
        one = self.unbound[0]
        driver = f"is bound to the host's driver {one.driver}" if one.driver else "is bound to no driver"
        count = len(self.functions)
        many = f" (one of {count} functions of IOMMU group {self.number})" if count > 1 else ""
        where = f"/sys/bus/pci/devices/{one.address}"
        commands = [f"echo vfio-pci > {where}/driver_override"]
        if one.driver:
            commands.append(f"echo {one.address} > {where}/driver/unbind")
        commands.append(f"echo {one.address} > /sys/bus/pci/drivers_probe")
        raise HostError(
            f"the PCI device {one.address} {driver}, not to vfio-pci{many}",
            phase=_PHASE,
            hint=f"modprobe vfio-pci; {'; '.join(commands)}; or let the shim do it: vfio_bind = true",
        )


def is_vfio_node(path: str) -> bool:
    """Whether this names a device of VFIO, by its group or by itself; the control nodes do not."""
    return bool(_GROUP.fullmatch(path) or _CDEV.fullmatch(path))


def is_cdev(path: str) -> bool:
    """Whether this is iommufd's node of one function."""
    return bool(_CDEV.fullmatch(path))


def node_name(major: int, minor: int, sysfs: str = "/sys") -> str:
    """The host's name of the character device with this number, "/dev/vfio/7"; "" if there is none."""
    lines = _text(f"{sysfs}/dev/char/{major}:{minor}/uevent").splitlines()
    return next((f"/dev/{line[8:]}" for line in lines if line.startswith("DEVNAME=")), "")


def device_node(address: str, *, iommufd: bool, sysfs: str = "/sys") -> str:
    """What a VMM opens for a function: its group's node, or by iommufd its own. Raises HostError."""
    device = f"{sysfs}/bus/pci/devices/{address}"
    if not iommufd:
        return f"/dev/vfio/{_read_group_number(device, address)}"
    try:
        name = next(
            one for one in os.listdir(f"{device}/vfio-dev") if _CDEV.fullmatch(f"/dev/vfio/devices/{one}")
        )
    except (OSError, StopIteration):
        raise HostError(f"{address} has no node below /dev/vfio/devices", phase=_PHASE) from None
    return f"/dev/vfio/devices/{name}"


def find_group(node: str, sysfs: str = "/sys") -> IommuGroup:
    """The group behind a node below /dev/vfio or a PCI address ("0000:01:00.0"). Blocks.

    Raises CallerError for a text that is neither and for kinds of devices that cannot be passed on, HostError
    for what does not exist.
    """
    if found := _GROUP.fullmatch(node):
        if found[1]:
            raise HostError(
                f"{node} is a device without an IOMMU (noiommu mode), which no VM can have",
                phase=_PHASE,
                hint="switch the IOMMU on (firmware, and intel_iommu=on for Intel)",
            )
        return _read_group(int(found[2]), sysfs)
    if found := _CDEV.fullmatch(node):
        return _group_of(f"{sysfs}/class/vfio-dev/{found[1]}/device", node, sysfs)
    if _BDF.fullmatch(node):
        return _group_of(f"{sysfs}/bus/pci/devices/{node}", node, sysfs)
    raise CallerError(
        f"{node[:200]!r} is no VFIO device: neither /dev/vfio/<group>, /dev/vfio/devices/vfio<N> nor a PCI"
        " address",
        phase=_PHASE,
        code="INVALID_ARGUMENT",
    )


def read_function(address: str, sysfs: str = "/sys") -> PciFunction:
    """One function by its address. Raises HostError if it is not there."""
    directory = f"{sysfs}/bus/pci/devices/{address}"
    if not _BDF.fullmatch(address) or not os.path.isdir(directory):
        raise HostError(f"this host has no PCI device {address[:40]!r}", phase=_PHASE)
    return _function(directory, address)


def _read_group(number: int, sysfs: str) -> IommuGroup:
    directory = f"{sysfs}/kernel/iommu_groups/{number}/devices"
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise HostError(
            f"this host has no IOMMU group {number}: {error.strerror}",
            phase=_PHASE,
            hint="switch the IOMMU on (firmware, and intel_iommu=on for Intel); see /sys/kernel/iommu_groups",
        ) from error
    if not 0 < len(names) <= _MAX_GROUP:
        raise HostError(f"IOMMU group {number} has {len(names)} devices", phase=_PHASE)
    functions: list[PciFunction] = []
    bridges: list[PciFunction] = []
    for name in names:
        device = f"{directory}/{name}"
        _check_kind(device, name)
        function = _function(device, name)
        (bridges if function.is_bridge else functions).append(function)
    if not functions:
        raise HostError(
            f"IOMMU group {number} has nothing but bridges: {bridges[0].address}; they stay with the host",
            phase=_PHASE,
        )
    return IommuGroup(number, tuple(functions), tuple(bridges))


def _group_of(device: str, node: str, sysfs: str) -> IommuGroup:
    if not os.path.isdir(device):
        raise HostError(f"{node} does not exist on this host", phase=_PHASE)
    return _read_group(_read_group_number(device, node), sysfs)


def _read_group_number(device: str, node: str) -> int:
    number = os.path.basename(_link(f"{device}/iommu_group"))
    if not number.isdigit():
        raise HostError(
            f"{node} is in no IOMMU group, so the host cannot keep it from other memory than its guest's",
            phase=_PHASE,
            hint="switch the IOMMU on (firmware, and intel_iommu=on for Intel)",
        )
    return int(number)


def _check_kind(device: str, name: str) -> None:
    """Raise CallerError for what is no PCI function, in words that name it."""
    bus = os.path.basename(_link(f"{device}/subsystem"))
    if bus == "pci":
        return
    if bus == "mdev":
        kind = os.path.basename(_link(f"{device}/mdev_type")) or "unknown"
        parent = os.path.basename(os.path.dirname(os.path.realpath(device)))
        if kind.startswith("vfio_ap"):
            what = f"AP matrix device {name} (cryptographic adapters of s390x: {_ap_queues(device)})"
        else:
            what = f"mediated device {name} (type {kind} of {parent})"
    elif bus == "ap":
        what = f"AP queue {name} (s390x)"
    else:
        what = f"device {name} of the bus {bus or 'unknown'}"
    raise CallerError(
        f"the {what} cannot be given to a guest: only PCI functions can",
        phase=_PHASE,
        hint="leave it out of the container's devices",
        code="UNIMPLEMENTED",
    )


def _ap_queues(device: str) -> str:
    """The matrix, "05.0004 05.0047": card and domain of each queue."""
    queues = _text(f"{device}/matrix").split()
    return " ".join(queues[:16]) or "no queue assigned"


def _function(directory: str, address: str) -> PciFunction:
    if not _BDF.fullmatch(address):
        raise HostError(f"{address[:40]!r} is no PCI address", phase=_PHASE)
    try:
        vendor, device, code = (int(_text(f"{directory}/{key}"), 16) for key in ("vendor", "device", "class"))
        size = os.stat(f"{directory}/config").st_size
    except (OSError, ValueError) as error:
        raise HostError(f"sysfs does not tell what {address} is: {error}", phase=_PHASE) from error
    driver = os.path.basename(_link(f"{directory}/driver"))
    return PciFunction(address, vendor, device, code, driver, size > _CONVENTIONAL)


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
