"""Kinds of devices, and what a VMM can do with each: the rows and columns of the table in docs/devices.md.

What: `Kind`, one row; `Op`, one column; `Support`, one VMM's answer for one kind.
Why reasons and not booleans: what a VMM cannot do it must say beforehand, and say why; the text that refuses
a plug is the one in the documentation's table.
Invariants: an operation without an answer is refused; `OPERATIONS` names those that make sense at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["OPERATIONS", "YES", "Kind", "Op", "Support"]

YES = ""
"""The answer of `Support` for what can be done; everything else is the reason why not."""

_ABSENT = "it has none"


class Kind(Enum):
    """What can be part of a VM, by the field's names."""

    BLK = "virtio-blk"
    SCSI = "virtio-scsi"
    PMEM = "nvdimm"
    VHOST_USER_BLK = "vhost-user-blk"
    NET = "virtio-net"
    VHOST_USER_NET = "vhost-user-net"
    VFIO = "vfio"
    SHARE_FS = "virtio-fs"
    VSOCK = "vsock"
    PORT = "virtio-serial"
    RNG = "virtio-rng"
    BALLOON = "virtio-balloon"
    CONSOLE = "console"
    PROTECTION = "confidential guest"
    VCPU = "vCPU"
    DIMM = "memory by DIMM"
    VIRTIO_MEM = "memory by virtio-mem"


class Op(Enum):
    """What can be done with a device."""

    COLD = "cold-plug"
    HOT = "hot-plug"
    UNPLUG = "unplug"
    RESIZE = "resize"


_ALL = (Op.COLD, Op.HOT, Op.UNPLUG, Op.RESIZE)
_SIZELESS = (Op.COLD, Op.HOT, Op.UNPLUG)
_SIZED = frozenset({Kind.BLK, Kind.SCSI, Kind.PMEM, Kind.VHOST_USER_BLK})

OPERATIONS: dict[Kind, tuple[Op, ...]] = {
    **{kind: _ALL if kind in _SIZED else _SIZELESS for kind in Kind},
    Kind.PROTECTION: (Op.COLD,),
    Kind.DIMM: (Op.HOT, Op.UNPLUG),
    Kind.VIRTIO_MEM: (Op.HOT, Op.UNPLUG),
}
"""What can be asked of each kind; a card has no size, and a DIMM is what memory is made of later."""


@dataclass(frozen=True, slots=True)
class Support:
    """For one kind: `YES` or the reason why not, by operation."""

    cold: str = _ABSENT
    hot: str = _ABSENT
    unplug: str = _ABSENT
    resize: str = _ABSENT

    def reason(self, op: Op) -> str:
        """`YES`, or why it cannot be done."""
        answers = {Op.COLD: self.cold, Op.HOT: self.hot, Op.UNPLUG: self.unplug, Op.RESIZE: self.resize}
        return answers[op]
