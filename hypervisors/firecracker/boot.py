"""What Firecracker is told before the VM starts: its argv, the guest's kernel parameters, the API calls.

What: pure functions from the configuration and the devices to argv, text and `Call`s in order.
Why apart: the order and the bytes are the contract with Firecracker, and can be tested without it.
Invariants: paths are names in the den (`hypervisors.firecracker.jail`); nothing of the guest's or a pod's
reaches argv; kernel parameters of the configuration come last, so that they win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.rate_limits import rate_limiter
from hypervisors.rules import guest_words

__all__ = [
    "API_SOCKET",
    "GUEST_CID",
    "VSOCK",
    "Call",
    "arguments",
    "drive",
    "kernel_command_line",
    "machine",
    "network",
    "vcpus",
]

API_SOCKET = "fc.sock"
VSOCK = "kata.hvsock"
GUEST_CID = 3  # Firecracker's vsock is the VM's own: no other VM sees the number


@dataclass(frozen=True, slots=True)
class Call:
    """One PUT before the start."""

    path: str
    body: dict[str, Any]


def arguments(
    section: FirecrackerConfig,
    *,
    jail: str = "",
    base: str = "",
    owner: tuple[int, int] = (0, 0),
    cgroups: int = 2,
) -> list[str]:
    """argv of Firecracker. `jail`: the id under which the jailer runs it below `base`, "" without a jailer;
    `owner`: the user and group that it runs as there; `cgroups`: the host's cgroup version. The
    caller sees to the network namespace."""
    own = ["--api-sock", API_SOCKET]
    if section.disable_seccomp:
        own.append("--no-seccomp")
    if not jail:
        return [section.path, *own]
    argv = [section.jailer_path, "--id", jail, "--exec-file", section.path]
    argv += ["--uid", str(owner[0]), "--gid", str(owner[1])]
    if section.jailer_cgroups:
        argv += ["--cgroup-version", str(cgroups)]
        for setting in section.jailer_cgroups:
            argv += ["--cgroup", setting]
    return [*argv, "--chroot-base-dir", base, "--", *own]


def kernel_command_line(section: FirecrackerConfig, *, console: bool, home_port: int) -> str:
    """reboot=k: the only way out that Firecracker has a device for. pci=off: it has no bus to look for."""
    words = ["reboot=k", "panic=-1", "pci=off", "cryptomgr.notests", "swiotlb=noforce"]
    words.insert(0, "console=ttyS0" if console else "8250.nr_uarts=0")
    if not section.enable_debug:
        words.append("quiet")
    words += guest_words(section.image, section.rootfs_type, home_port)
    if section.kernel_params:
        words.append(section.kernel_params)
    return " ".join(words)


def machine(section: FirecrackerConfig, kernel: str, initrd: str, command_line: str) -> Sequence[Call]:
    """The machine itself."""
    source = {"kernel_image_path": kernel, "boot_args": command_line}
    if initrd:
        source["initrd_path"] = initrd
    size = {"vcpu_count": vcpus(section), "mem_size_mib": section.default_memory}
    return [Call("/boot-source", source), Call("/machine-config", size)]


def vcpus(section: FirecrackerConfig) -> int:
    """Whole ones, at least one."""
    return max(1, -int(-section.default_vcpus // 1))


def drive(section: FirecrackerConfig, name: str, path: str, *, read_only: bool) -> Call:
    """One disk, with the configuration's limits. Never "root device": the guest's own init finds it."""
    body: dict[str, Any] = {
        "drive_id": name,
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": read_only,
    }
    limits = rate_limiter(
        bytes_=-(-section.disk_rate_limiter_bw_max_rate // 8),
        bytes_burst=section.disk_rate_limiter_bw_one_time_burst // 8,
        ops=section.disk_rate_limiter_ops_max_rate,
        ops_burst=section.disk_rate_limiter_ops_one_time_burst,
    )
    if limits:
        body["rate_limiter"] = limits
    return Call(f"/drives/{name}", body)


def network(section: FirecrackerConfig, name: str, tap: str, mac: str) -> Call:
    """One network card on the tap device `tap` of the VMM's network namespace."""
    body: dict[str, Any] = {"iface_id": name, "host_dev_name": tap, "guest_mac": mac}
    for key, bits in (
        ("rx_rate_limiter", section.rx_rate_limiter_max_rate),
        ("tx_rate_limiter", section.tx_rate_limiter_max_rate),
    ):
        limits = rate_limiter(bytes_=-(-bits // 8))
        if limits:
            body[key] = limits
    return Call(f"/network-interfaces/{name}", body)
