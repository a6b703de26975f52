"""How a saved VM begins: its configuration, with what is at another place now.

What: `restoring` makes what vm.restore is told: a directory of our own with the configuration that was saved,
changed, and links to the state and the memory, which stay as they are.
Invariants: what was saved has the same devices, by their ids, or nothing is started; only paths and sockets
change. Cards need their taps' descriptors again, in the order in which they are named.
Source: Cloud Hypervisor 53.0: config.json, state.json, memory-ranges, as seen.
"""

from __future__ import annotations

import json  # to write; what is read goes through foreign_json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from devices import foreign_json
from devices.config import BlockConfig, DeviceConfig, NetworkConfig
from devices.errors import HypervisorError

__all__ = ["forget", "restoring"]

_CONFIG, _OTHERS = "config.json", ("state.json", "memory-ranges")
_LIMIT = 1 << 20  # bytes of a configuration
_KEYS = ("disks", "net", "fs", "devices")


def restoring(
    path: str, state_dir: str, devices: Mapping[str, DeviceConfig], sockets: Mapping[str, str]
) -> tuple[dict[str, Any], list[int]]:
    """The body of vm.restore and the descriptors beside it. Raises HypervisorError. Blocks."""
    folder = _folder(state_dir)
    try:
        with open(f"{path}/{_CONFIG}", "rb") as file:
            made = foreign_json.loads(file.read(_LIMIT))
        known = _known(made)
        cards = _changed(known, devices, sockets)
        os.makedirs(folder)
        with open(f"{folder}/{_CONFIG}", "w", encoding="utf-8") as copy:
            copy.write(json.dumps(made))
        for name in _OTHERS:
            os.symlink(os.path.realpath(f"{path}/{name}"), f"{folder}/{name}")
    except (OSError, ValueError) as error:
        raise HypervisorError(
            f"{path} holds no VM that was saved: {error}", phase="restore", code="FAILED_PRECONDITION"
        ) from error
    body: dict[str, Any] = {"source_url": f"file://{folder}", "resume": True}
    if cards:
        body["net_fds"] = [{"id": card.id, "num_fds": len(card.tap_fds)} for card in cards]
    return body, [fd for card in cards for fd in card.tap_fds]


def forget(state_dir: str) -> None:
    """It has been read. Idempotent."""
    shutil.rmtree(_folder(state_dir), ignore_errors=True)


def _folder(state_dir: str) -> str:
    return f"{state_dir}/restore"


def _known(made: Any) -> dict[str, dict[str, Any]]:
    """The devices of a configuration, by id. Raises ValueError for another shape."""
    if not isinstance(made, dict):
        raise ValueError("its configuration is no object")
    found = [one for key in _KEYS for one in made.get(key) or []] + [made.get("vsock") or {}]
    if not all(isinstance(one, dict) for one in found):
        raise ValueError("its configuration has devices of another shape")
    return {str(one["id"]): one for one in found if "id" in one}


def _changed(
    known: dict[str, dict[str, Any]], devices: Mapping[str, DeviceConfig], sockets: Mapping[str, str]
) -> list[NetworkConfig]:
    """Put what is at another place into the configuration; its cards, in its order."""
    if missing := sorted(set(known) - set(devices)):
        raise ValueError(f"it was saved with {', '.join(missing)}, which this VM has not")
    for name, one in known.items():
        device = devices[name]
        if isinstance(device, BlockConfig):
            one["path"] = device.path
        elif name in sockets:
            one["vhost_socket" if "vhost_socket" in one else "socket"] = sockets[name]
    ordered = [devices[name] for name in known]
    return [device for device in ordered if isinstance(device, NetworkConfig)]
