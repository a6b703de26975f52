"""What a device is to QEMU: the objects it stands on, and the device itself, as data.

What: `recipe` turns one `Placed` into a `Recipe`. `argv` is how it is given on the command line, and
`hypervisors.qemu.hotplug` sends the same by QMP.
Why one description: a disk that is plugged later must be the same as one that was there, and each object has
to go again, in reverse, under the name by which it came.
Invariants: nothing from outside becomes a part of an option's syntax: everything is JSON, but a chardev,
whose parts are ids and descriptors of ours. Descriptors are numbers here; QMP gives them names first.
Source: qapi/{block-core,char,net,qom,qdev}.json of QEMU 7.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from devices.config import (
    BalloonConfig,
    BlockConfig,
    BlockFormat,
    DeviceConfig,
    IoLimits,
    NetworkConfig,
    PortConfig,
    ProtectionConfig,
    RngConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VsockConfig,
)
from devices.errors import BugError, UnsupportedByHypervisor
from devices.kinds import Kind

__all__ = [
    "IO_THREAD",
    "SCSI",
    "BackEnd",
    "Placed",
    "Recipe",
    "argv",
    "limits_name",
    "node_name",
    "protection_object",
    "recipe",
    "reopened",
    "scsi_controller",
    "throttle",
]

SCSI = "scsi0"
"""Id of the VM's one SCSI controller."""
IO_THREAD = "disks"
"""Id of the thread that serves the disks which ask for one of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A device and what was prepared for it.

    `at`: the properties that say where it sits, bus and address; none for what sits nowhere. `fd`: the
    connected socket of its vhost-user daemon or console, or the vhost descriptor; `path`: of the socket that
    QEMU is to connect to itself; `cid`: kernel vsock only, else 0. `host_device`: a disk that is a block
    device of the host. `file`: the open disk, and `fdset`, not 0, the number under which QEMU gets it;
    without, QEMU opens the disk's path itself. `bytes`: of a disk that becomes memory. `msi`: whether it may
    signal by messages. `give_up`: ends the connection to what serves it, for which QEMU may wait with
    everything else standing still.
    """

    device: DeviceConfig
    at: Mapping[str, str | int] = field(default_factory=dict)
    fd: int = -1
    path: str = ""
    cid: int = 0
    host_device: bool = False
    file: int = -1
    fdset: int = 0
    bytes: int = 0
    msi: bool = True
    give_up: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class BackEnd:
    """One object that a device stands on. `option`: of the command line, without its dash. `fds`: descriptors
    that it takes over, by the property that gets their numbers or names, joined by colons. `reopens`: not 0
    where QEMU wants a path, by which it opens the one descriptor again; the number of its fdset, if it comes
    while QEMU runs."""

    option: str
    properties: Mapping[str, Any]
    fds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reopens: int = 0

    @property
    def name(self) -> str:
        """What it is removed by."""
        return str(self.properties[{"blockdev": "node-name", "add-fd": "set"}.get(self.option, "id")])

    def arguments(self, descriptors: Mapping[str, str]) -> dict[str, Any]:
        """Its properties, with these texts for its descriptors."""
        return {**self.properties, **descriptors}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`back_ends` in the order of their making; `front` is what device_add takes."""

    front: Mapping[str, Any]
    back_ends: tuple[BackEnd, ...] = ()


def recipe(placed: Placed, bus: str = "pci") -> Recipe:
    """For a device on this bus: "pci", or "device" on virtio-mmio.

    Raises UnsupportedByHypervisor for what lacks a part, BugError for what is no device on a bus.
    """
    device = placed.device
    match device:
        case BlockConfig():
            made = _block(device, placed, bus)
        case NetworkConfig():
            made = _network(device, bus)
        case VhostUserBlkConfig():
            driver = "vhost-user-blk-pci" if bus == "pci" else "vhost-user-blk"  # the others say "-device"
            # Who serves it decides nothing here: offered config-wce, the guest reads a cache mode that
            # qemu-storage-daemon leaves at 0, "write through", and its fsync never reaches the host's disk.
            front = {"driver": driver, "num-queues": device.queues, "config-wce": False}
            made = _on_socket(device.id, placed.fd, {**front, "queue-size": device.queue_size})
        case VhostUserNetConfig():
            made = _vhost_user_network(device, placed, bus)
        case ShareFsConfig():
            front = {"driver": f"vhost-user-fs-{bus}", "tag": device.tag, "queue-size": device.queue_size}
            made = _on_socket(device.id, placed.fd, front)
        case VsockConfig() if placed.cid:
            made = Recipe(
                {"driver": f"vhost-vsock-{bus}", "vhostfd": str(placed.fd), "guest-cid": placed.cid}
            )
        case VsockConfig():
            made = _on_socket(device.id, placed.fd, {"driver": f"vhost-user-vsock-{bus}"})
        case PortConfig():
            return _port(device, placed, bus)
        case RngConfig():
            source = {"qom-type": "rng-random", "id": f"src-{device.id}", "filename": device.source}
            made = Recipe({"driver": f"virtio-rng-{bus}", "rng": source["id"]}, (BackEnd("object", source),))
        case BalloonConfig():
            made = Recipe({"driver": f"virtio-balloon-{bus}", "free-page-reporting": True})
        case VfioConfig():
            made = _vfio(device)
        case _:
            raise BugError(f"{type(device).__name__} is no device on a bus")
    return Recipe({**made.front, "id": device.id, **placed.at}, made.back_ends)


def argv(made: Recipe) -> list[str]:
    """The recipe as options of the command line; QEMU has to inherit its descriptors."""
    words = []
    for back_end in made.back_ends:
        numbers = {key: ":".join(map(str, fds)) for key, fds in back_end.fds.items()}
        if back_end.reopens:
            numbers = {key: reopened(fd) for key, (fd,) in back_end.fds.items()}
        if back_end.option in ("chardev", "add-fd"):  # those that take no JSON
            parts = back_end.arguments(numbers)
            kind = ["socket"] if back_end.option == "chardev" else []
            text = ",".join(
                [*kind, *(f"{key}={str(part).replace(',', ',,')}" for key, part in parts.items())]
            )
        else:
            text = json.dumps(back_end.arguments(numbers))
        words += [f"-{back_end.option}", text]
    return [*words, "-device", json.dumps(made.front)]


def reopened(fd: int) -> str:
    """The path by which QEMU opens its descriptor `fd` again, with a right of its own to read the file."""
    return f"/proc/self/fd/{fd}"


def _given(placed: Placed) -> tuple[BackEnd, ...]:
    """The disk's descriptor, as what is there before the disk."""
    if not placed.fdset:
        return ()
    return (BackEnd("add-fd", {"set": placed.fdset}, {"fd": (placed.file,)}),)


