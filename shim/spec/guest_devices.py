"""Device nodes and device rules of an OCI spec, as far as they can mean the same in the guest.

What: `check_devices` refuses the nodes that cannot be given to a container in a VM; `host_devices` are those
of the host that have to be plugged into the VM for it; `guest_nodes` and `guest_rules` turn nodes and cgroup
rules into those for the guest.
Why: a device's number is the kernel's that gave it out. Numbers that Linux registers (null, fuse, tun)
are the same in every kernel; the others name something else in the guest, or nothing. What is plugged keeps
the host's number here: the agent puts the guest's in its place, in nodes and rules alike.
Invariants: a node never reaches the guest under a number that may be another device there; a rule
about a number that is not the guest's is left out, and listed. A node that somebody asked for is
refused; of a privileged container, for which containerd lists whatever the host has, it is left out
and listed.
Source: Documentation/admin-guide/devices.txt; drivers/char/misc.c (dynamic minors), fs/char_dev.c
(dynamic majors).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from devices.config import IoLimits
from devices.errors import CallerError
from shim.spec.device_rules import DeviceRules, device_rules

__all__ = [
    "HostDevice",
    "check_devices",
    "guest_nodes",
    "guest_rules",
    "host_devices",
    "may_have_vfio",
    "take_limits",
    "vfio_nodes",
]

SYSFS = "/sys"

MAX_RATE = 10**15  # a second; more is no limit
_THROTTLES = {
    "throttleReadBpsDevice": "read_bytes",
    "throttleWriteBpsDevice": "write_bytes",
    "throttleReadIOPSDevice": "read_ops",
    "throttleWriteIOPSDevice": "write_ops",
}
_MISC = 10
_DYNAMIC_MAJORS = (range(234, 255), range(384, 512))


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A node of the spec that stands for a device of the host. `path`: where the container finds it; `kind`:
    "b"; `access`: what its rules allow, of "r", "w" and "m"; `limits`: those that the spec has for it."""

    path: str
    kind: str
    major: int
    minor: int
    access: frozenset[str]
    limits: IoLimits | None = None

    @property
    def number(self) -> tuple[str, int, int]:
        """As rules name it."""
        return self.kind, self.major, self.minor


def _registered(major: int, minor: int) -> bool:
    """The character device has this number in every Linux. Minor -1: all of the major's."""
    if major == _MISC:
        return minor == 1 or 128 <= minor < 255
    return major > 0 and not any(major in dynamic for dynamic in _DYNAMIC_MAJORS)


