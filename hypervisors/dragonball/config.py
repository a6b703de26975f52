"""The [hypervisor.dragonball] section: Kata's keys that Dragonball can act on, and two of our own.

Invariants: as in `hypervisors.config`: 0 and "" mean "choose for me", sizes are MiB. Rates of Kata's are
bits (operations) a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypervisors.config import DiskSection, SandboxSection

__all__ = ["INLINE", "DragonballConfig"]

INLINE = "inline-virtio-fs"
"""Kata's word: the VMM itself serves the shared directory, and there is no daemon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DragonballConfig(SandboxSection, DiskSection):
    """Keys marked "ours" do not exist in Kata."""

    # --- programs
    path: str = ""  # of the process around the library (docs/dragonball.md)

    # --- boot
    rootfs_type: str = "ext4"
    vm_rootfs_driver: str = ""
    upcall: bool = False  # ours: the guest's kernel has Dragonball's upcall server, so devices can come later

    # --- shared file system
    shared_fs: str = INLINE
    virtio_fs_cache: str = "auto"  # never | auto | always
    virtio_fs_queue_size: int = 1024

    # --- network
    disable_vhost_net: bool = False
    rx_rate_limiter_max_rate: int = 0  # bits/s to the guest; 0: no limit. Without vhost only
    tx_rate_limiter_max_rate: int = 0  # bits/s from the guest

    # --- devices
    hotplug_timeout: float = 30.0  # ours: seconds in which the guest must take or give back what is plugged

    # --- security
    rootless: bool = False
