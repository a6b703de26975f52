"""What is awaited of QEMU's events when something is plugged, unplugged or resized.

Invariants: these are predicates for `QmpClient.expect`; whatever shape an event has, they do not raise.
"""

from __future__ import annotations

from collections.abc import Callable

from hypervisors.qemu.qmp import QmpEvent

__all__ = ["deleted", "size_changed", "taken"]

Match = Callable[[QmpEvent], bool]


def deleted(device_id: str) -> Match:
    """The guest let go of the device, and QEMU forgot it."""
    return _event("DEVICE_DELETED", "device", device_id)


def size_changed(device_id: str) -> Match:
    """A virtio-mem device has another size."""
    return _event("MEMORY_DEVICE_SIZE_CHANGE", "id", device_id)


def taken(device_id: str) -> Match:
    """The guest's ACPI driver has dealt with a vCPU or a DIMM; data.info.status says how."""

    def match(event: QmpEvent) -> bool:
        data = event.get("data")
        info = data.get("info") if isinstance(data, dict) else None
        return (
            event.get("event") == "ACPI_DEVICE_OST"
            and isinstance(info, dict)
            and info.get("device") == device_id
        )

    return match


def _event(name: str, key: str, value: str) -> Match:
    def match(event: QmpEvent) -> bool:
        data = event.get("data")
        return event.get("event") == name and isinstance(data, dict) and data.get(key) == value

    return match
