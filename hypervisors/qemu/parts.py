"""What one VM under QEMU is made of: its processes, connections and devices, as far as it got.

What: `Parts`, QEMU's own beside those of every VM (`hypervisors.parts`).
Invariants: a part is here from the moment it exists; `Qemu.cleanup` releases every part that is here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from devices.vsock_daemon import VsockDaemon
from hypervisors.parts import VmParts
from hypervisors.qemu.qmp import QmpClient
from hypervisors.qemu.recipes import Placed

__all__ = ["Parts"]


@dataclass(slots=True)
class Parts(VmParts):
    """See the module's docstring. `vhost_fd` is kernel vsock's descriptor, -1 without. `files`: of disks, by
    device, until QEMU has them. `locked`: bytes that QEMU must be able to lock."""

    placed: list[Placed] = field(default_factory=list)
    vsock: VsockDaemon | None = None
    vhost_fd: int = -1
    qmp: QmpClient | None = None
    files: dict[str, int] = field(default_factory=dict)
    locked: int = 0
    _fdsets: Iterator[int] = field(default_factory=lambda: count(1))

    def keep(self, device_id: str, file: int) -> int:
        """Keep a disk's descriptor open until `let_go`; a number for it in QEMU, never given twice."""
        self.let_go(device_id)
        self.files[device_id] = file
        return next(self._fdsets)

    def let_go(self, device_id: str) -> None:
        """QEMU has its file, or will not get it. Idempotent."""
        file = self.files.pop(device_id, -1)
        if file >= 0:
            os.close(file)

    def let_all_go(self) -> None:
        """QEMU has inherited all files, or there will be none. Idempotent."""
        for device_id in list(self.files):
            self.let_go(device_id)

    async def close(self) -> None:
        """See `VmParts.close`."""
        try:
            await VmParts.close(self)  # no super(): a dataclass with slots is made anew
        finally:
            if self.qmp is not None:
                await self.qmp.close()
            if self.vhost_fd >= 0:
                os.close(self.vhost_fd)
                self.vhost_fd = -1
            self.let_all_go()

    async def end_daemons(self) -> None:
        """Stop the vsock daemon and what serves the devices, each whatever becomes of the others. Idempotent.
        Raises HostError for the first that the kernel does not end."""
        ends = [self.helpers.end_all()]
        if self.vsock is not None:
            ends.append(self.vsock.stop())
        for ended in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    def words(self) -> dict[str, str]:
        """The vsock daemon's."""
        return {"vhost-device-vsock stderr": self.vsock.child.stderr_tail() if self.vsock else ""}
