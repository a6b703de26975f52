"""The [hypervisor.clh] section: Kata's keys that Cloud Hypervisor can act on, and one of our own.

Invariants: as in `hypervisors.config`: 0 and "" mean "choose for me", sizes are MiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypervisors.config import DiskSection, GrowingSection, VhostUserSection

__all__ = ["ClhConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClhConfig(VhostUserSection, GrowingSection, DiskSection):
    """Keys marked "ours" do not exist in Kata."""

    # --- programs
    path: str = ""

    # --- boot
    rootfs_type: str = "ext4"
    vm_rootfs_driver: str = ""

    # --- CPU and memory
    disable_nested_virtualization: bool = False
    enable_virtio_mem: bool = False  # grow and shrink by virtio-mem instead of by DIMMs
    reclaim_guest_freed_memory: bool = False

    restore_on_demand: bool = False  # ours: of a saved VM, memory is read when it is used

    # --- devices
    cold_plug_vfio: str = "no-port"  # no-port (none) | root-port: there is one bus, and all devices are on it
    hot_plug_vfio: str = "no-port"

    # --- security
    rootless: bool = False  # it opens disks by their paths
    disable_seccomp: bool = False
    landlock: bool = False  # ours: only files that the VM starts with; needs Linux 6.2
