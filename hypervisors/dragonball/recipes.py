"""What Dragonball is told: argv, the machine, the boot source, the action for each device. Pure functions.

Why every field is written out: what the library reads has no defaults but for what may be null.
Invariants: a disk is raw always, and never "root": the guest's own init finds it. Kernel parameters of the
configuration come last, so that they win.
Source: VmmAction of Kata 4.1.0's library; docs/dragonball.md.
"""

from __future__ import annotations

from typing import Any

from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    ShareFsConfig,
    VhostUserBlkConfig,
    VsockConfig,
)
from devices.errors import BugError, UnsupportedByHypervisor
from hypervisors.dragonball.abilities import vcpus
from hypervisors.dragonball.config import DragonballConfig
from hypervisors.rate_limits import rate_limiter
from hypervisors.rules import guest_words

__all__ = ["GUEST_CID", "Action", "arguments", "boot_source", "command_line", "machine", "mount", "plug"]

GUEST_CID = 3  # its vsock is the VM's own: no other VM sees the number
_SHARED_IRQ = {"use_shared_irq": None, "use_generic_irq": None}  # null: as the library has it
_UNLIMITED = {"size": 0, "one_time_burst": 0, "refill_time": 0}
_VSOCK_QUEUES = [256, 256, 256]

Action = tuple[str, Any]
"""The name of an action, and its fields."""


def arguments(section: DragonballConfig, *, api: int) -> list[str]:
    """argv. `api`: a listening socket, inherited."""
    return [section.path, "--api", f"fd={api}", "--log", "info" if section.enable_debug else "warn"]


def command_line(section: DragonballConfig, *, console: bool, home_port: int) -> str:
    """reboot=k: a way that Dragonball has a device for. pci=off: the guest would look for a bus that no table
    tells it of. nr_cpus: our kernel's tables list more than there are."""
    words = ["console=ttyS0"] if console else ["8250.nr_uarts=0"]
    words += ["reboot=k", "panic=-1", "pci=off", "cryptomgr.notests", "swiotlb=noforce", "no_timer_check"]
    words.append(f"nr_cpus={vcpus(section)}")
    if not section.enable_debug:
        words.append("quiet")
    words += guest_words(section.image, section.rootfs_type, home_port)
    if section.kernel_params:
        words.append(section.kernel_params)
    return " ".join(words)


def machine(section: DragonballConfig) -> Action:
    """The VM without its devices."""
    count = vcpus(section)
    memory = section.default_memory + section.default_memory % 2  # MiB; an odd number is refused
    return "SetVmConfiguration", {
        "vcpu_count": count,
        "max_vcpu_count": count,
        "mem_type": "shmem",
        "mem_size_mib": memory,
        "serial_path": None,  # its standard output
    }


def boot_source(section: DragonballConfig, words: str) -> Action:
    """Kernel, initramfs and kernel parameters."""
    source = {"kernel_path": section.kernel, "initrd_path": section.initrd or None, "boot_args": words}
    return "ConfigureBootSource", source


def plug(device: DeviceConfig, section: DragonballConfig, socket: str = "") -> Action | None:
    """The action that adds it; None for what is there anyway. `socket`: that Dragonball makes or connects to
    for it. Raises UnsupportedByHypervisor."""
    match device:
        case BlockConfig():
            return "InsertBlockDevice", _disk(device, section)
        case VhostUserBlkConfig():
            served = _block(device.id, f"spdk://{socket}", "Spdk")
            return "InsertBlockDevice", served | {
                "num_queues": device.queues,
                "queue_size": device.queue_size,
            }
        case NetworkConfig():
            return "InsertNetworkDevice", _card(device, section)
        case ShareFsConfig():
            return "InsertFsDevice", _share(device)
        case VsockConfig():
            places = {"id": device.id, "guest_cid": GUEST_CID, "uds_path": socket, "tcp_addr": None}
            return "InsertVsockDevice", {**places, "queue_size": _VSOCK_QUEUES, **_SHARED_IRQ}
        case ConsoleConfig():
            return None
        case _:
            raise BugError(f"{device.kind.value} is among the capabilities, but not here")


