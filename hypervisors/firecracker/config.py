"""The [hypervisor.firecracker] section: Kata's keys that Firecracker can act on, and a few of our own.

Invariants: as in `hypervisors.config`: 0 and "" mean "choose for me", sizes are MiB. Rates of Kata's are
bits (operations) a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypervisors.config import SandboxSection

__all__ = ["FirecrackerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirecrackerConfig(SandboxSection):
    """Keys marked "ours" do not exist in Kata."""

    # --- programs
    path: str = ""
    jailer_path: str = ""  # "": Firecracker runs without its jailer
    jailer_uid: int = 0  # ours: whom the jailed Firecracker runs as; 0: a user of the sandbox's own
    jailer_gid: int = 0  # ours
    jailer_cgroups: tuple[str, ...] = ("pids.max=64",)  # ours: FILE=VALUE; () leaves the cgroup alone

    # --- boot
    rootfs_type: str = "ext4"

    # --- devices
    block_device_slots: int = 4  # ours: disks of each kind (read-only, writable) that can come later
    disk_rate_limiter_bw_max_rate: int = 0  # bits/s, each way; 0: no limit
    disk_rate_limiter_bw_one_time_burst: int = 0  # bits
    disk_rate_limiter_ops_max_rate: int = 0
    disk_rate_limiter_ops_one_time_burst: int = 0
    rx_rate_limiter_max_rate: int = 0  # bits/s
    tx_rate_limiter_max_rate: int = 0  # bits/s

    # --- templates
    boot_from_template: bool = False
    device_state_path: str = ""  # what `save_vm` wrote
    memory_path: str = ""

    # --- security
    rootless: bool = True  # Kata: false. With the jailer and without a jailer_uid
    rootless_users: str = "2000000000-2000065535"  # ours: the numbers that such users are taken from
    disable_seccomp: bool = False
