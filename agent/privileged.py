"""What a container with more rights than usual finds in the guest: kernel modules, and device nodes.

What: `furnish` loads what nobody asks the kernel for in a way that it could answer, and gives a container to
which all devices are open the nodes of those that the guest has.
Why: iptables' older half, ip_tables, is loaded by no socket option; where it is missing the program calls
modprobe, which finds no modules in a container. And a privileged container expects /dev/fuse and /dev/loop0:
the host's list of nodes, if it comes at all, is of the host's devices.
Why here and not at boot: few containers have such rights, and each module costs every guest time and memory.
Invariants: a container without these rights gets nothing; a node is only added where the spec has none at its
path; what cannot be loaded is logged, and is not there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any

from agent import log
from agent.threads import in_thread

__all__ = ["furnish", "nodes", "opens_all"]

_XTABLES = ("ip_tables", "ip6_tables", "arp_tables")
_DEVICES = ("fuse", "loop", "tun")
# crun makes these, or they are no devices of a container: terminals and mounts of the guest's own.
_NOT = frozenset({"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero"})
_OWN_FOLDERS = frozenset({".kata", "mqueue", "pts", "shm"})
_MOST = 512

Json = dict[str, Any]


def opens_all(linux: Json) -> bool:
    """A rule opens all devices: that is what engines mean by privileged."""
    rules = linux.get("resources", {}).get("devices", [])
    return any(rule["allow"] and rule.get("type", "a") == "a" for rule in rules)


async def furnish(config: Json) -> None:
    """Change a config in place."""
    capabilities = config["process"].get("capabilities", {})
    everything = opens_all(config["linux"])
    modules = [*_XTABLES] if "CAP_NET_ADMIN" in capabilities.get("bounding", ()) else []
    modules += _DEVICES if everything else ()
    if modules:
        from agent.insmod import load

        await in_thread("loading modules", lambda: load(modules))
    if everything:
        devices = config["linux"].setdefault("devices", [])
        taken = {device["path"] for device in devices}
        devices += [node for node in nodes() if node["path"] not in taken][:_MOST]


def nodes(directory: str = "/dev") -> Iterator[Json]:
    """The device nodes below it as linux.devices has them, but for terminals and what every container has."""
    waiting = [""]
    while waiting:
        below = waiting.pop(0)
        try:
            entries = sorted(os.scandir(directory + below), key=lambda entry: entry.name)
        except OSError as error:
            log.debug(f"{directory}{below}: {error.strerror}")
            continue
        for entry in entries:
            path, info = f"{below}/{entry.name}", entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                waiting += [path] if below or entry.name not in _OWN_FOLDERS else []
            elif stat.S_IFMT(info.st_mode) in (stat.S_IFCHR, stat.S_IFBLK) and (
                below or _is_a_device(entry.name)
            ):
                yield {
                    "path": f"/dev{path}",
                    "type": "b" if stat.S_ISBLK(info.st_mode) else "c",
                    "major": os.major(info.st_rdev),
                    "minor": os.minor(info.st_rdev),
                    "fileMode": stat.S_IMODE(info.st_mode),
                    "uid": info.st_uid,
                    "gid": info.st_gid,
                }


def _is_a_device(name: str) -> bool:
    return name not in _NOT and not name.startswith(("tty", "vcs"))