def node_name(device_id: str) -> str:
    """What the disk's device reads: the node on top."""
    return f"node-{device_id}"


def limits_name(device_id: str) -> str:
    """The object with the disk's limits, if it has some."""
    return f"limits-{device_id}"


def throttle(limits: IoLimits) -> dict[str, int]:
    """QEMU's ThrottleLimits. A burst below its rate would be refused, and means nothing."""
    words = {
        "bps-total": limits.bytes,
        "bps-total-max": limits.bytes_burst if limits.bytes_burst > limits.bytes else 0,
        "bps-read": limits.read_bytes,
        "bps-write": limits.write_bytes,
        "iops-total": limits.ops,
        "iops-total-max": limits.ops_burst if limits.ops_burst > limits.ops else 0,
        "iops-read": limits.read_ops,
        "iops-write": limits.write_ops,
    }
    # A rate that is a share of the total is refused beside it; a burst needs its rate.
    for kind in ("bps", "iops"):
        if words[f"{kind}-read"] or words[f"{kind}-write"]:
            words[f"{kind}-total"] = 0
        if not words[f"{kind}-total"]:
            words[f"{kind}-total-max"] = 0
    return words


def scsi_controller(at: Mapping[str, str | int], *, io_thread: bool) -> dict[str, Any]:
    """What device_add takes for it."""
    made: dict[str, Any] = {"driver": "virtio-scsi-pci", "id": SCSI, **at}
    return made | ({"iothread": IO_THREAD} if io_thread else {})


