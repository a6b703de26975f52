"""The loss of a VM: that it is gone without our asking, or as good as gone, told once.

What: `Loss.watch_vm` sees the VMM's end, `watch_agent` the end of the agent's connection; `give_up` ends a VM
of which nothing good can come. All three resolve `died`.
Why one: whoever waits for anything in the guest waits for `died` too, and needs one reason, the best of all.
Invariants: `died` resolves once, when the VM is gone; a stop that was asked for is none. An agent whose
connection is gone can never be asked again, and what ran in its VM has been told as ended: no such VM lives
on. A VM's own end explains its agent's, if it comes within `_GATHER` seconds.
"""

from __future__ import annotations

import asyncio

import structlog

from devices.errors import GuestError, HypervisorError, KataError
from hypervisors.base import Hypervisor
from shim.sandbox.agent_client import GuestAgent

__all__ = ["Loss"]

_GATHER = 1.0

_log = structlog.get_logger("sandbox")


class Loss:
    """One VM's. `died` resolves to the reason. `asked` is set by who stops the VM: from then on its end is
    none; `agent` by who connects to it: its calls end with the VM."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.asked = False
        self.agent: GuestAgent | None = None

    @property
    def lives(self) -> bool:
        """Neither lost nor stopped."""
        return not self.asked and not self.died.done()

    async def watch_vm(self) -> None:
        """Until the VMM has ended."""
        ended = await self._hypervisor.wait_vm()
        if ended.expected or self.died.done():
            return
        details = {
            "vmm stderr": ended.stderr_tail,
            "guest console": ended.console_tail,
            **self._hypervisor.diagnostics(),  # its daemons' words, too
        }
        reason = str(HypervisorError(ended.reason, phase="vm", details=details))
        _log.error("the VM is gone", reason=reason, code=ended.code)
        await self._tell(reason)

    async def watch_agent(self) -> None:
        """Until its connection has ended."""
        assert self.agent is not None
        await self.agent.lost()
        await asyncio.wait([self.died], timeout=_GATHER)
        await self.give_up("the connection to the agent ended, and its VM ran on")

    async def give_up(self, why: str) -> None:
        """End the VM, and have it died."""
        if not self.lives:
            return
        error = GuestError(why, phase="vm", code="UNAVAILABLE", details=self._hypervisor.diagnostics())
        _log.error("the VM is given up", reason=str(error))
        try:
            await self._hypervisor.stop_vm()
        except (KataError, OSError) as held:  # a process that the kernel holds; `stop` and `delete` try again
            _log.error("the VM did not stop", error=str(held))
        if not self.asked:
            await self._tell(str(error))

    async def _tell(self, reason: str) -> None:
        if not self.died.done():
            self.died.set_result(reason)
        if self.agent is not None:
            await self.agent.close()
