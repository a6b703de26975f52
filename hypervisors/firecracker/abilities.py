"""What a VM under Firecracker can do with each kind of device, and why not what it cannot.

Invariants: the reasons are what a user reads, in errors and in docs/devices.md.
"""

from __future__ import annotations

from devices.kinds import YES, Kind, Support

__all__ = ["abilities"]

_NO_API = "Firecracker's API has none"
_AT_START = "Firecracker takes it before the start only"
_STAYS = Support(cold=YES, hot=_AT_START, unplug=_AT_START)
_NONE = Support(_NO_API, _NO_API, _NO_API, _NO_API)
_NO_SOCKET = 'its drives with a "socket" are not used here'
_NO_BALLOON = "its balloon is not used here"
_FIXED = "Firecracker fixes it at the start"


def abilities(slots: int) -> dict[Kind, Support]:
    """Of a VM with so many empty drives (`block_device_slots`), which is how it gets disks while it runs."""
    late = YES if slots else "there is no empty drive (block_device_slots)"
    return {
        **dict.fromkeys(Kind, _NONE),
        Kind.BLK: Support(cold=YES, hot=late, unplug=late, resize=YES),
        Kind.VHOST_USER_BLK: Support(*[_NO_SOCKET] * 4),
        Kind.BALLOON: Support(*[_NO_BALLOON] * 4),
        Kind.NET: _STAYS,
        Kind.VSOCK: _STAYS,
        Kind.RNG: _STAYS,
        Kind.CONSOLE: _STAYS,
        Kind.VCPU: Support(cold=YES, hot=_FIXED, unplug=_FIXED),
        Kind.DIMM: Support(hot=_FIXED, unplug=_FIXED),
        Kind.VIRTIO_MEM: Support(hot=_FIXED, unplug=_FIXED),
    }
