"""What can be plugged into a VM, as data: one frozen class per kind of device.

What: the argument of `Hypervisor.add_device` and of `DeviceManager.try_add_device`.
Why: a VMM driver turns these into its own words (QEMU arguments, an HTTP body); the sandbox that
asks for a device knows none of those words.
Invariants: no field names a VMM; paths are host paths; sizes name their unit. `id` is unique in a
sandbox and safe in every VMM's syntax (`[A-Za-z][A-Za-z0-9_-]*`, at most 31 characters).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from devices.errors import BugError
from devices.kinds import Kind

__all__ = [
    "BalloonConfig",
    "BlockConfig",
    "BlockFormat",
    "BlockOptions",
    "CacheMode",
    "ConsoleConfig",
    "DeviceConfig",
    "IoLimits",
    "NetworkConfig",
    "PortConfig",
    "ProtectionConfig",
    "RngConfig",
    "ShareFsConfig",
    "VfioConfig",
    "VhostUserBlkConfig",
    "VhostUserNetConfig",
    "VsockConfig",
]

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")
_PORT = re.compile(r"root-port|switch-port|bridge-port")
_TECHNOLOGY = re.compile(r"sev|snp|tdx|se")
_SERIAL = re.compile(r"[A-Za-z0-9_-]{0,20}")
_PORT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,36}")
_TAG = re.compile(r"[A-Za-z0-9_-]{1,36}")
_AIO = ("", "threads", "native", "io_uring")
_DISKS = (Kind.BLK, Kind.SCSI, Kind.PMEM)
_TAP = re.compile(r"[A-Za-z0-9_.-]{0,15}")
_BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")


class CacheMode(Enum):
    """How much of the shared directory the guest may cache: virtiofsd's `cache=`, in Kata's words."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


class BlockFormat(Enum):
    """Formats of a disk image. Never probed: a guest that writes a header must not choose it."""

    RAW = "raw"
    QCOW2 = "qcow2"  # without a backing file: a header must not make the VMM open further files


def _check(pattern: re.Pattern[str], value: str, what: str) -> None:
    """These values end up in VMM syntax: refuse whatever could mean something there."""
    if not pattern.fullmatch(value):
        raise BugError(f"{value!r} is no {what}")


def _check_queues(queues: int, size: int, least: int) -> None:
    """What virtio and every VMM take: more would be refused with fewer words."""
    if not 1 <= queues <= 256 or not least <= size <= 1024 or size & (size - 1):
        raise BugError(f"{queues} queues of {size} entries: 1 to 256, a power of two from {least} to 1024")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Device:
    id: str

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")


@dataclass(frozen=True, slots=True, kw_only=True)
class IoLimits:
    """The most that a guest may do with a disk, per second; 0 is no limit. A burst is what may come at once
    after a rest."""

    bytes: int = 0  # read and written together
    bytes_burst: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    ops: int = 0
    ops_burst: int = 0
    read_ops: int = 0
    write_ops: int = 0

    def __bool__(self) -> bool:
        return any((self.bytes, self.read_bytes, self.write_bytes, self.ops, self.read_ops, self.write_ops))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """How a disk is served; what is left at its default is the VMM's choice."""

    direct: bool = False  # past the host's page cache
    no_flush: bool = False  # the guest's flushes are dropped: only for disks that nobody needs after a crash
    aio: str = ""  # "threads", "native" (needs `direct`), "io_uring"
    discard: bool = True  # what the guest gives up is freed on the host
    queues: int = 0
    queue_size: int = 0  # a power of two, 2..1024
    logical_sector: int = 0  # bytes, a power of two, 512..65536
    physical_sector: int = 0
    io_thread: bool = False  # a thread of the VMM's of its own
    limits: IoLimits = IoLimits()

    def __post_init__(self) -> None:
        if self.aio not in _AIO:
            raise BugError(f"{self.aio!r} is no way of I/O")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig(_Device):
    """A disk from an image file or a block device of the host.

    `driver`: how the guest sees it: Kind.BLK, SCSI, or PMEM, which is read-only memory. `size`: bytes that a
    plugged disk shall have, for `Hypervisor.update_device`; 0 is what its file or device has. `ours`: a file
    that nobody but this project uses, such as the guest's image: it is not looked for in the host's mounts.
    """

    path: str
    read_only: bool = False
    format: BlockFormat = BlockFormat.RAW
    serial: str = ""  # at most 20 bytes; what /sys/block/*/serial shows in the guest
    driver: Kind = Kind.BLK
    options: BlockOptions = BlockOptions()
    size: int = 0
    ours: bool = False

    @property
    def kind(self) -> Kind:
        """What it is to the VMM."""
        return self.driver

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_SERIAL, self.serial, "disk serial")
        if self.driver not in _DISKS:
            raise BugError(f"{self.driver.value} is no kind of disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareFsConfig(_Device):
    """A host directory shared by virtio-fs; mounts made below it later appear in the guest.

    `mknod`: the guest may make device nodes there, which are the host's nodes then.
    """

    kind: ClassVar[Kind] = Kind.SHARE_FS
    id: str = "share-fs"
    source: str  # an existing directory
    tag: str = "kataShared"  # what the guest mounts; at most 36 bytes
    daemon: str = ""  # path of virtiofsd; "" looks in the distributions' places
    cache: CacheMode = CacheMode.AUTO
    queue_size: int = 1024  # a power of two, at most 1024
    xattr: bool = True
    mknod: bool = False
    extra_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_TAG, self.tag, "virtio-fs tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockConfig(_Device):
    """The agent's channel. `home_call`: the guest says when its agent listens (Kata's agent does not)."""

    kind: ClassVar[Kind] = Kind.VSOCK
    id: str = "vsock"
    home_call: bool = True
    daemon: str = ""  # path of vhost-device-vsock, used where there is no /dev/vhost-vsock; "" looks on PATH


@dataclass(frozen=True, slots=True, kw_only=True)
class PortConfig(_Device):
    """The agent's channel where there is no vsock: one stream of bytes, by virtio-serial. `name`: what the
    guest finds it by."""

    kind: ClassVar[Kind] = Kind.PORT
    id: str = "port"
    name: str = "kata.agent"

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_PORT_NAME, self.name, "name of a port")


