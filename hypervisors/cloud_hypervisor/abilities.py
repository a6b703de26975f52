"""What a VM under Cloud Hypervisor can do with each kind of device, and why not what it cannot.

Invariants: a function of the configuration alone; the reasons are what a user reads, in errors and in
docs/hypervisors.md.
Source: seen with Cloud Hypervisor 53.0.
"""

from __future__ import annotations

from collections.abc import Mapping

from devices.kinds import YES, Kind, Support
from hypervisors.base import Capabilities
from hypervisors.cloud_hypervisor.config import ClhConfig

__all__ = ["MEMORY_UNIT", "MOST", "abilities", "max_memory", "vcpus"]

MEMORY_UNIT = 128
"""MiB of a DIMM, or a multiple of it."""

_AT_START = "it is part of the VM from its start"
_NO_SCSI = "Cloud Hypervisor has none"
_NO_PMEM = "its pmem is not used here"
_NO_SEV = "its confidential guests are not used here"
_STAYS = Support(cold=YES, hot=_AT_START, unplug=_AT_START)
_PLUGS = Support(cold=YES, hot=YES, unplug=YES)
_KEPT = "Cloud Hypervisor says yes and takes nothing back"
_LOCKED = "landlock = true: no file that the VM did not start with"

_DEVICES: Mapping[Kind, Support] = {
    Kind.BLK: Support(cold=YES, hot=YES, unplug=YES, resize=YES),
    Kind.SCSI: Support(*[_NO_SCSI] * 4),
    Kind.PMEM: Support(*[_NO_PMEM] * 4),
    Kind.VHOST_USER_BLK: Support(cold=YES, hot=YES, unplug=YES, resize="its back end decides its size"),
    Kind.NET: _PLUGS,
    Kind.VHOST_USER_NET: _PLUGS,
    Kind.VFIO: _PLUGS,
    Kind.SHARE_FS: _PLUGS,
    Kind.VSOCK: _STAYS,
    Kind.RNG: _STAYS,
    Kind.BALLOON: _STAYS,
    Kind.CONSOLE: _STAYS,
    Kind.PROTECTION: Support(cold=_NO_SEV),
    Kind.VCPU: _PLUGS,
    Kind.DIMM: Support(hot=YES, unplug=_KEPT),
    Kind.VIRTIO_MEM: Support(hot=YES, unplug=YES),
}

MOST = Capabilities(
    devices=_DEVICES, hybrid_vsock=True, own_vsock=True, pause=True, snapshot=True, restore=True
)


def max_memory(section: ClhConfig) -> int:
    """MiB that the VM can have."""
    room = max(0, section.default_maxmemory - section.default_memory)
    return section.default_memory + room // MEMORY_UNIT * MEMORY_UNIT


def abilities(section: ClhConfig) -> Capabilities:
    """Of the VM with this section."""
    able = dict(_DEVICES)
    cold, hot = (
        f'{key} = "no-port"' if getattr(section, key) == "no-port" else YES
        for key in ("cold_plug_vfio", "hot_plug_vfio")
    )
    able[Kind.VFIO] = Support(cold=cold, hot=hot, unplug=hot)
    if section.shared_fs == "none":
        able[Kind.SHARE_FS] = Support(*['shared_fs = "none"'] * 3)
    if section.default_maxvcpus <= vcpus(section):
        why = "the VM has as many as it can have (default_maxvcpus)"
        able[Kind.VCPU] = Support(cold=YES, hot=why, unplug=why)
    by_virtio = section.enable_virtio_mem
    for kind, used in ((Kind.VIRTIO_MEM, by_virtio), (Kind.DIMM, not by_virtio)):
        why = "" if used else f"enable_virtio_mem is {str(by_virtio).lower()}"
        if max_memory(section) <= section.default_memory:
            why = "the VM has as much as it can have (default_maxmemory)"
        able[kind] = Support(hot=why, unplug=why) if why else able[kind]
    if section.landlock:
        for kind in (Kind.BLK, Kind.SHARE_FS, Kind.VHOST_USER_BLK, Kind.VHOST_USER_NET, Kind.VFIO):
            able[kind] = Support(cold=able[kind].cold, hot=_LOCKED, unplug=_LOCKED, resize=able[kind].resize)
    saves = section.shared_fs == "none" and not section.landlock
    return Capabilities(
        devices=able, hybrid_vsock=True, own_vsock=True, pause=True, snapshot=saves, restore=saves
    )


def vcpus(section: ClhConfig) -> int:
    """Whole ones, at least one."""
    return max(1, -int(-section.default_vcpus // 1))
