"""Fitting an OCI config to this guest: what depends on the kernel, the devices and the sizes here.

What: `merge` adds the fields that came beside Kata's messages; `fit` checks character devices, drops
limits of page sizes and sets of CPUs that do not exist here, and turns what crun knows by cgroup v1
names only into cgroup v2's.
Why here: the host cannot know; crun would fail with an errno that names nothing.
Invariants: a device is never made under a number that no driver here serves; a limit is only dropped
when nothing could exceed it, a device only of a container to which all devices are open; a set of
CPUs holds as a whole or, if it names the host's, not at all.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from agent import log
from agent.privileged import opens_all
from agent.reaper import Reaper
from ttrpc import Code, RpcError

__all__ = [
    "LOOPBACK",
    "METADATA",
    "NETWORK",
    "NOTHING",
    "beyond",
    "cpu_weight",
    "fit",
    "fit_resources",
    "merge",
]

#: The metadata of a call in which OCI fields travel that Kata's messages have no place for.
METADATA = "kata-shim-oci"
#: A feature: UpdateRoutes and UpdateInterface take more than Kata's messages hold (`agent.network`).
NETWORK = "kata-shim-network"
#: A feature: what the pod's localhost is dialled for is carried to the guest's (proto/loopback.proto).
LOOPBACK = "kata-shim-loopback"

_CHAR_DEVICES = "/sys/dev/char"
_HUGEPAGES = "/sys/kernel/mm/hugepages"
_ONLINE_CPUS = "/sys/devices/system/cpu/online"
_ONLINE_NODES = "/sys/devices/system/node/online"
_MAX_NUMBER = 8191  # the most CPUs that Linux can be built for
_MODPROBE_DEADLINE = 30.0
_UNITS = {"KB": 1, "MB": 1 << 10, "GB": 1 << 20}

Json = dict[str, Any]

NOTHING: Mapping[str, Any] = {}


def beyond(metadata: Mapping[str, Sequence[str]]) -> Json:
    """What came in a call's metadata, in the shape of config.json. Raises INVALID_ARGUMENT."""
    found: Json = {}
    for text in metadata.get(METADATA, ()):
        try:
            part = json.loads(text)
            if not isinstance(part, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"metadata {METADATA}: {error}") from None
        merge(found, part)
    return found


def merge(target: Json, more: Mapping[str, Any]) -> None:
    """Put all values of `more` into `target`, object by object."""
    for key, value in more.items():
        here = target.get(key)
        if isinstance(value, Mapping) and isinstance(here, dict):
            merge(here, value)
        else:
            target[key] = value


async def fit(config: Json, reaper: Reaper) -> None:
    """Change a whole config in place. Raises INVALID_ARGUMENT for a device that is not here."""
    linux = config["linux"]
    resources = linux.setdefault("resources", {})
    if opens_all(linux):
        _leave_out_devices(linux)
    for device in linux.get("devices", []):
        if not _is_here(device):
            await _load_char_device(device, reaper)
    fit_resources(resources)


def fit_resources(resources: Json, hugepages: str = _HUGEPAGES) -> None:
    """Change `linux.resources` in place, of a config or of an update."""
    limits = resources.get("hugepageLimits")
    if limits:
        resources["hugepageLimits"] = [each for each in limits if _has_page_size(each, hugepages)]
    cpu = resources.get("cpu", {})
    for key, path in (("cpus", _ONLINE_CPUS), ("mems", _ONLINE_NODES)):
        wanted = cpu.get(key)
        if wanted and not _numbers(wanted) <= _numbers(_read(path)):
            # Numbers of the host, as a kubelet with the static policy sends to everybody.
            log.debug(f"linux.resources.cpu.{key} {wanted[:80]}: not all of them are here; left out")
            del cpu[key]
    if "shares" in cpu and not cpu.get("idle"):  # an idle one has no weight, and takes none after that
        weight = str(cpu_weight(cpu.pop("shares")))
        resources.setdefault("unified", {}).setdefault("cpu.weight", weight)
    burst = cpu.pop("burst", None)
    if burst is not None:
        resources.setdefault("unified", {}).setdefault("cpu.max.burst", str(burst))


def cpu_weight(shares: int) -> int:
    """cgroup v1's CPU shares (2..262144) on the scale of v2's weight (1..10000), along a straight line.

    Not left to crun: 1.8 and 1.21 go by this line, 1.28 by a curve, and what is created must not have
    another weight than what is updated.
    """
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


def _numbers(text: str) -> set[int]:
    """A kernel's list of numbers, "0-3,7". Raises INVALID_ARGUMENT."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) > _MAX_NUMBER:
            raise RpcError(Code.INVALID_ARGUMENT, f"linux.resources.cpu: {text[:80]!r} is no list of numbers")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # a kernel without NUMA has one node, and does not say so
        return "0"


def _has_page_size(limit: Json, hugepages: str) -> bool:
    size = str(limit["pageSize"])
    number, unit = size[:-2], _UNITS.get(size[-2:])
    if not number.isdigit() or unit is None:
        raise RpcError(Code.INVALID_ARGUMENT, f"linux.resources.hugepageLimits: page size {size[:20]!r}")
    if os.path.isdir(f"{hugepages}/hugepages-{int(number) * unit}kB"):
        return True
    log.debug(f"no pages of {size} here, so their limit holds by itself")
    return False


def _leave_out_devices(linux: Json) -> None:
    """Of a privileged container: its list is whatever the host has, and nobody asked for each."""
    devices = linux.get("devices", [])
    linux["devices"] = [device for device in devices if _is_here(device)]
    missing = [device["path"] for device in devices if device not in linux["devices"]]
    if missing:
        log.error(f"devices of the host that are not here: {' '.join(missing)}")


def _is_here(device: Json) -> bool:
    """A driver serves this character device; the other kinds are made by crun without one."""
    if device["type"] not in ("c", "u"):
        return True
    return os.path.exists(f"{_CHAR_DEVICES}/{device['major']}:{device['minor']}")


async def _load_char_device(device: Json, reaper: Reaper) -> None:
    """Raises INVALID_ARGUMENT if there is no driver for it."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        # What the kernel itself would ask for at the first open.
        argv = ["/sbin/modprobe", "-q", f"char-major-{device['major']}-{device['minor']}"]
        _, ended = reaper.spawn(argv, env={"PATH": "/usr/sbin:/sbin"}, stdin=null, stdout=null, stderr=null)
        await asyncio.wait_for(ended, _MODPROBE_DEADLINE)
    except OSError as error:
        log.debug(f"modprobe: {error}")
    finally:
        os.close(null)
    if not _is_here(device):
        number = f"{device['major']}:{device['minor']}"
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"linux.devices: the guest has no character device {number} for {device['path'][:200]}",
        )
