"""What one VM under QEMU is made of: its processes, connections and devices, as far as it got.

Why a value of its own: starting, hot-plug and death are modules apart, and all three work on the same
parts.
Invariants: a part is here from the moment it exists; `Qemu.cleanup` releases every part that is here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from devices.child import Child
from devices.console import Console
from devices.share_fs import Virtiofsd
from devices.vsock import HybridVsock, KernelVsock
from devices.vsock_daemon import VsockDaemon
from hypervisors.qemu.cmdline import Placed
from hypervisors.qemu.qmp import QmpClient

__all__ = ["Parts"]


@dataclass(slots=True)
class Parts:
    """See the module's docstring. `vhost_fd` is kernel vsock's descriptor, -1 without."""

    placed: list[Placed] = field(default_factory=list)
    daemons: list[Child] = field(default_factory=list)
    vsock: VsockDaemon | None = None
    share_fs: Virtiofsd | None = None
    vhost_fd: int = -1
    console: Console | None = None
    channel: HybridVsock | KernelVsock | None = None
    process: Child | None = None
    qmp: QmpClient | None = None

    async def end_daemons(self) -> None:
        """Stop vsock daemon and virtiofsd. Idempotent."""
        if self.vsock is not None:
            await self.vsock.stop()
        if self.share_fs is not None:
            await self.share_fs.stop()

    def diagnostics(self) -> dict[str, str]:
        """See `Hypervisor.diagnostics`."""
        evidence = {"vmm stderr": self.process.stderr_tail() if self.process else ""}
        evidence["virtiofsd stderr"] = self.share_fs.stderr_tail() if self.share_fs else ""
        evidence["vhost-device-vsock stderr"] = self.vsock.child.stderr_tail() if self.vsock else ""
        evidence["guest console"] = self.console.tail() if self.console else ""
        return {name: text for name, text in evidence.items() if text}