@dataclass(frozen=True, slots=True, kw_only=True)
class RngConfig(_Device):
    """Entropy from a host device."""

    kind: ClassVar[Kind] = Kind.RNG
    id: str = "rng"
    source: str = "/dev/urandom"


@dataclass(frozen=True, slots=True, kw_only=True)
class BalloonConfig(_Device):
    """A memory balloon that reports free pages back to the host."""

    kind: ClassVar[Kind] = Kind.BALLOON
    id: str = "balloon"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleConfig(_Device):
    """The guest's first serial port; its last 64 KiB are kept for error messages."""

    kind: ClassVar[Kind] = Kind.CONSOLE
    id: str = "console"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig(_Device):
    """A virtio network card; the caller made the tap in the pod's netns.

    A VMM takes it as descriptors (one for each queue) or by its name, as its kind has it.
    """

    kind: ClassVar[Kind] = Kind.NET
    mac: str
    tap: str = ""
    tap_fds: tuple[int, ...] = field(default=())
    vhost_fds: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_MAC, self.mac, "MAC address")
        _check(_TAP, self.tap, "name of a tap device")


@dataclass(frozen=True, slots=True, kw_only=True)
class VfioConfig(_Device):
    """A PCI function of the host, which is bound to vfio-pci.

    `port`: what it sits behind: "root-port", "switch-port" or "bridge-port". `iommufd`: through /dev/iommu
    and the function's own node instead of its group's.
    """

    kind: ClassVar[Kind] = Kind.VFIO
    address: str
    port: str = "root-port"
    iommufd: bool = False

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_BDF, self.address, "PCI address")
        _check(_PORT, self.port, "kind of port")


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserBlkConfig(_Device):
    """A disk that another process of this host serves (SPDK, qemu-storage-daemon), which also decides whether
    it can be written."""

    kind: ClassVar[Kind] = Kind.VHOST_USER_BLK

    path: str  # of the unix socket that the back end listens on
    queues: int = 1
    queue_size: int = 128  # a power of two, 2 to 1024

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check_queues(self.queues, self.queue_size, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserNetConfig(_Device):
    """A network card whose packets another process of this host carries (a DPDK switch, passt)."""

    kind: ClassVar[Kind] = Kind.VHOST_USER_NET

    path: str  # of the unix socket that the back end listens on
    mac: str
    queues: int = 1  # pairs, one for receiving and one for sending each
    queue_size: int = 256  # a power of two, 256 to 1024

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_MAC, self.mac, "MAC address")
        _check_queues(self.queues, self.queue_size, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionConfig(_Device):
    """What keeps the host from the guest's memory. `technology`: "sev", "snp", "tdx" or "se".

    `c_bit`, `reduced_bits`: of AMD's; `policy`: SEV-SNP's. `quote_socket`: TDX's quotes come through this
    unix socket, or if it is "" from port `quote_port` of the host's vsock.
    """

    kind: ClassVar[Kind] = Kind.PROTECTION
    id: str = "protection"
    technology: str
    c_bit: int = 0
    reduced_bits: int = 0
    policy: int = 0
    quote_socket: str = ""
    quote_port: int = 0

    def __post_init__(self) -> None:
        _check(_ID, self.id, "device id")
        _check(_TECHNOLOGY, self.technology, "technology of confidential guests")


DeviceConfig = (
    BlockConfig
    | ShareFsConfig
    | VsockConfig
    | PortConfig
    | RngConfig
    | BalloonConfig
    | ConsoleConfig
    | NetworkConfig
    | VfioConfig
    | VhostUserBlkConfig
    | VhostUserNetConfig
    | ProtectionConfig
)
