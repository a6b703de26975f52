"""How much of a VM a container's limits ask for.

What: `wanted` reads linux.resources; `Size` is vCPUs and bytes, of a container's limits or of a VM.
Why: inside the VM a limit only ever takes away. One that is above what the VM has would be accepted
by the guest and mean nothing, so the sandbox compares, and grows the VM or refuses.
Invariants: no limit (absent, 0, -1, or beyond 2^62 bytes) asks for nothing; a cpuset counts where
there is no quota (Kata's rule), and one that cannot be read counts as none.
Source: runtime-spec `config-linux.md`, cpu and memory; the period's default is the kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto import oci_pb2

__all__ = ["Size", "wanted"]

_PERIOD = 100_000  # microseconds
_NO_LIMIT = 1 << 62
_MAX_CPUS = 1024


@dataclass(frozen=True, slots=True)
class Size:
    """`vcpus` may be a fraction; `memory` is in bytes. 0 is "no limit"."""

    vcpus: float = 0.0
    memory: int = 0


def wanted(resources: oci_pb2.LinuxResources) -> Size:
    """What a container with these limits can use at most."""
    quota, period = resources.CPU.Quota, resources.CPU.Period or _PERIOD
    limit = resources.Memory.Limit
    vcpus = quota / period if quota > 0 else float(_count(resources.CPU.Cpus))
    return Size(vcpus=vcpus, memory=limit if 0 < limit < _NO_LIMIT else 0)


def _count(cpus: str) -> int:
    """How many CPUs a cpuset like "0-3,8" names."""
    count = 0
    for part in cpus.split(",")[:_MAX_CPUS]:
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or len(first + last) > 12:
            return 0
        count += max(0, int(last or first) - int(first) + 1)
    return min(count, _MAX_CPUS)
