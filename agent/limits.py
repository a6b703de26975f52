"""New limits for a container that exists, written into its cgroup (version 2).

What: `apply` takes `linux.resources` of an update, `plan` says which file gets which text.
Why not `crun update`: it starts a program for a few writes, keeps a quota that is to be lifted, and on an
error leaves half of the limits changed.
Invariants: all writes of an update hold, or none: on an error what was written is put back. Only files
of the container's own cgroup are written, whatever `unified` names.
Source: runtime-spec `config-linux.md`; the kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from agent import log
from agent.fit import cpu_weight
from ttrpc import Code, RpcError

__all__ = ["apply", "plan"]

Json = dict[str, Any]

_CODES = {
    errno.EINVAL: Code.INVALID_ARGUMENT,
    errno.ERANGE: Code.INVALID_ARGUMENT,
    errno.ENOENT: Code.INVALID_ARGUMENT,
    errno.EACCES: Code.INVALID_ARGUMENT,  # not a file that can be written
    errno.EPERM: Code.INVALID_ARGUMENT,
    errno.EBUSY: Code.FAILED_PRECONDITION,
}


def _max(limit: int) -> str:
    return "max" if limit < 0 else str(limit)


def _wrong(text: str) -> RpcError:
    return RpcError(Code.INVALID_ARGUMENT, f"linux.resources.{text}")


def plan(resources: Mapping[str, Any], now: Mapping[str, str]) -> list[tuple[str, str]]:
    """(file, text) in the order of writing. `now` gives the present text of a file, if there is one.

    Raises RpcError INVALID_ARGUMENT for limits that contradict each other, FAILED_PRECONDITION for a
    memory limit below what is in use, where `checkBeforeUpdate` asks to be told.
    """
    writes: list[tuple[str, str]] = []
    cpu, memory = resources.get("cpu", {}), resources.get("memory", {})
    if "shares" in cpu:
        writes.append(("cpu.weight", str(cpu_weight(cpu["shares"]))))
    if "idle" in cpu:
        writes.append(("cpu.idle", str(cpu["idle"])))
    if "quota" in cpu or "period" in cpu:
        quota, _, period = now.get("cpu.max", "max 100000").partition(" ")
        quota = _max(cpu["quota"]) if "quota" in cpu else quota
        writes.append(("cpu.max", f"{quota} {cpu.get('period', period)}"))
    for key, file in (("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")):
        if key in cpu:
            writes.append((file, cpu[key]))
    writes += _memory(memory, now)
    if "limit" in resources.get("pids", {}):
        writes.append(("pids.max", _max(resources["pids"]["limit"])))
    for huge in resources.get("hugepageLimits", ()):
        writes.append((f"hugetlb.{huge['pageSize']}.max", str(huge["limit"])))
    for file, text in resources.get("unified", {}).items():
        if "/" in file or not file[:1].isalpha() or file.startswith("cgroup."):
            raise _wrong(f"unified: {file[:60]!r} is not a limit")
        writes.append((file, str(text)))
    return writes


def _memory(memory: Mapping[str, Any], now: Mapping[str, str]) -> list[tuple[str, str]]:
    limit, swap = memory.get("limit"), memory.get("swap")
    used = now.get("memory.current", "")
    if memory.get("checkBeforeUpdate") and limit and 0 < limit < int(used if used.isdigit() else 0):
        raise RpcError(
            Code.FAILED_PRECONDITION, f"linux.resources.memory.limit: {limit} bytes, but {used} are in use"
        )
    writes = []
    if limit is not None and limit < 0 and swap is None:
        swap = -1  # as runc: who may have all memory may have all swap
    if swap is not None:
        # OCI counts memory and swap together, as cgroup v1 did.
        held = now.get("memory.max", "max")
        whole = limit if limit is not None else int(held) if held.isdigit() else -1
        if swap >= 0 and whole < 0:
            raise _wrong("memory.swap: it needs a limit of memory")
        if 0 <= swap < whole:
            raise _wrong(f"memory.swap: {swap} is less than the memory's own {whole}")
        writes.append(("memory.swap.max", _max(swap - whole if swap >= 0 else -1)))
    if limit is not None:
        writes.append(("memory.max", _max(limit)))
    if "reservation" in memory:
        writes.append(("memory.low", _max(memory["reservation"])))
    return writes


def apply(cgroup: str, resources: Mapping[str, Any]) -> None:
    """Change the limits. Blocks while the kernel takes memory back. Raises RpcError, with nothing changed."""
    undo: list[tuple[str, str]] = []
    now = {file: _read(f"{cgroup}/{file}") for file in ("cpu.max", "memory.max", "memory.current")}
    for file, text in plan(resources, now):
        path = f"{cgroup}/{file}"
        before = _read(path)
        try:
            _write(path, text)
        except OSError as error:
            for written, old in reversed(undo):
                try:
                    _write(written, old)
                except OSError as again:
                    log.error(f"{written} cannot be put back to {old!r}: {again.strerror}")
            code = _CODES.get(error.errno or 0, Code.INTERNAL)
            raise RpcError(code, f"{file} cannot be {text[:80]!r}: {error.strerror}") from None
        undo.append((path, before))


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode() or b"\n")  # an empty cpuset is written as an empty line
    finally:
        os.close(fd)
