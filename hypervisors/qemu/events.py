"""What is awaited of QEMU's events when something is plugged, unplugged or resized.

Invariants: these are predicates for `QmpClient.expect`; whatever shape an event has, they do not raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypervisors.qemu.qmp import QmpEvent

__all__ = ["deleted", "let_go", "port_opened", "size_is", "taken"]

Match = Callable[[QmpEvent], bool]

_EJECT = (0x3, 0x103)  # what an _OST is about: a request to eject, by the host or by the guest itself
_UNDER_WAY = (0x0, 0x84)  # its status: done (DEVICE_DELETED tells, too); begun, which Linux says first


def deleted(device_id: str) -> Match:
    """The guest let go of the device, and QEMU forgot it."""
    return _event("DEVICE_DELETED", "device", device_id)


def let_go(device_id: str) -> Match:
    """The guest let go of a vCPU or a DIMM (DEVICE_DELETED), or will not (anything else)."""
    gone = deleted(device_id)
    kept = [_event(name, "device", device_id) for name in ("DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR")]

    def refused(event: QmpEvent) -> bool:
        info = _ost(event)
        return (
            info is not None
            and info.get("device") == device_id
            and info.get("source") in _EJECT
            and info.get("status") not in _UNDER_WAY
        )

    return lambda event: gone(event) or refused(event) or any(match(event) for match in kept)


def port_opened(event: QmpEvent) -> bool:
    """The guest has opened a port of virtio-serial."""
    data = event.get("data")
    return event.get("event") == "VSERPORT_CHANGE" and isinstance(data, dict) and data.get("open") is True


def size_is(device_id: str, size: int) -> Match:
    """A virtio-mem device has reached this size."""
    changed = _event("MEMORY_DEVICE_SIZE_CHANGE", "id", device_id)
    return lambda event: changed(event) and event["data"].get("size") == size


def taken(device_id: str) -> Match:
    """The guest's ACPI driver has dealt with a vCPU or a DIMM; data.info.status says how."""

    def match(event: QmpEvent) -> bool:
        info = _ost(event)
        return info is not None and info.get("device") == device_id and info.get("source") not in _EJECT

    return match


def _ost(event: QmpEvent) -> dict[str, Any] | None:
    """What the guest's ACPI driver reports, if it does."""
    data = event.get("data")
    info = data.get("info") if isinstance(data, dict) else None
    return info if event.get("event") == "ACPI_DEVICE_OST" and isinstance(info, dict) else None


def _event(name: str, key: str, value: str) -> Match:
    def match(event: QmpEvent) -> bool:
        data = event.get("data")
        return event.get("event") == name and isinstance(data, dict) and data.get(key) == value

    return match
