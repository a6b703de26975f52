"""What one VM is made of, whose VMM is a process of ours: that process, who serves it, and what it says.

What: `VmParts`, filled as far as the VM got; a driver adds its own.
Why a value of its own: starting, hot-plug and death are modules apart, and all work on the same parts.
Invariants: a part is here from the moment it exists; who cleans up releases every part that is here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devices.child import Child, process_memory, process_stat
from devices.console import Console
from devices.vsock import AgentChannel
from hypervisors.helpers import Helpers

if TYPE_CHECKING:  # who needs it has h11 loaded
    from hypervisors.http_api import HttpApi

__all__ = ["VmParts"]


@dataclass(slots=True)
class VmParts:
    """See the module's docstring. `daemons`: those that every VM needs; `helpers` serve single devices.
    `api`: of a VMM that has such a one. `answers`: the VMM has answered on its control connection.
    `orderly`: what its end with code 0 means."""

    process: Child | None = None
    daemons: list[Child] = field(default_factory=list)
    helpers: Helpers = field(default_factory=Helpers)
    console: Console | None = None
    channel: AgentChannel | None = None
    api: HttpApi | None = None
    answers: bool = False
    orderly: str = ""

    async def end_daemons(self) -> None:
        """Stop what serves the VM. Idempotent. Raises HostError for what the kernel does not end."""
        await self.helpers.end_all()

    async def close(self) -> None:
        """Give back all but the VMM itself, which has ended. Idempotent. Raises as `end_daemons`, last."""
        try:
            await self.end_daemons()
        finally:
            for part in (self.channel, self.api):
                if part is not None:
                    await part.close()
            if self.console is not None:
                self.console.close()

    def drain(self) -> None:
        """Read what was said last, without waiting: for the moment after the VMM's death."""
        if self.console is not None:
            self.console.drain()

    def last_words(self) -> str:
        """The VMM's own."""
        return self.process.stderr_tail() if self.process else ""

    def words(self) -> dict[str, str]:
        """What was said last by whom there is besides, by a name of it."""
        return {}

    def diagnostics(self) -> dict[str, str]:
        """See `Hypervisor.diagnostics`."""
        evidence = {"vmm stderr": self.process.stderr_tail() if self.process else ""}
        evidence |= self.helpers.evidence() | self.words()
        evidence["guest console"] = self.console.tail() if self.console else ""
        return {name: text for name, text in evidence.items() if text}

    def pids(self) -> list[int]:
        """See `Hypervisor.get_pids`."""
        children = [self.process, *self.daemons]
        ours = [child.pid for child in children if child is not None and child.alive]
        return ours + self.helpers.pids()

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
