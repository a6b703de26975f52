"""How a VM ends whose VMM is a process of ours: who died first, what is told, and that everybody hears it.

What: `Death` watches the VMM and its daemons, ends the others when one dies, and resolves `ended` once.
Why: they live and die together. A VM whose virtiofsd is gone can only hang, so the death of any of
them is the death of the VM, told once with everybody's last words.
Invariants: `ended` resolves after the VMM is reaped and its daemons are killed, or when the kernel has not
ended them ten seconds after SIGKILL; before the watch begins it resolves by `settle` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import structlog

from devices.child import Child
from devices.errors import HypervisorError, KataError
from hypervisors.base import VmExit
from hypervisors.config import SandboxSection
from hypervisors.parts import VmParts

__all__ = ["GATHER", "Death"]

GATHER = 0.25
"""Seconds in which one death follows from another."""

_log = structlog.get_logger("vmm")


class Death:
    """See the module's docstring. `stopping` is set by who ends the VM on purpose. `vmm`: its name, and its
    section's."""

    def __init__(self, section: SandboxSection, parts: VmParts, *, vmm: str, name: str) -> None:
        self.ended: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()
        self.stopping = False
        self._section = section
        self._parts = parts
        self._vmm = vmm
        self._name = name
        self._shutdown_reason = ""
        self._lost: asyncio.Future[str] = self.ended.get_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None

    def begin(self, name: str) -> None:
        """The VMM runs: watch it and its daemons, in a task of this name."""
        self._watcher = asyncio.create_task(self._watch(), name=name)

    async def told(self) -> None:
        """Return when the end is known: `stop_vm` killed the VMM, or it was never started."""
        if self._watcher is not None:
            await asyncio.wait({self._watcher})
        elif not self.ended.done():
            await self._parts.end_daemons()
            self.settle(VmExit(-9, f"{self._vmm} was never started", expected=True))

    def lose(self, reason: str) -> None:
        """Somebody is gone whom the VM cannot do without; the first time counts."""
        if not self._lost.done():
            self._lost.set_result(reason)

    def guest_ends(self, how: str) -> None:
        """Remember what the VMM says of the guest: it ended the VM by itself, and how."""
        self.ends(f"the guest ended the VM ({how[:50]})")

    def ends(self, reason: str) -> None:
        """Remember why the VMM is about to end in good order."""
        self._shutdown_reason = reason

    async def _watch(self) -> None:
        """Wait for the first death, end the others, tell everybody."""
        parts = self._parts
        assert parts.process is not None
        exits: set[asyncio.Future[Any]] = {child.exited for child in (parts.process, *parts.daemons)}
        await asyncio.wait(exits | {self._lost}, return_when=asyncio.FIRST_COMPLETED)
        first, lost = None, ""
        if parts.process.alive:
            first = next((one for one in parts.daemons if not one.alive), None)
            lost = self._lost.result() if self._lost.done() else ""
        if (first is not None or lost) and not self.stopping:
            # Either the daemon died and the VMM follows or hangs, or it is ending in good order and has
            # closed the daemon's socket first: its own end a moment later tells which.
            await asyncio.wait({parts.process.exited}, timeout=GATHER)
        hung = parts.process.alive
        await _past_errors(parts.process.kill())
        parts.drain()
        await _past_errors(parts.end_daemons())
        reason = self._reason(parts.process, first, lost, hung)
        ended = VmExit(
            code=-9 if parts.process.alive else parts.process.exited.result(),
            reason="the VM was stopped" if self.stopping else reason,
            stderr_tail=parts.last_words(),
            console_tail=parts.console.tail() if parts.console else "",
            expected=self.stopping,
        )
        if not self.stopping:
            _log.error("the VM died", reason=reason, stderr=ended.stderr_tail)
        self.settle(ended)

    def _reason(self, process: Child, first: Child | None, lost: str, hung: bool) -> str:
        """One sentence. `first`: the daemon that died before the VMM; `lost`: what else went before it;
        `hung`: the VMM outlived that by far."""
        panic = self._parts.console.panic() if self._parts.console else ""
        if panic:
            return f"the guest kernel panicked: {panic}"
        if self._shutdown_reason:
            return self._shutdown_reason
        if not process.alive and process.exited.result() == 0 and self._parts.orderly:
            return self._parts.orderly
        if process.alive:
            return f"{process.name} did not end by SIGKILL; {lost or 'it was to be stopped'}"
        if (first is None and not lost) or (not hung and process.exited.result() < 0):
            return f"{process.name} {process.describe()}"
        if first is None:
            return lost if hung else f"{lost}, then {process.name} {process.describe()}"
        if hung or first.exited.result() != 0:
            return f"{first.name} {first.describe()}"
        return f"{first.name} {first.describe()}, then {process.name} {process.describe()}"

    def settle(self, ended: VmExit) -> None:
        """Tell everybody, once."""
        if not self.ended.done():
            self.ended.set_result(ended)
        if self._parts.channel is not None:
            self._parts.channel.fail(lambda: self.error(ended))

    def error(self, ended: VmExit) -> KataError:
        """A new error each time: several callers may raise it."""
        hint, section = "", f"[hypervisor.{self._name}]"
        files = ((key, getattr(self._section, key)) for key in ("kernel", "initrd", "image"))
        guest = ", ".join(f"{key} = {path}" for key, path in files if path)
        panicked = self._parts.console is not None and self._parts.console.panic()
        if ended.expected:
            pass
        elif panicked or self._shutdown_reason:
            hint = f"see the guest's last lines; check {section}: {guest}, rootfs_type, kernel_params"
        elif ended.code > 0 and not self._parts.answers:
            hint = f"see {self._vmm}'s message; check {section}: {guest}, and the other keys"
        elif ended.code < 0:
            hint = "see the kernel log of the host: out of memory, or killed by somebody"
        return HypervisorError(
            f"the VM is gone: {ended.reason}", phase="boot", hint=hint, details=self._parts.diagnostics()
        )


async def _past_errors(ending: Awaitable[None]) -> None:
    """A process that the kernel holds (HostError) must not keep the end of the others from being told."""
    try:
        await ending
    except KataError as error:
        _log.error("not ended", error=str(error))
