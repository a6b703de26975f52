"""What becomes of each field of the OCI runtime spec that is not simply enforced in the guest.

What: three tables of fields by their place (`linux.seccomp.listenerPath`, `mounts[].uidMappings`) and
the functions that apply them: `check` refuses, `drop` takes out and says why, `take_beyond` sets apart
what Kata's agent protocol has no field for and our agent takes as JSON.
Why tables: a field that is lost in silence is a limit or a protection that somebody believes to have.
docs/compatibility.md has a row for each entry, and a test compares the two.
Invariants: a field in no table goes to the guest as it is, or, if the protocol does not know it, into
the log (`shim.spec.oci`). An empty or zero value asks for nothing and is neither refused nor logged.
Source: runtime-spec 1.2 `config.md`, `config-linux.md`; crun 1.8.1, which the guest runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from devices.errors import CallerError
from proto.capabilities import CAPABILITIES

__all__ = ["BEYOND", "DROPPED", "REFUSED", "check", "drop", "take_beyond"]

_NO_POLICY = "the guest has no security policy loaded; the VM is the wall"
_OTHER_PLATFORM = "for another platform"
_NO_V2 = "cgroup v2, which the guest uses, has no such control"
_NO_BLOCK = "of the host's devices only those of linux.devices can be limited, and weights none"

REFUSED: Mapping[str, str] = {
    "mounts[].uidMappings": "id-mapped mounts are not possible on virtio-fs",
    "mounts[].gidMappings": "id-mapped mounts are not possible on virtio-fs",
    "process.scheduler": "the guest's OCI runtime sets no scheduling policy",
    "process.ioPriority": "the guest's OCI runtime sets no I/O priority",
    "process.execCPUAffinity": "the guest's OCI runtime sets no affinity of an exec",
    "linux.intelRdt": "cache and bandwidth of the host's CPU cannot be divided from within a VM",
    "linux.memoryPolicy": "the guest's OCI runtime sets no memory policy",
    "linux.netDevices": "interfaces of the host cannot be moved into the guest",
    "linux.timeOffsets": "the guest's OCI runtime makes no time namespace",
    "linux.seccomp.listenerPath": "a listener on the host cannot serve a process in the guest",
    "linux.seccomp.listenerMetadata": "a listener on the host cannot serve a process in the guest",
    "linux.resources.cpu.realtimeRuntime": "the guest's kernel has no real-time group scheduling",
    "linux.resources.cpu.realtimePeriod": "the guest's kernel has no real-time group scheduling",
    "linux.resources.rdma": "no RDMA device is in the guest",
}
"""Place -> why. These end the call with UNIMPLEMENTED before anything is done."""

DROPPED: Mapping[str, str] = {
    "process.apparmorProfile": _NO_POLICY,
    "process.selinuxLabel": _NO_POLICY,
    "process.user.username": "for Windows; uid and gid count",
    "process.commandLine": _OTHER_PLATFORM,
    "linux.mountLabel": _NO_POLICY,
    "linux.resources.memory.kernel": _NO_V2,
    "linux.resources.memory.kernelTCP": _NO_V2,
    "linux.resources.memory.swappiness": _NO_V2,
    "linux.resources.memory.disableOOMKiller": _NO_V2,
    "linux.resources.memory.useHierarchy": "always so with cgroup v2",
    "linux.resources.network": _NO_V2,
    "linux.resources.blockIO": _NO_BLOCK,
    "solaris": _OTHER_PLATFORM,
    "windows": _OTHER_PLATFORM,
    "zos": _OTHER_PLATFORM,
    "freebsd": _OTHER_PLATFORM,
    "vm": "the configuration chooses hypervisor, kernel and image",
}
"""Place -> why. These are left out with a line in the log."""

BEYOND = (
    "domainname",
    "process.user.umask",
    "linux.personality",
    "linux.seccomp.defaultErrnoRet",
    "linux.resources.cpu.burst",
    "linux.resources.cpu.idle",
    "linux.resources.memory.checkBeforeUpdate",
    "linux.resources.unified",
)
"""Enforced, but only by an agent that has the feature `agent_client.FEATURE_BEYOND`: ours."""

#: SELinux labels: refused instead of dropped where the configuration wants them (disable_guest_selinux).
_SELINUX = ("process.selinuxLabel", "linux.mountLabel")

_PROPAGATIONS = frozenset(
    prefix + name for prefix in ("", "r") for name in ("shared", "slave", "private", "unbindable")
)

_Visit = Callable[[dict[str, Any], str, str], None]


def check(document: Mapping[str, Any], *, guest_selinux: bool = False) -> None:
    """Raise CallerError for the first field that cannot be served; `document` is (part of) a config.json.

    `guest_selinux`: the configuration asks for SELinux in the guest, which has no policy for it.
    """

    def refuse(why: str, code: str) -> _Visit:
        def visit(_: dict[str, Any], __: str, where: str) -> None:
            raise CallerError(
                f"config.json: {where} is not supported: {why}",
                phase="bundle",
                hint="leave it out of the container's spec",
                code=code,
            )

        return visit

    def check_namespaces(parent: dict[str, Any], key: str, where: str) -> None:
        seen: set[str] = set()
        for index, space in enumerate(parent[key]):
            kind = space.get("type", "")
            if not kind or kind in seen:
                why = f"is a second one of type {kind}" if kind else "needs a type"
                raise CallerError(
                    f"config.json: {where}[{index}] {why}", phase="bundle", code="INVALID_ARGUMENT"
                )
            seen.add(kind)

    def check_propagation(parent: dict[str, Any], key: str, where: str) -> None:
        if parent[key] not in _PROPAGATIONS:
            raise CallerError(
                f"config.json: {where} cannot be {str(parent[key])[:40]!r}",
                phase="bundle",
                code="INVALID_ARGUMENT",
            )

    _each(document, "linux.namespaces", check_namespaces)
    _each(document, "linux.rootfsPropagation", check_propagation)
    for place, why in REFUSED.items():
        _each(document, place, refuse(why, "UNIMPLEMENTED"))
    if guest_selinux:
        for place in _SELINUX:
            _each(document, place, refuse("the guest has no SELinux policy", "UNIMPLEMENTED"))


def drop(document: dict[str, Any]) -> list[str]:
    """Take what has no meaning in the guest out of `document`; a line for the log for each field."""
    lines: list[str] = []
    for place, why in DROPPED.items():

        def visit(parent: dict[str, Any], key: str, where: str, why: str = why) -> None:
            del parent[key]
            lines.append(f"{where} ({why})")

        _each(document, place, visit)
    for kind in ("bounding", "effective", "inheritable", "permitted", "ambient"):
        _each(document, f"process.capabilities.{kind}", functools.partial(_drop_unknown, lines))
    return lines


def _drop_unknown(lines: list[str], parent: dict[str, Any], key: str, where: str) -> None:
    """Capabilities that are none: runc leaves them out too, with a warning."""
    names = parent[key]
    parent[key] = [name for name in names if name.upper() in CAPABILITIES]
    lines += [
        f"{where} {name[:40]} (no such capability)" for name in names if name.upper() not in CAPABILITIES
    ]


def take_beyond(document: dict[str, Any]) -> dict[str, Any]:
    """Move what the agent's protocol has no field for out of `document`, into one of the same shape."""
    taken: dict[str, Any] = {}
    for place in BEYOND:

        def visit(parent: dict[str, Any], key: str, where: str) -> None:
            *steps, _ = where.split(".")
            target = taken
            for step in steps:
                target = target.setdefault(step, {})
            target[key] = parent.pop(key)

        _each(document, place, visit, zero=True)
    return taken


def _each(document: object, place: str, visit: _Visit, *, zero: bool = False) -> None:
    """Call `visit(parent, key, where)` for each value at `place` that is not empty; 0 only if `zero`."""
    *steps, key = place.split(".")
    found: list[tuple[object, str]] = [(document, "")]
    for step in steps:
        name = step.removesuffix("[]")
        below: list[tuple[object, str]] = []
        for parent, where in found:
            value = parent.get(name) if isinstance(parent, Mapping) else None
            if step == name:
                below.append((value, f"{where}{name}."))
            elif isinstance(value, list):
                below += [(item, f"{where}{name}[{index}].") for index, item in enumerate(value)]
        found = below
    for parent, where in found:
        if not isinstance(parent, dict):
            continue
        value = parent.get(key)
        # Zero can be a request of its own: umask 0 is not the same as no umask.
        if value or (zero and value == 0 and value is not False):
            visit(parent, key, where + key)
