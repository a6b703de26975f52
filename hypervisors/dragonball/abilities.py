"""What a VM under Dragonball can do with each kind of device, and why not what it cannot.

Invariants: a function of the configuration alone; the reasons are what a user reads, in errors and in
docs/hypervisors.md.
Source: the library of Kata 4.1.0; what was seen of it is in docs/dragonball.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from devices.kinds import YES, Kind, Support
from hypervisors.base import Capabilities
from hypervisors.dragonball.config import DragonballConfig

__all__ = ["MOST", "abilities", "saves", "vcpus"]

_NONE = "Dragonball has none"
_NO_ACTION = "Dragonball has no action for it"
_AT_START = "it is part of the VM from its start"
_NO_UPCALL = "the guest's kernel has no upcall server (upcall)"
_LATE_ONLY = "Dragonball plugs it into a running guest only, by its upcall server, and it is not used here"
_WAITS = "Dragonball listens for the back end itself, and stands still until it comes"
_NO_PCI = "the guest finds no PCI bus under Dragonball, and it is not used here"
_FIXED = "Dragonball's are not plugged here: the VM has its size from its start"
_STAYS = Support(cold=YES, hot=_AT_START, unplug=_AT_START)

_DEVICES: Mapping[Kind, Support] = {
    Kind.BLK: Support(cold=YES, hot=YES, unplug=YES, resize=_NO_ACTION),
    Kind.SCSI: Support(*[_NONE] * 4),
    Kind.PMEM: Support(*[_NONE] * 4),
    Kind.VHOST_USER_BLK: Support(cold=YES, hot=YES, unplug=YES, resize="its back end decides its size"),
    Kind.NET: Support(cold=YES, hot=YES, unplug=_NO_ACTION),
    Kind.VHOST_USER_NET: Support(*[_WAITS] * 3),
    Kind.VFIO: Support(*[_NO_PCI] * 3),
    Kind.SHARE_FS: _STAYS,
    Kind.VSOCK: _STAYS,
    Kind.RNG: Support(*[_NONE] * 3),
    Kind.BALLOON: Support(*[_LATE_ONLY] * 3),
    Kind.CONSOLE: _STAYS,
    Kind.PROTECTION: Support(cold="its confidential guests are not used here"),
    Kind.VCPU: Support(cold=YES, hot=_FIXED, unplug=_FIXED),
    Kind.DIMM: Support(*[_NONE] * 3),
    Kind.VIRTIO_MEM: Support(hot=_FIXED, unplug=_FIXED),
}

MOST = Capabilities(
    devices=_DEVICES,
    tap_by_name=True,
    hybrid_vsock=True,
    own_vsock=True,
    pause=True,
    snapshot=True,
    restore=True,
)


def abilities(section: DragonballConfig) -> Capabilities:
    """Of the VM with this section."""
    able = dict(_DEVICES)
    if not section.upcall:
        for kind in (Kind.BLK, Kind.VHOST_USER_BLK, Kind.NET):
            unplug = _NO_UPCALL if able[kind].unplug == YES else able[kind].unplug
            able[kind] = dataclasses.replace(able[kind], hot=_NO_UPCALL, unplug=unplug)
    if section.shared_fs == "none":
        able[Kind.SHARE_FS] = Support(*['shared_fs = "none"'] * 3)
    return dataclasses.replace(MOST, devices=able, snapshot=saves(section), restore=saves(section))


def saves(section: DragonballConfig) -> bool:
    """Whether a VM of it can be saved: what the directory's server holds open is saved by nobody."""
    return section.shared_fs == "none"


def vcpus(section: DragonballConfig) -> int:
    """Whole ones, at least one."""
    return max(1, -int(-section.default_vcpus // 1))