def mount(device: ShareFsConfig) -> Action:
    """What serves the shared directory, once the VM runs: the guest sees it as the file system's root."""
    return "ManipulateFsBackendFs", {
        "ops": "mount",
        "fstype": "passthroughfs",
        "source": device.source,
        "mountpoint": "/",
        "tag": device.tag,
        "config": None,
        "prefetch_list_path": None,
        "dax_threshold_size_kb": None,
    }


def _block(name: str, path: str, kind: str) -> dict[str, Any]:
    return {
        "drive_id": name,
        "device_type": kind,
        "path_on_host": path,
        "is_root_device": False,
        "part_uuid": None,
        "is_read_only": False,
        "is_direct": False,
        "no_drop": False,
        "sparse": False,
        "num_queues": 1,
        "queue_size": 128,
        "rate_limiter": None,
        "use_pci_bus": None,
        **_SHARED_IRQ,
    }


def _disk(device: BlockConfig, section: DragonballConfig) -> dict[str, Any]:
    options, limits = device.options, device.options.limits
    if device.format.value != "raw":
        raise UnsupportedByHypervisor("dragonball", f"a disk of format {device.format.value}")
    if limits.read_bytes or limits.write_bytes or limits.read_ops or limits.write_ops:
        raise UnsupportedByHypervisor("dragonball", "limits of a disk for one direction only")
    made = _block(device.id, device.path, "RawBlock") | {
        "is_read_only": device.read_only,
        "is_direct": options.direct,
        "sparse": options.discard and not device.read_only,
        "num_queues": min(options.queues or 1, vcpus(section)),
        "queue_size": options.queue_size or 128,
    }
    if limits:
        made["rate_limiter"] = _limits(limits.bytes, limits.bytes_burst, limits.ops, limits.ops_burst)
    return made


def _card(device: NetworkConfig, section: DragonballConfig) -> dict[str, Any]:
    if not device.tap:
        raise UnsupportedByHypervisor("dragonball", "a network card without the name of its tap device")
    backend: dict[str, Any] = {
        "type": "virtio" if section.disable_vhost_net else "vhost",
        "iface_id": device.id,
        "host_dev_name": device.tap,
        "rx_rate_limiter": None,
        "tx_rate_limiter": None,
        "allow_duplicate_mac": False,
    }
    if section.disable_vhost_net:
        for key in ("rx", "tx"):
            if bits := getattr(section, f"{key}_rate_limiter_max_rate"):
                backend[f"{key}_rate_limiter"] = _limits(-(-bits // 8))
    return {
        "num_queues": 2,
        "queue_size": 256,
        "backend": backend,
        "guest_mac": device.mac,
        **_SHARED_IRQ,
    }


def _share(device: ShareFsConfig) -> dict[str, Any]:
    return {
        "sock_path": device.id,  # nothing is there: two devices must not have the same
        "tag": device.tag,
        "num_queues": 1,
        "queue_size": device.queue_size,
        "cache_size": 0,  # no window of DAX
        "thread_pool_size": 0,
        "cache_policy": device.cache.value,
        "writeback_cache": False,
        "no_open": False,
        "xattr": device.xattr,
        "drop_sys_resource": False,
        "mode": "virtio",
        "fuse_killpriv_v2": False,
        "no_readdir": False,
        "rate_limiter": None,
        **_SHARED_IRQ,
    }


def _limits(bytes_: int, bytes_burst: int = 0, ops: int = 0, ops_burst: int = 0) -> dict[str, Any]:
    """Of both kinds, and all of each: none is a bucket of size 0."""
    given = rate_limiter(bytes_=bytes_, bytes_burst=bytes_burst, ops=ops, ops_burst=ops_burst) or {}
    return {key: _UNLIMITED | given.get(key, {}) for key in ("bandwidth", "ops")}
