"""Device nodes of a container whose own files cannot hold any.

What: `apart` tells which nodes crun would make in the root file system; if that is virtio-fs, `place` makes
them, and has crun bind them instead; `remove` takes them away.
Why: the host's virtiofsd makes no device nodes for a guest (docs/volumes.md). Nearly every container has a
tmpfs at /dev and nothing is to be done; a spec without one, and devices at paths elsewhere (of a Kubernetes
`volumeDevices`), would fail. runc does the same in a user namespace, where nobody can make nodes either.
Invariants: the nodes lie in the guest's memory, root's alone, one directory for each container; each has the
number, owner and mode of the spec. What the container sees at the path is the node, its root file system
keeps an empty file there.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from typing import Any

__all__ = ["NODES", "apart", "place", "remove"]

NODES = "/dev/.kata"
_VIRTIOFS = "virtiofs"
_MOUNTINFO = "/proc/self/mountinfo"
# What crun gives every container (runtime-spec, "Default Devices").
_DEFAULTS = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
_MODE = 0o666
_OPTIONS = ["bind", "rprivate", "nosuid", "noexec"]

Json = dict[str, Any]


def apart(config: Json) -> list[Json]:
    """The nodes that crun would make among the container's files: none, nearly always."""
    if config["linux"].get("uidMappings"):  # crun binds them all itself
        return []
    return [device for device in _wanted(config["linux"]) if not _is_memory(device["path"], config["mounts"])]


def place(
    config: Json, devices: Sequence[Json], name: str, *, nodes: str = NODES, mountinfo: str = _MOUNTINFO
) -> None:
    """Make those of `apart`, unless the root file system can hold them, and have this config.json bind them
    instead. Blocks. Raises OSError; `remove` undoes it."""
    if not _is_shared(config.get("root", {}).get("path", "/"), mountinfo):
        return
    os.makedirs(f"{nodes}/{name}", 0o700)
    for number, device in enumerate(devices):
        node = f"{nodes}/{name}/{number}"
        kind = stat.S_IFBLK if device["type"] == "b" else stat.S_IFCHR
        os.mknod(node, kind | 0o600, os.makedev(device["major"], device["minor"]))
        os.chown(node, device.get("uid", 0), device.get("gid", 0))
        os.chmod(node, stat.S_IMODE(device.get("fileMode") or _MODE))
        mount = {"destination": device["path"], "type": "bind", "source": node, "options": list(_OPTIONS)}
        config["mounts"].append(mount)
    linux = config["linux"]
    linux["devices"] = [device for device in linux.get("devices", ()) if device not in devices]


def remove(name: str, *, nodes: str = NODES) -> None:
    """Undo `place`. Blocks."""
    shutil.rmtree(f"{nodes}/{name}", ignore_errors=True)


def _wanted(linux: Json) -> list[Json]:
    """The nodes that crun would make: the spec's, and the usual ones that the spec does not name."""
    given = [device for device in linux.get("devices", ()) if device["type"] in ("b", "c", "u")]
    paths = {os.path.normpath(device["path"]) for device in given}
    return given + [
        {"path": f"/dev/{name}", "type": "c", "major": major, "minor": minor}
        for name, (major, minor) in _DEFAULTS.items()
        if f"/dev/{name}" not in paths
    ]


def _is_memory(path: str, mounts: Sequence[Json]) -> bool:
    """Whether the mount that will be there is none of the host's files, but a file system of the guest's."""
    path = os.path.normpath(path)
    above = [each for each in mounts if f"{path}/".startswith(f"{os.path.normpath(each['destination'])}/")]
    if not above:
        return False
    nearest = max(above, key=lambda each: len(os.path.normpath(each["destination"])))
    if nearest.get("type") != "bind" and not {"bind", "rbind"} & set(nearest.get("options", ())):
        return True
    return f"{nearest.get('source', '')}/".startswith("/dev/")


def _is_shared(root: str, mountinfo: str) -> bool:
    """Whether the root file system is the host's, by virtio-fs."""
    number = os.stat(root).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        return any(line.split(" ")[2] == device for line in file if f" - {_VIRTIOFS} " in line)
