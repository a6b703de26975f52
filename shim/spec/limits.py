"""How much of a VM a container's limits ask for.

What: `wanted` reads linux.resources; `Size` is vCPUs and bytes, of a container's limits or of a VM.
Why: inside the VM a limit only ever takes away. One that is above what the VM has would be accepted
by the guest and mean nothing, so the sandbox compares, and grows the VM or refuses.
Invariants: no limit (absent, 0, -1, or beyond 2^62 bytes) asks for nothing; a cpuset counts where
there is no quota (Kata's rule), and one that cannot be read counts as none. Huge pages count besides the
limit of memory, as in Kubernetes: the guest reserves them (agent/huge_pages.py).
Source: runtime-spec `config-linux.md`, cpu and memory; the period's default is the kernel's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proto import oci_pb2

__all__ = ["Size", "fold_unified", "wanted"]

_PERIOD = 100_000  # microseconds
_NO_LIMIT = 1 << 62
_MAX_CPUS = 1024


@dataclass(frozen=True, slots=True)
class Size:
    """`vcpus` may be a fraction; `memory` is in bytes, and `huge`, what comes as huge pages besides. 0 is "no
    limit"."""

    vcpus: float = 0.0
    memory: int = 0
    huge: int = 0

    @property
    def bytes(self) -> int:
        """All of the memory."""
        return self.memory + self.huge


def wanted(resources: oci_pb2.LinuxResources) -> Size:
    """What a container with these limits can use at most."""
    quota, period = resources.CPU.Quota, resources.CPU.Period or _PERIOD
    limit = resources.Memory.Limit
    vcpus = quota / period if quota > 0 else float(_count(resources.CPU.Cpus))
    huge = sum(one.Limit for one in resources.HugepageLimits if one.Limit < _NO_LIMIT)
    return Size(vcpus=vcpus, memory=limit if 0 < limit < _NO_LIMIT else 0, huge=huge)


def fold_unified(resources: Mapping[str, Any]) -> dict[str, Any]:
    """`linux.resources` in which cpu and memory say what `unified` says of cpu.max and memory.max.

    So the VM is sized by them too. `unified` stays, and wins in the guest as it does with runc; a text
    that is no limit is left to the guest to refuse.
    """
    folded = dict(resources)
    unified = resources.get("unified") or {}
    words = unified.get("cpu.max", "").split()[:3]
    quota, period = [*map(_number, words), None, None][:2]
    says = {
        "memory": {"limit": _number(unified.get("memory.max"))},
        "cpu": {"quota": quota, "period": period} if len(words) < 3 and period != -1 else {},
    }
    for key, limits in says.items():
        known = {name: limit for name, limit in limits.items() if limit is not None}
        if known:
            folded[key] = {**folded.get(key, {}), **known}
    return folded


def _number(text: str | None) -> int | None:
    """A limit as cgroup v2 writes it; -1 for "max"."""
    if text == "max":
        return -1
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 19 else None


def _count(cpus: str) -> int:
    """How many CPUs a cpuset like "0-3,8" names."""
    count = 0
    for part in cpus.split(",")[:_MAX_CPUS]:
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or len(first + last) > 12:
            return 0
        count += max(0, int(last or first) - int(first) + 1)
    return min(count, _MAX_CPUS)