def _block(device: BlockConfig, placed: Placed, bus: str) -> Recipe:
    match device.driver:
        case Kind.PMEM:
            return _pmem(device, placed)
        case Kind.SCSI:
            return _scsi(device, placed)
    options = device.options
    front: dict[str, Any] = {"driver": f"virtio-blk-{bus}", "drive": node_name(device.id)}
    if device.serial:
        front["serial"] = device.serial
    if options.queues:
        front["num-queues"] = options.queues
    if options.queue_size:
        front["queue-size"] = options.queue_size
    if options.io_thread:
        front["iothread"] = IO_THREAD
    return Recipe(front | _common(device), _nodes(device, placed))


def _scsi(device: BlockConfig, placed: Placed) -> Recipe:
    """Behind the one controller, whose threads and queues are its own."""
    front: dict[str, Any] = {"driver": "scsi-hd", "drive": node_name(device.id)}
    if device.serial:
        front["serial"] = device.serial
    return Recipe(front | _common(device), _nodes(device, placed))


def _pmem(device: BlockConfig, placed: Placed) -> Recipe:
    """The file itself is the guest's memory: QEMU sees no reads of it, and no writes could be refused one by
    one; so it is never writable."""
    backend = {
        "qom-type": "memory-backend-file",
        "id": f"mem-{device.id}",
        "mem-path": device.path,
        "size": placed.bytes,
        "share": True,
        "readonly": True,
    }
    front = {"driver": "nvdimm", "memdev": backend["id"], "unarmed": True}
    fds = {"mem-path": (placed.file,)} if placed.fdset else {}
    return Recipe(front, (BackEnd("object", backend, fds, reopens=placed.fdset),))


def _common(device: BlockConfig) -> dict[str, int | str]:
    """What both kinds of disks have. A write that fails is the guest's to handle: by default QEMU stops the
    VM when the host's file system is full."""
    options = device.options
    sizes = {"logical_block_size": options.logical_sector, "physical_block_size": options.physical_sector}
    words: dict[str, int | str] = {name: size for name, size in sizes.items() if size}
    return words if device.read_only else {"werror": "report", **words}


def _nodes(device: BlockConfig, placed: Placed) -> tuple[BackEnd, ...]:
    """File or device, format, and above them the limits."""
    options = device.options
    file: dict[str, Any] = {
        "driver": "host_device" if placed.host_device else "file",
        "filename": f"/dev/fdset/{placed.fdset}" if placed.fdset else device.path,
        "read-only": device.read_only,
    }
    node: dict[str, Any] = {
        "driver": device.format.value,
        "node-name": node_name(device.id),
        "read-only": device.read_only,
        "file": file,
    }
    if options.aio:
        file["aio"] = options.aio
    if options.discard and not device.read_only:
        file["discard"] = node["discard"] = "unmap"
    if options.direct or options.no_flush:
        file["cache"] = node["cache"] = {"direct": options.direct, "no-flush": options.no_flush}
    if device.format is BlockFormat.QCOW2:
        node["backing"] = None
    given = _given(placed)
    if not options.limits:
        return (*given, BackEnd("blockdev", node))
    group = {
        "qom-type": "throttle-group",
        "id": limits_name(device.id),
        "limits": throttle(options.limits),
    }
    node["node-name"] = f"image-{device.id}"
    above = {
        "driver": "throttle",
        "node-name": node_name(device.id),
        "throttle-group": group["id"],
        "file": node["node-name"],
        "read-only": device.read_only,
    }
    if options.discard and not device.read_only:
        above["discard"] = "unmap"
    return (*given, BackEnd("object", group), BackEnd("blockdev", node), BackEnd("blockdev", above))


