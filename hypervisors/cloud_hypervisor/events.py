"""What Cloud Hypervisor says by itself: its event monitor, a pipe.

What: `Events` cuts the stream into events, passes each on, and tells whoever waits that a device has gone.
Why: a request to remove a device is answered at once, and only an event says that the guest has let go; a
guest's reset shows nowhere else, since the VM goes on in the same process.
Invariants: reading never blocks; an event is an object over several lines, the last of which is a brace
alone; one longer than `LIMIT` is dropped; what is no event is passed over.
Source: seen with Cloud Hypervisor 53.0 (pretty-printed JSON, an empty line after each).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from devices import foreign_json

__all__ = ["LIMIT", "Events"]

LIMIT = 64 << 10  # bytes
_READ_SIZE = 64 << 10


class Events:
    """See the module's docstring. `fd`: the reading end, owned from here on; `on_event` gets an event's
    name, "vm/rebooting", and the id of the device that it is about, "" without one."""

    def __init__(self, fd: int, on_event: Callable[[str, str], None]) -> None:
        self._fd = fd
        self._on_event = on_event
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._partial = b""
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self.read)

    def removal(self, device_id: str) -> asyncio.Future[None]:
        """Done when the device has gone; the same one until then. Ask before it is told to go."""
        return self._waiting.setdefault(device_id, asyncio.get_running_loop().create_future())

    def forget(self, device_id: str) -> None:
        """Nobody waits any more. Idempotent."""
        self._waiting.pop(device_id, None)

    def close(self) -> None:
        """Stop reading. Idempotent."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def read(self) -> None:
        """Take what is there, without waiting."""
        try:
            data = os.read(self._fd, _READ_SIZE) if self._fd >= 0 else b""
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        *ended, self._partial = (self._partial + data).split(b"\n}")
        self._partial = self._partial[:LIMIT]
        for text in ended:
            self._see(text + b"\n}")

    def _see(self, text: bytes) -> None:
        try:
            event: Any = foreign_json.loads(text)
        except ValueError:
            return
        if not isinstance(event, dict):
            return
        name = f"{event.get('source')}/{event.get('event')}"[:100]
        properties = event.get("properties")
        subject = properties.get("id") if isinstance(properties, dict) else None
        device_id = subject if isinstance(subject, str) else ""
        if name == "vm/device-removed" and device_id in self._waiting and not self._waiting[device_id].done():
            self._waiting[device_id].set_result(None)
        self._on_event(name, device_id)
