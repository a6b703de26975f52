"""Who serves a device of a VM from outside of its VMM: a vhost-user back end, watched.

What: `Helper`, one of them, our own daemon or somebody else's; `Helpers`, those of one VM by device id: they
are added when a device is prepared, their loss is told, and they end with their device.
Why: QEMU 7.2 and Cloud Hypervisor 53 say nothing when a back end goes, and the guest then waits for its
answers for ever.
Invariants:
- A disk or a shared directory that nobody serves any more is the end of the VM: `on_loss` is told why. A
  network card is not: the VMM takes its carrier away, and that is logged.
- A loss while the device comes or goes is none, unless it is there afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import structlog

from devices.config import DeviceConfig
from devices.kinds import Kind

__all__ = ["Helper", "Helpers"]

_log = structlog.get_logger("helpers")


class Helper(Protocol):
    """One back end."""

    @property
    def lost(self) -> asyncio.Future[Any]:
        """Done when it went by itself."""
        ...

    def describe_loss(self) -> str:
        """One sentence, once `lost` is done."""
        ...

    def evidence(self) -> dict[str, str]:
        """What it said, by a name of it."""
        ...

    @property
    def inside(self) -> bool:
        """Whether it is a part of this process."""
        ...

    @property
    def pids(self) -> list[int]:
        """Its processes, as far as they are ours and alive."""
        ...

    def handed_over(self) -> None:
        """The VMM has its connection: our copy may go, unless it is needed."""
        ...

    def abort(self) -> None:
        """End whatever the VMM waits for from it. Idempotent."""
        ...

    async def stop(self) -> None:
        """Let go of it, or end it if it is ours. Idempotent."""
        ...


class Helpers:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.on_loss: Callable[[str], None] = _ignore
        self._all: dict[str, tuple[DeviceConfig, Helper]] = {}
        self._unsettled: set[str] = set()
        self._said: dict[str, str] = {}

    def add(self, device: DeviceConfig, helper: Helper) -> None:
        """Watch it from now on."""
        self._all[device.id] = (device, helper)
        helper.lost.add_done_callback(lambda _: self._look(device.id, helper))

    def of(self, device_id: str) -> Helper | None:
        """The one of this device, if it has one."""
        return self._all[device_id][1] if device_id in self._all else None

    @contextlib.contextmanager
    def unsettled(self, device_id: str) -> Iterator[None]:
        """While its device comes or goes nothing is a loss; what happened is one if it stays."""
        self._unsettled.add(device_id)
        try:
            yield
        finally:
            self._unsettled.discard(device_id)
            helper = self.of(device_id)
            if helper is not None and helper.lost.done():
                self._look(device_id, helper)

    async def end(self, device_id: str) -> None:
        """Its device is gone, or never came. One without a helper is fine."""
        _, helper = self._all.pop(device_id, (None, None))
        if helper is not None:
            await helper.stop()

    async def end_all(self) -> None:
        """The VM is gone; what they said is kept. Idempotent."""
        self._said = self.evidence()
        ends = [self.end(device_id) for device_id in list(self._all)]
        for ended in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    def handed_over(self) -> None:
        """The VMM has started, and has all connections."""
        for _, helper in self._all.values():
            helper.handed_over()

    def pids(self) -> list[int]:
        """Of those that are ours."""
        return [pid for _, helper in self._all.values() for pid in helper.pids]

    def processes(self) -> dict[str, int]:
        """The pids of those that are processes of ours, by device id."""
        return {name: helper.pids[0] for name, (_, helper) in self._all.items() if helper.pids}

    def served_inside(self) -> str:
        """A device whose back end runs in this process, "" if there is none."""
        return next((name for name, (_, helper) in self._all.items() if helper.inside), "")

    def evidence(self) -> dict[str, str]:
        """Everybody's words."""
        said = dict(self._said)
        for _, helper in self._all.values():
            said |= helper.evidence()
        return said

    def _look(self, device_id: str, helper: Helper) -> None:
        if self.of(device_id) is not helper or device_id in self._unsettled or helper.lost.cancelled():
            return
        device, reason = self._all[device_id][0], helper.describe_loss()
        if device.kind is Kind.VHOST_USER_NET:
            _log.error("a network card has lost its back end", device=device_id, reason=reason)
        else:
            self.on_loss(reason)


def _ignore(_: str) -> None:
    """Before the start a loss shows in what the start meets."""
