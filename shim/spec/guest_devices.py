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

__all__ = [
    "HostDevice",
    "check_devices",
    "guest_nodes",
    "guest_rules",
    "host_devices",
    "take_limits",
    "vfio_nodes",
]

MAX_DEVICES = 1024
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


def check_devices(spec: Mapping[str, Any]) -> None:
    """Raise CallerError for the first of linux.devices that cannot be had in the guest, by its path."""
    devices = (spec.get("linux") or {}).get("devices") or []
    if not isinstance(devices, list) or len(devices) > MAX_DEVICES:
        raise _wrong(f"linux.devices must be a list of at most {MAX_DEVICES}")
    for index, device in enumerate(devices):
        place = f"linux.devices[{index}]"
        path = device.get("path") if isinstance(device, Mapping) else None
        if not isinstance(path, str) or not path.startswith("/"):
            raise _wrong(f"{place} needs an absolute path")
        kind, major, minor = device.get("type"), device.get("major", 0), device.get("minor", 0)
        if kind not in {"b", "c", "u", "p"}:
            raise _wrong(f"{place}.type of {path[:200]} must be b, c, u or p, not {str(kind)[:20]!r}")
        if not isinstance(major, int) or not isinstance(minor, int):
            raise _wrong(f"{place} ({path[:200]}) needs whole numbers")
        passed_on = _plugged(device) or bool(_vfio_node(device))
        if not _meant_for_guest(device) and not passed_on and not _privileged(spec):
            raise CallerError(
                f"config.json: {place}: {path[:200]} is a character device of the host ({major}:{minor}), "
                "which the guest does not have",
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
    """The disks of the host that this container is to have, after `check_devices`.

    Of a privileged container only those that somebody asked for: with a rule of their own, or at another path
    than the host's. containerd lists all that the host has, and a VM that takes the host's disks is a choice.
    """
    return _asked_for(spec, _plugged)


def vfio_nodes(spec: Mapping[str, Any], sysfs: str = "") -> list[tuple[str, str]]:
    """The devices of VFIO, likewise: where the container has it, and the host's name for it. By its number,
    since the path is the container's choice."""
    found = _asked_for(spec, lambda node: bool(_vfio_node(node, sysfs)))
    return [
        (one.path, _vfio_node({"type": one.kind, "major": one.major, "minor": one.minor}, sysfs))
        for one in found
    ]


def _asked_for(spec: Mapping[str, Any], wanted: Callable[[Mapping[str, Any]], bool]) -> list[HostDevice]:
    linux = spec.get("linux") or {}
    rules = [
        rule for rule in (linux.get("resources") or {}).get("devices") or [] if isinstance(rule, Mapping)
    ]
    privileged = _privileged(spec)
    found = []
    for node in linux.get("devices") or []:
        if not wanted(node):
            continue
        device = HostDevice(
            node["path"],
            node["type"],
            node.get("major", 0),
            node.get("minor", 0),
            _access(node, rules),
            _limits(node, (linux.get("resources") or {}).get("blockIO") or {}),
        )
        if not privileged or any(_names(rule, node) for rule in rules) or _is_elsewhere(device):
            found.append(device)
    return found


def _access(node: Mapping[str, Any], rules: list[Mapping[str, Any]]) -> frozenset[str]:
    """What the rules, the last of which counts, leave of the device."""
    allowed: set[str] = set()
    for rule in rules:
        numbers = (rule.get("major"), rule.get("minor"))
        wanted = (node.get("major", 0), node.get("minor", 0))
        if (rule.get("type") or "a") in ("a", node["type"]) and all(
            number in (None, -1, mine) for number, mine in zip(numbers, wanted, strict=True)
        ):
            what = set(str(rule.get("access") or "rwm"))
            allowed = allowed | what if rule.get("allow") is True else allowed - what
    return frozenset(allowed & {"r", "w", "m"})


def _limits(node: Mapping[str, Any], block_io: Mapping[str, Any]) -> IoLimits | None:
    """linux.resources.blockIO.throttle*Device of this device. Raises CallerError for rates that are none."""
    found = {}
    for key, field in _THROTTLES.items():
        for entry in block_io.get(key) or []:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("rate"), int) or entry["rate"] < 0:
                raise _wrong(f"linux.resources.blockIO.{key} needs whole rates")
            if (entry.get("major"), entry.get("minor")) == (node.get("major", 0), node.get("minor", 0)):
                found[field] = min(entry["rate"], MAX_RATE)
    return IoLimits(**found) if any(found.values()) else None


def take_limits(resources: dict[str, Any], plugged: Collection[HostDevice]) -> None:
    """Take the limits that the VMM keeps out of linux.resources.blockIO: the guest's numbers are others."""
    block_io = resources.get("blockIO")
    if not isinstance(block_io, dict):
        return
    mine = {(device.major, device.minor) for device in plugged}
    for key in _THROTTLES:
        entries = block_io.get(key) or []
        block_io[key] = [one for one in entries if (one.get("major"), one.get("minor")) not in mine]
        if not block_io[key]:
            del block_io[key]


def _names(rule: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    mine = (node["type"], node.get("major", 0), node.get("minor", 0))
    return rule.get("allow") is True and (rule.get("type"), rule.get("major"), rule.get("minor")) == mine


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


def _vfio_node(device: Mapping[str, Any], sysfs: str = "") -> str:
    """The host's name of a device of VFIO, "" of everything else."""
    major, minor = device.get("major", 0), device.get("minor", 0)
    if device["type"] not in ("c", "u") or _registered(major, minor):
        return ""
    from devices.vfio import is_vfio_node, node_name

    name = node_name(major, minor, sysfs or SYSFS)
    return name if is_vfio_node(name) else ""


def _privileged(spec: Mapping[str, Any]) -> bool:
    """A rule opens all devices: then containerd lists those of the host without being asked for each."""
    rules = ((spec.get("linux") or {}).get("resources") or {}).get("devices") or []
    return any(
        isinstance(rule, Mapping) and rule.get("allow") is True and (rule.get("type") or "a") == "a"
        for rule in rules
    )


def guest_nodes(
    devices: list[dict[str, Any]], left_out: list[str], plugged: Collection[HostDevice] = ()
) -> list[dict[str, Any]]:
    """linux.devices for the guest, after `check_devices`. `plugged`: those of the host that it gets."""
    paths = {device.path for device in plugged}
    kept = [device for device in devices if _meant_for_guest(device) or device["path"] in paths]
    left_out += [f"linux.devices {device['path']}" for device in devices if device not in kept]
    return kept


def guest_rules(
    rules: list[dict[str, Any]], left_out: list[str], plugged: Collection[HostDevice] = ()
) -> list[dict[str, Any]]:
    """linux.resources.devices for the guest. The agent's protocol says "any" with -1."""
    kept = []
    numbers = {device.number for device in plugged}
    for index, rule in enumerate(rules):
        kind = rule.get("type") or "a"
        major, minor = (-1 if rule.get(key) is None else rule[key] for key in ("major", "minor"))
        named = isinstance(major, int) and major >= 0
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
