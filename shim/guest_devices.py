"""Device nodes and device rules of an OCI spec, as far as they can mean the same in the guest.

What: `check_devices` refuses the nodes that cannot be given to a container in a VM; `guest_nodes` and
`guest_rules` turn nodes and cgroup rules into those for the guest.
Why: a device's number is the kernel's that gave it out. Numbers that Linux registers (null, fuse, tun)
are the same in every kernel; the others, and all of block devices, name something else in the guest,
or nothing.
Invariants: a node never reaches the guest under a number that may be another device there; a rule
about a number that is not the guest's is left out, and listed. A node that somebody asked for is
refused; of a privileged container, for which containerd lists whatever the host has, it is left out
and listed.
Source: Documentation/admin-guide/devices.txt; drivers/char/misc.c (dynamic minors), fs/char_dev.c
(dynamic majors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.errors import CallerError

__all__ = ["check_devices", "guest_nodes", "guest_rules"]

MAX_DEVICES = 1024

_MISC = 10
_DYNAMIC_MAJORS = (range(234, 255), range(384, 512))


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
        if not _meant_for_guest(device) and not _privileged(spec):
            what = "block device" if kind == "b" else "character device"
            raise CallerError(
                f"config.json: {place}: {path[:200]} is a {what} of the host ({major}:{minor}), "
                "which the guest does not have",
                phase="bundle",
                hint="leave it out of the container's devices",
                code="UNIMPLEMENTED",
            )


def _meant_for_guest(device: Mapping[str, Any]) -> bool:
    kind = device["type"]
    return kind == "p" or (kind != "b" and _registered(device.get("major", 0), device.get("minor", 0)))


def _privileged(spec: Mapping[str, Any]) -> bool:
    """A rule opens all devices: then containerd lists those of the host without being asked for each."""
    rules = ((spec.get("linux") or {}).get("resources") or {}).get("devices") or []
    return any(
        isinstance(rule, Mapping) and rule.get("allow") is True and (rule.get("type") or "a") == "a"
        for rule in rules
    )


def guest_nodes(devices: list[dict[str, Any]], left_out: list[str]) -> list[dict[str, Any]]:
    """linux.devices for the guest, after `check_devices`."""
    kept = [device for device in devices if _meant_for_guest(device)]
    left_out += [f"linux.devices {device['path']}" for device in devices if device not in kept]
    return kept


def guest_rules(rules: list[dict[str, Any]], left_out: list[str]) -> list[dict[str, Any]]:
    """linux.resources.devices for the guest. The agent's protocol says "any" with -1."""
    kept = []
    for index, rule in enumerate(rules):
        kind = rule.get("type") or "a"
        major, minor = (-1 if rule.get(key) is None else rule[key] for key in ("major", "minor"))
        named = isinstance(major, int) and major >= 0
        if (kind == "b" and named) or (kind == "c" and named and not _registered(major, minor)):
            left_out.append(f"linux.resources.devices[{index}] (the host's {kind} {major}:{minor})")
        else:
            kept.append({**rule, "major": major, "minor": minor})
    return kept


def _wrong(text: str) -> CallerError:
    return CallerError(f"config.json: {text}", phase="bundle", code="INVALID_ARGUMENT")