def _network(device: NetworkConfig, bus: str) -> Recipe:
    queues = len(device.tap_fds)
    if queues == 0:
        raise UnsupportedByHypervisor("qemu", "a network card without a tap")
    netdev: dict[str, Any] = {"type": "tap", "id": f"net-{device.id}"}
    fds = {"fds": device.tap_fds}
    if device.vhost_fds:
        netdev["vhost"] = True
        fds["vhostfds"] = device.vhost_fds
    return Recipe(_card(device.mac, queues, netdev["id"], bus), (BackEnd("netdev", netdev, fds),))


def _vhost_user_network(device: VhostUserNetConfig, placed: Placed, bus: str) -> Recipe:
    """On a socket that QEMU connects to itself: its network takes no other (devices/vhost_relay.py)."""
    chardev = BackEnd("chardev", {"id": f"char-{device.id}", "path": placed.path})
    netdev: dict[str, Any] = {"type": "vhost-user", "id": f"net-{device.id}", "chardev": chardev.name}
    front = _card(device.mac, device.queues, netdev["id"], bus)
    front |= {"rx_queue_size": device.queue_size, "tx_queue_size": device.queue_size}
    if not placed.msi and bus == "pci":
        front["vectors"] = 0
    return Recipe(front, (chardev, BackEnd("netdev", {**netdev, "queues": device.queues})))


def _card(mac: str, queues: int, netdev: str, bus: str) -> dict[str, Any]:
    front: dict[str, Any] = {"driver": f"virtio-net-{bus}", "netdev": netdev, "mac": mac}
    if queues > 1:
        front |= {"mq": True, **({} if bus == "device" else {"vectors": 2 * queues + 2})}
    return front


def _vfio(device: VfioConfig) -> Recipe:
    front: dict[str, Any] = {"driver": "vfio-pci", "host": device.address}
    if not device.iommufd:
        return Recipe(front)
    context = {"qom-type": "iommufd", "id": f"iommufd-{device.id}"}
    return Recipe({**front, "iommufd": context["id"]}, (BackEnd("object", context),))


def protection_object(device: ProtectionConfig) -> dict[str, Any]:
    """The object that the machine names as its confidential-guest-support."""
    if device.technology == "se":
        return {"qom-type": "s390-pv-guest", "id": device.id}
    if device.technology == "tdx":
        quotes: dict[str, Any] = {"type": "unix", "path": device.quote_socket}
        if not device.quote_socket:
            quotes = {"type": "vsock", "cid": "2", "port": str(device.quote_port)}
        return {
            "qom-type": "tdx-guest",
            "id": device.id,
            "sept-ve-disable": True,
            "quote-generation-socket": quotes,
        }
    made = {
        "qom-type": "sev-snp-guest" if device.technology == "snp" else "sev-guest",
        "id": device.id,
        "cbitpos": device.c_bit,
        "reduced-phys-bits": device.reduced_bits,
        "kernel-hashes": True,
    }
    return made | ({"policy": device.policy} if device.policy else {})


def _port(device: PortConfig, placed: Placed, bus: str) -> Recipe:
    """The controller has the place, and this one port."""
    controller = {"driver": f"virtio-serial-{bus}", "id": f"ports-{device.id}", "max_ports": 2, **placed.at}
    chardev = BackEnd("chardev", {"id": f"char-{device.id}"}, {"fd": (placed.fd,)})
    front = {"driver": "virtserialport", "bus": f"{controller['id']}.0", "nr": 1, "name": device.name}
    return Recipe(
        {**front, "chardev": chardev.name, "id": device.id}, (chardev, BackEnd("device", controller))
    )


def _on_socket(device_id: str, fd: int, front: Mapping[str, Any]) -> Recipe:
    """A vhost-user device, on the connected socket of its daemon."""
    chardev = BackEnd("chardev", {"id": f"char-{device_id}"}, {"fd": (fd,)})
    return Recipe({**front, "chardev": chardev.name}, (chardev,))
