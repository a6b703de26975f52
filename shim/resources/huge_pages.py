"""Volumes of huge pages: the guest has its own, reserved for the container's limit.

What: `find` tells which bind mounts lie on a hugetlbfs of the host (Kubernetes' emptyDir of medium
HugePages), and `storages` has the guest mount its own.
Why: the host's pages cannot be shared by virtio-fs: the guest would have small ones, and nobody would know.
Invariants: a volume without a limit of pages of its size is refused: nobody could say how many to reserve.
Containers of a pod that mount the same one share it.
Source: Kata's hugepage volumes (facts/kata.md 1.8); the kernel's admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.errors import CallerError
from devices.mounts import mount_of
from proto import agent_pb2
from shim.spec.guest_spec import Volume

__all__ = ["HugeVolume", "find", "storages"]

_GUEST = "/run/kata-containers/sandbox/hugepages"
_SMALLEST = 2 << 20  # bytes; a file system with such blocks may be one of huge pages, or a cluster's
_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


@dataclass(frozen=True, slots=True)
class HugeVolume:
    """One mount of the spec. `page`: bytes of a page, `size`: bytes of the container's limit of these."""

    index: int
    source: str
    page: int
    size: int

    @property
    def mount_point(self) -> str:
        """Where the guest has it."""
        return f"{_GUEST}/{hashlib.sha256(self.source.encode()).hexdigest()[:32]}"


def find(volumes: Sequence[Volume], spec: Mapping[str, Any]) -> dict[int, HugeVolume]:
    """By their index in the spec's mounts. Blocks. Raises CallerError."""
    found = {}
    for volume in volumes:
        try:
            page = os.statvfs(volume.source).f_bsize
        except OSError:  # whoever shares it says so
            continue
        if page < _SMALLEST or mount_of(volume.source).fstype != "hugetlbfs":
            continue
        size = _limit(spec, page)
        if not size:
            raise CallerError(
                f"the mount at {volume.destination} ({volume.source}) is of huge pages of {page >> 20} MiB,"
                " of which the container has no limit, so that the guest cannot reserve them",
                phase="volume",
                code="INVALID_ARGUMENT",
                hint="set linux.resources.hugepageLimits (Kubernetes: resources.limits of hugepages-...)",
            )
        found[volume.index] = HugeVolume(volume.index, volume.source, page, size)
    return found


def _limit(spec: Mapping[str, Any], page: int) -> int:
    limits = ((spec.get("linux") or {}).get("resources") or {}).get("hugepageLimits") or []
    for limit in limits:
        size = str(limit.get("pageSize") or "")
        if size[:-2].isdecimal() and int(size[:-2]) * _UNITS.get(size[-2:], 0) == page:
            return int(limit.get("limit") or 0)
    return 0


def storages(found: Mapping[int, HugeVolume], *, stock: bool) -> list[agent_pb2.Storage]:
    """What the agent mounts. `stock`: one of Kata's, which reserves by volumes; ours does by limits."""
    return [
        agent_pb2.Storage(
            driver="ephemeral",
            source="nodev",
            fstype="hugetlbfs",
            options=[f"pagesize={volume.page}", *([f"size={volume.size}"] if stock else [])],
            mount_point=volume.mount_point,
        )
        for volume in found.values()
    ]
