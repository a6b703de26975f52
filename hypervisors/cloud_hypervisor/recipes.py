"""What Cloud Hypervisor is told: its argv, the VM's configuration, the body of each device. Pure functions.

Why every default is written out: Cloud Hypervisor validates nothing when a VM is created and guesses what is
left out: a disk's format from its content (writes to sector 0 fail then), a tap's name, a share's queues.
Invariants: a disk is raw always; descriptors are in no body: they go beside the request. A cold device has
the slot that it is given, so its address is known beforehand. Kernel parameters of the configuration come
last, so that they win.
Source: the API's description (cloud-hypervisor.yaml) of 53.0.
"""

from __future__ import annotations

from typing import Any

from devices.config import (
    BalloonConfig,
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    RngConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VsockConfig,
)
from devices.errors import BugError, UnsupportedByHypervisor
from hypervisors.cloud_hypervisor.abilities import max_memory, vcpus
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.rate_limits import rate_limiter
from hypervisors.rules import guest_words

__all__ = ["GUEST_CID", "arguments", "command_line", "machine", "plug"]

GUEST_CID = 3  # its vsock is the VM's own: no other VM sees the number


def arguments(section: ClhConfig, *, api: int, events: int) -> list[str]:
    """argv. `api`: a listening socket, `events`: the end of a pipe; both inherited."""
    seccomp = "false" if section.disable_seccomp else "true"
    return [
        section.path,
        "--api-socket",
        f"fd={api}",
        "--event-monitor",
        f"fd={events}",
        "--seccomp",
        seccomp,
    ]


def command_line(section: ClhConfig, *, console: bool, home_port: int) -> str:
    """reboot=k: a way that Cloud Hypervisor has a device for."""
    words = ["console=ttyS0"] if console else ["8250.nr_uarts=0"]
    words += ["reboot=k", "panic=-1", "cryptomgr.notests", "swiotlb=noforce", "no_timer_check"]
    if not section.enable_debug:
        words.append("quiet")
    if max_memory(section) > section.default_memory:
        words += ["memhp_default_state=online", "memory_hotplug.online_policy=auto-movable"]
    words += guest_words(section.image, section.rootfs_type, home_port)
    if section.kernel_params:
        words.append(section.kernel_params)
    return " ".join(words)


def machine(section: ClhConfig, words: str, *, console: bool, folder: str) -> dict[str, Any]:
    """The VM without its devices. `folder`: where the sandbox's sockets are."""
    room = max_memory(section) - section.default_memory
    memory: dict[str, Any] = {"size": section.default_memory << 20, "shared": True}  # shared: with virtiofsd
    if room:
        method = "VirtioMem" if section.enable_virtio_mem else "Acpi"
        memory |= {"hotplug_method": method, "hotplug_size": room << 20}
    boot = vcpus(section)
    made: dict[str, Any] = {
        "cpus": {
            "boot_vcpus": boot,
            "max_vcpus": max(boot, section.default_maxvcpus),
            "nested": not section.disable_nested_virtualization,
        },
        "memory": memory,
        "payload": {"kernel": section.kernel, "cmdline": words},
        "serial": {"mode": "Tty" if console else "Off"},
        "console": {"mode": "Off"},
        # Mapped for each other, passed devices fail where the IOMMU has fewer address bits than the CPU.
        "platform": {"vfio_p2p_dma": False},
    }
    if section.initrd:
        made["payload"]["initramfs"] = section.initrd
    if section.landlock:
        made |= {"landlock_enable": True, "landlock_rules": [{"path": folder, "access": "rw"}]}
    return made


def plug(device: DeviceConfig, section: ClhConfig, socket: str = "") -> tuple[str, str, dict[str, Any]]:
    """The call that adds it, the key of the VM's configuration that has it before the boot ("" is the call's
    then, too), and its body. `socket`: of its back end. Raises UnsupportedByHypervisor."""
    named: dict[str, Any] = {"id": device.id}
    match device:
        case BlockConfig():
            return "vm.add-disk", "disks", named | _disk(device, section)
        case VhostUserBlkConfig():
            queues = {"num_queues": min(device.queues, vcpus(section)), "queue_size": device.queue_size}
            return "vm.add-disk", "disks", {**named, "vhost_user": True, "vhost_socket": socket, **queues}
        case NetworkConfig():
            if not device.tap_fds:  # left out, it makes a tap of its own, and says yes
                raise UnsupportedByHypervisor("clh", "a network card without descriptors of its tap")
            queues = {"num_queues": 2 * len(device.tap_fds), "queue_size": 256}
            return "vm.add-net", "", {**named, "mac": device.mac, **queues}
        case VhostUserNetConfig():
            queues = {"num_queues": 2 * device.queues, "queue_size": device.queue_size}
            served = {"vhost_user": True, "vhost_socket": socket}
            return "vm.add-net", "net", {**named, "mac": device.mac, **served, **queues}
        case ShareFsConfig():
            queues = {"num_queues": 1, "queue_size": device.queue_size}
            return "vm.add-fs", "fs", {**named, "tag": device.tag, "socket": socket, **queues}
        case VfioConfig():
            return "vm.add-device", "devices", {**named, "path": f"/sys/bus/pci/devices/{device.address}/"}
        case VsockConfig():
            return "", "vsock", {**named, "cid": GUEST_CID, "socket": socket}
        case RngConfig():
            return "", "rng", {**named, "src": device.source}
        case BalloonConfig():
            reports = {"size": 0, "deflate_on_oom": True, "free_page_reporting": True}
            return "", "balloon", named | reports
        case ConsoleConfig():
            return "", "", {}
        case _:
            raise BugError(f"{device.kind.value} is among the capabilities, but not here")


def _disk(device: BlockConfig, section: ClhConfig) -> dict[str, Any]:
    options, limits = device.options, device.options.limits
    if device.format.value != "raw":
        raise UnsupportedByHypervisor("clh", f"a disk of format {device.format.value}")
    if limits.read_bytes or limits.write_bytes or limits.read_ops or limits.write_ops:
        raise UnsupportedByHypervisor("clh", "limits of a disk for one direction only")
    made = {
        "path": device.path,
        "readonly": device.read_only,
        "direct": options.direct,
        "image_type": "Raw",
        "num_queues": min(options.queues or 1, vcpus(section)),
        "queue_size": options.queue_size or 128,
        "sparse": options.discard and not device.read_only,
    }
    if device.serial:
        made["serial"] = device.serial
    if limits:
        made["rate_limiter_config"] = rate_limiter(
            bytes_=limits.bytes, bytes_burst=limits.bytes_burst, ops=limits.ops, ops_burst=limits.ops_burst
        )
    return made
