"""What one VM under QEMU is made of: its processes, connections and devices, as far as it got.

Why a value of its own: starting, hot-plug and death are modules apart, and all three work on the same
parts.
Invariants: a part is here from the moment it exists; `Qemu.cleanup` releases every part that is here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from devices.child import Child, process_memory, process_stat
from devices.console import Console
from devices.share_fs import Virtiofsd
from devices.vsock import HybridVsock, KernelVsock
from devices.vsock_daemon import VsockDaemon
from hypervisors.qemu.qmp import QmpClient
from hypervisors.qemu.recipes import Placed

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

    def pids(self) -> list[int]:
        """See `Hypervisor.get_pids`."""
        children = [self.process, *self.daemons]
        return [child.pid for child in children if child is not None and child.alive]

    def metrics(self) -> dict[str, float]:
        """See `Hypervisor.get_hypervisor_metrics`."""
        tick = os.sysconf("SC_CLK_TCK")
        metrics = {"cpu_seconds_total": 0.0, "resident_bytes": 0.0, "processes": 0.0}
        for index, pid in enumerate(self.pids()):
            with contextlib.suppress(ProcessLookupError):
                fields = process_stat(pid)
                own, shared = process_memory(pid)
                metrics["cpu_seconds_total"] += (int(fields[11]) + int(fields[12])) / tick
                metrics["resident_bytes"] += own + (0 if index else shared)
                metrics["processes"] += 1
        return metrics