def _nodes(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (spec.get("linux") or {}).get("devices") or []
    return found


def check_devices(spec: Mapping[str, Any]) -> None:
    """Raise CallerError for the first of linux.devices that the guest cannot have, by its path. Blocks."""
    privileged = device_rules(spec).open
    for index, device in enumerate(_nodes(spec)):
        place = f"linux.devices[{index}]"
        path, kind = device.get("path", ""), device.get("type", "")
        if not path.startswith("/"):
            raise _wrong(f"{place} needs an absolute path")
        if kind not in {"b", "c", "u", "p"}:
            raise _wrong(f"{place}.type of {path[:200]} must be b, c, u or p, not {kind[:20]!r}")
        if not (privileged or _meant_for_guest(device) or _plugged(device) or _vfio_node(device)):
            raise CallerError(
                f"config.json: {place}: {path[:200]} is a character device of the host"
                f" ({device.get('major', 0)}:{device.get('minor', 0)}), which the guest does not have",
                phase="bundle",
                hint="leave it out of the container's devices",
                code="UNIMPLEMENTED",
            )


def _meant_for_guest(device: Mapping[str, Any]) -> bool:
    kind = device["type"]
    return kind == "p" or (kind != "b" and _registered(device.get("major", 0), device.get("minor", 0)))


def _plugged(device: Mapping[str, Any]) -> bool:
    """What can be plugged into the VM: disks."""
    return bool(device["type"] == "b")


def host_devices(spec: Mapping[str, Any]) -> list[HostDevice]:
    """The disks of the host that this container is to have, after `check_devices`. Blocks.

    Of a privileged container only those that somebody asked for: with a rule of their own, or at another path
    than the host's. containerd lists all that the host has, and a VM that takes the host's disks is a choice.
    """
    return _asked_for(spec, _plugged)


def may_have_vfio(spec: Mapping[str, Any]) -> bool:
    """Whether `vfio_nodes` may find one: nobody is asked."""
    return any(_may_be_vfio(node) for node in _nodes(spec))


def vfio_nodes(spec: Mapping[str, Any], sysfs: str = "") -> list[tuple[str, str]]:
    """The devices of VFIO, likewise: where the container has it, and the host's name for it. By its number,
    since the path is the container's choice. Blocks."""
    found = _asked_for(spec, lambda node: bool(_vfio_node(node, sysfs)))
    return [
        (one.path, _vfio_node({"type": one.kind, "major": one.major, "minor": one.minor}, sysfs))
        for one in found
    ]


def _asked_for(spec: Mapping[str, Any], wanted: Callable[[Mapping[str, Any]], bool]) -> list[HostDevice]:
    nodes = [node for node in _nodes(spec) if wanted(node)]
    if not nodes:
        return []
    rules = device_rules(spec)
    limits = _limits(((spec.get("linux") or {}).get("resources") or {}).get("blockIO") or {})
    found = [_host_device(node, rules, limits) for node in nodes]
    return [one for one in found if not rules.open or rules.name(*one.number) or _is_elsewhere(one)]


def _host_device(
    node: Mapping[str, Any], rules: DeviceRules, limits: Mapping[tuple[int, int], IoLimits]
) -> HostDevice:
    kind, major, minor = node["type"], node.get("major", 0), node.get("minor", 0)
    access = rules.access(kind, major, minor)
    return HostDevice(node["path"], kind, major, minor, access, limits.get((major, minor)))


def _limits(block_io: Mapping[str, Any]) -> dict[tuple[int, int], IoLimits]:
    """linux.resources.blockIO.throttle*Device by the numbers of their devices."""
    found: dict[tuple[int, int], dict[str, int]] = {}
    for key, field in _THROTTLES.items():
        for entry in block_io.get(key) or []:
            number = entry.get("major", 0), entry.get("minor", 0)
            found.setdefault(number, {})[field] = min(entry.get("rate", 0), MAX_RATE)
    return {number: IoLimits(**rates) for number, rates in found.items() if any(rates.values())}


def take_limits(resources: dict[str, Any], plugged: Collection[HostDevice]) -> None:
    """Take the limits that the VMM keeps out of linux.resources.blockIO: the guest's numbers are others."""
    block_io = resources.get("blockIO")
    if not block_io:
        return
    mine = {(device.major, device.minor) for device in plugged}
    for key in _THROTTLES:
        entries = block_io.get(key) or []
        block_io[key] = [one for one in entries if (one.get("major", 0), one.get("minor", 0)) not in mine]
        if not block_io[key]:
            del block_io[key]


def _is_elsewhere(device: HostDevice) -> bool:
    """The host has it, but not at this path."""
    kind = "block" if device.kind == "b" else "char"
    if not os.path.exists(f"{SYSFS}/dev/{kind}/{device.major}:{device.minor}"):
        return False  # it was there when containerd made its list
    try:
        number = os.stat(device.path).st_rdev
    except OSError:
        return True
    return number != os.makedev(device.major, device.minor)


def _may_be_vfio(device: Mapping[str, Any]) -> bool:
    return device["type"] in ("c", "u") and not _registered(device.get("major", 0), device.get("minor", 0))


def _vfio_node(device: Mapping[str, Any], sysfs: str = "") -> str:
    """The host's name of a device of VFIO, "" of everything else."""
    if not _may_be_vfio(device):
        return ""
    from devices.vfio import is_vfio_node, node_name

    name = node_name(device.get("major", 0), device.get("minor", 0), sysfs or SYSFS)
    return name if is_vfio_node(name) else ""


def guest_nodes(
    devices: list[dict[str, Any]], left_out: list[str], plugged: Collection[HostDevice] = ()
) -> list[dict[str, Any]]:
    """linux.devices for the guest, after `check_devices`. `plugged`: those of the host that it gets."""
    paths = {device.path for device in plugged}
    kept = []
    for device in devices:
        if _meant_for_guest(device) or device["path"] in paths:
            kept.append(device)
        else:
            left_out.append(f"linux.devices {device['path']}")
    return kept


def guest_rules(
    rules: list[dict[str, Any]], left_out: list[str], plugged: Collection[HostDevice] = ()
) -> list[dict[str, Any]]:
    """linux.resources.devices for the guest. The agent's protocol says "any" with -1."""
    kept = []
    numbers = {device.number for device in plugged}
    for index, rule in enumerate(rules):
        kind = rule.get("type") or "a"
        major, minor = rule.get("major", -1), rule.get("minor", -1)
        named = major >= 0
        unknown = (kind == "b" and named) or (kind == "c" and named and not _registered(major, minor))
        if unknown and (kind, major, minor) not in numbers:
            left_out.append(f"linux.resources.devices[{index}] (the host's {kind} {major}:{minor})")
        else:
            kept.append({**rule, "major": major, "minor": minor})
    have = {(rule.get("type"), rule["major"], rule["minor"]) for rule in kept}
    for device in plugged:  # allowed by a rule about many of the host's
        if device.number not in have and device.access:
            have.add(device.number)
            number = {"type": device.kind, "major": device.major, "minor": device.minor}
            kept.append({"allow": True, **number, "access": "".join(sorted(device.access))})
    return kept


def _wrong(text: str) -> CallerError:
    return CallerError(f"config.json: {text}", phase="bundle", code="INVALID_ARGUMENT")
