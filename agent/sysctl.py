"""Kernel settings of the pod's network, which is the guest's.

What: `take_network` moves the `net.*` settings out of a container's spec, `apply` writes them.
Why: the shim leaves the network namespace out of the spec, because the VM stands for it; the OCI
runtime in the guest then refuses `net.*`, which it takes for the whole machine's. Here the machine is
the pod. All other settings stay with the OCI runtime, which allows what belongs to a namespace of the
container and refuses the rest, as on a host.
Invariants: nothing outside /proc/sys/net is opened, whatever the name.
Source: sysctl(8) for the two ways to write a name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ttrpc import Code, RpcError

__all__ = ["apply", "take_network"]

_ROOT = "/proc/sys"


def take_network(linux: dict[str, Any]) -> dict[str, str]:
    """Remove the `net.*` settings from the spec's `linux.sysctl`; answers them as path -> value.

    Raises INVALID_ARGUMENT for a name that is no path below /proc/sys/net.
    """
    wanted: dict[str, str] = linux.get("sysctl", {})
    taken = {}
    for name in [name for name in wanted if name.replace("/", ".").startswith("net.")]:
        parts = _parts(name)
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            raise RpcError(Code.INVALID_ARGUMENT, f"sysctl {name[:80]!r} is no name of a kernel setting")
        taken["/".join(parts)] = wanted.pop(name)
    return taken


def _parts(name: str) -> list[str]:
    """The separator is whichever of `.` and `/` comes first; the other one stands for it inside a part."""
    if name.find("/") == len("net"):
        return name.split("/")
    return [part.replace("/", ".") for part in name.split(".")]


def apply(settings: Mapping[str, str], root: str = _ROOT) -> None:
    """Write them. Raises INVALID_ARGUMENT with the kernel's word for the first that it refuses."""
    from agent.memory_limits import leave

    for path, value in settings.items():
        leave(path)
        try:
            with open(os.path.join(root, path), "w", encoding="utf-8") as file:
                file.write(value)
        except OSError as error:
            name = path.replace("/", ".")
            text = f"sysctl {name[:80]} = {value[:80]!r}: {error.strerror}"
            raise RpcError(Code.INVALID_ARGUMENT, text) from None
