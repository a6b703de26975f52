"""Huge pages of the guest, reserved for the containers that have a limit of them.

What: `reserve` sets pages aside for one container's `linux.resources.hugepageLimits`; `give_back` lets go of
them.
Why: a limit of huge pages is what a container asks for, as Kubernetes has it: on a host somebody reserved
them at boot, in a VM nobody has. Without them mmap(MAP_HUGETLB) and a volume of medium HugePages fail at the
first touch.
Invariants: all pages of a limit are there, or the container is refused and none is kept; the VM's size
counts them (`shim.resources.sizing`). A limit of nothing, or of a page size that this kernel lacks, reserves
nothing.
Source: the kernel's admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from agent import log
from ttrpc import Code, RpcError

__all__ = ["Reserved", "give_back", "reserve"]

_PAGES = "/sys/kernel/mm/hugepages"
_COMPACT = "/proc/sys/vm/compact_memory"
_MEMINFO = "/proc/meminfo"
_UNITS = {"KB": 1, "MB": 1 << 10, "GB": 1 << 20}
_NO_LIMIT = 1 << 62

Reserved = list[tuple[str, int]]  # the kernel's file, and pages


def reserve(limits: Sequence[Mapping[str, Any]], directory: str = _PAGES) -> Reserved:
    """For `give_back`. Blocks while the kernel moves things. Raises RESOURCE_EXHAUSTED."""
    kept: Reserved = []
    try:
        for limit in limits:
            size = str(limit["pageSize"])
            kilobytes = int(size[:-2]) * _UNITS[size[-2:]]  # `agent.fit` has checked it
            path = f"{directory}/hugepages-{kilobytes}kB/nr_hugepages"
            wanted = int(limit["limit"]) // (kilobytes << 10)
            if 0 < int(limit["limit"]) < _NO_LIMIT and wanted and os.path.exists(path):
                room = _available() // kilobytes
                if wanted > room:  # the kernel would look for them for a minute
                    raise _no_room(room, wanted, size)
                kept.append((path, 0))
                kept[-1] = (path, _grow(path, wanted))
                if kept[-1][1] < wanted:
                    raise _no_room(kept[-1][1], wanted, size)
    except BaseException:
        give_back(kept)
        raise
    return kept


def _no_room(got: int, wanted: int, size: str) -> RpcError:
    return RpcError(
        Code.RESOURCE_EXHAUSTED,
        f"linux.resources.hugepageLimits: the guest has room for {got} of {wanted} pages of {size};"
        " try: a larger VM, by a limit of memory or default_memory",
    )


def _grow(path: str, wanted: int) -> int:
    """How many more pages there are; the kernel gives what it can."""
    before = _count(path)
    for prepare in (None, _COMPACT):
        if prepare is not None:
            with contextlib.suppress(OSError), open(prepare, "w", encoding="ascii") as file:
                file.write("1")
        with open(path, "w", encoding="ascii") as file:
            file.write(str(before + wanted))
        if _count(path) >= before + wanted:
            break
    return _count(path) - before


def _available() -> int:
    """KiB that can be had without swapping."""
    with open(_MEMINFO, encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))


def give_back(kept: Reserved) -> None:
    """Never raises. Pages that are still in use go when they are let go of."""
    while kept:
        path, pages = kept.pop()
        try:
            left = max(0, _count(path) - pages)
            with open(path, "w", encoding="ascii") as file:
                file.write(str(left))
        except (OSError, ValueError) as error:
            log.error(f"{path}: {error}")


def _count(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())
