"""What a VM on another machine can do with each kind of device: next to nothing, and why.

Invariants: the reasons are what a user reads, in errors and in docs/hypervisors.md.
"""

from __future__ import annotations

from devices.kinds import YES, Kind, Support
from hypervisors.base import Capabilities

__all__ = ["MOST", "NO_PAUSE"]

_ELSEWHERE = "the VM is on another machine, and has nothing of this host's"
_ITS_OWN = "whoever makes the VM decides that"
_NETWORK = "whoever makes the VM takes the network from the pod's namespace"
_SIZE = "its size is told once, before it is made"
NO_PAUSE = "its service makes VMs and ends them, and knows nothing else"

_OWN = (Kind.RNG, Kind.BALLOON, Kind.CONSOLE, Kind.PROTECTION)

MOST = Capabilities(
    devices={
        **{kind: Support(*[_ELSEWHERE] * 4) for kind in Kind},
        **{kind: Support(*[_ITS_OWN] * 4) for kind in _OWN},
        Kind.NET: Support(*[_NETWORK] * 4),
        Kind.VSOCK: Support(cold=YES, hot=_ITS_OWN, unplug=_ITS_OWN),
        Kind.VCPU: Support(cold=YES, hot=_SIZE, unplug=_SIZE),
        Kind.DIMM: Support(hot=_SIZE, unplug=_SIZE),
        Kind.VIRTIO_MEM: Support(hot=_SIZE, unplug=_SIZE),
    },
    hybrid_vsock=True,
    own_vsock=True,
)
