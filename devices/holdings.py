"""Which devices a container uses: taken one by one, let go of all at once.

What: `Holdings.take` plugs a device, or counts one more user of it, and remembers for whom; `release` lets go
of all that somebody took.
Why apart: volumes, nodes and swap all plug for a container, and whatever fails afterwards (the agent, a hook)
ends in one `release`.
Invariants: what was plugged is held before `take` returns; `release` goes on past errors, and what does not
go then is the device manager's to finish (`devices.manager`): nobody holds it any more.
"""

from __future__ import annotations

from devices.config import DeviceConfig
from devices.device import DeviceHost
from devices.errors import KataError
from devices.manager import DeviceManager

__all__ = ["Holdings"]


class Holdings:
    """The plugged devices of one sandbox, by owner (a container's id)."""

    def __init__(self, devices: DeviceManager, host: DeviceHost) -> None:
        self._devices = devices
        self._host = host
        self._held: dict[str, list[str]] = {}

    async def take(self, owner: str, config: DeviceConfig) -> str:
        """Plug it for the owner, or use what is plugged for the same source; its id. Raises KataError."""
        name = await self._devices.try_add_device(config, self._host)
        self._held.setdefault(owner, []).append(name)
        return name

    def holds(self, owner: str) -> bool:
        """Whether it has taken anything."""
        return bool(self._held.get(owner))

    async def release(self, owner: str) -> list[Exception]:
        """Let go of all that the owner took, the last first; the errors on the way. Idempotent."""
        errors: list[Exception] = []
        for name in reversed(self._held.pop(owner, [])):
            try:
                await self._devices.try_remove_device(name, self._host)
            except KataError as error:
                errors.append(error)
        return errors
