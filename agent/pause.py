"""The sandbox's own container: a pause that is part of the guest, whatever its image holds.

What: `is_own` tells the container that only holds a pod together; `own_config` makes of its spec one
that runs the guest's `pause` (guest/pause.c) from a root file system of its own, 600 bytes read-only.
Why: the image's program would do nothing else, and would have to be pulled, mounted and shared first;
a pod then does not depend on any file from outside to live on, nor runs one as PID 1 of its processes.
Invariants: nothing of the image is read or executed; names, namespaces, limits, user and seccomp filter
are those that were asked for; capabilities are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ROOT", "is_own", "own_config"]

ROOT = "/usr/lib/kata-agent/pause"
"""Its root file system in the guest's image: the program, and directories for what is mounted."""

_TYPE = "io.katacontainers.pkg.oci.container_type"
_OWN = "pod_sandbox"
# Mounted in it: what crun needs to make a container at all.
_MOUNTS = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "noexec", "mode=755", "size=64k"],
    },
)


def is_own(annotations: Mapping[str, str]) -> bool:
    """Whether a container with these annotations is the sandbox's own, which runs no program of its image."""
    return annotations.get(_TYPE) == _OWN


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the sandbox's own container, from that of the one that was asked for."""
    process = config["process"]
    linux = config["linux"]
    made: dict[str, Any] = {
        **config,
        "root": {"path": ROOT, "readonly": True},
        "process": {
            "terminal": process["terminal"],
            "user": process["user"],
            "args": ["/pause"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "mounts": [dict(mount) for mount in _MOUNTS],
        "linux": {key: value for key, value in linux.items() if key not in _OF_THE_IMAGE},
    }
    if "oomScoreAdj" in process:
        made["process"]["oomScoreAdj"] = process["oomScoreAdj"]
    made.pop("hooks", None)  # startContainer hooks are programs of the image
    if all(entry["type"] != "uts" for entry in linux["namespaces"]):
        made.pop("domainname", None)
        made.pop("hostname", None)  # the pod uses the guest's, which has got this name already
    return made


# Keys of `linux` that speak of files which are not there.
_OF_THE_IMAGE = frozenset({"devices", "maskedPaths", "readonlyPaths", "rootfsPropagation", "mountLabel"})
