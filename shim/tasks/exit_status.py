"""How a process ended, by the guest's word, or that nobody will ever know.

What: `exit_status` waits for the end of one process in the guest.
Why apart: it races the agent's answer against the death of the VM, and takes any failure for an answer:
whatever goes wrong, an exit must be told.
Invariants: it returns within moments of the VM's death, and within `KILL_LIMIT` of a SIGKILL that the
guest took: a guest whose kernel cannot end a process (seen: an init that waits for a child which is
dead already) must not keep a pod from being stopped. It raises nothing but for its own cancellation.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from shim.protocols import Sandbox
from shim.tasks.process import Process

__all__ = ["KILL_LIMIT", "exit_status"]

KILL_LIMIT = 20.0
"""Seconds from a SIGKILL to the exit, at most; a process that writes to a slow disk may take some."""
_KILLED = 128 + 9

_log = structlog.get_logger("container")


async def exit_status(sandbox: Sandbox, process: Process) -> int | None:
    """0..255; None when the guest died or lost it. 137 when it was killed and the guest cannot end it."""
    call = asyncio.create_task(_ask(sandbox, process))
    killed = asyncio.create_task(process.killed.wait())
    either: list[asyncio.Future[Any]] = [call, sandbox.died]
    try:
        await asyncio.wait([*either, killed], return_when=asyncio.FIRST_COMPLETED)
        if not call.done() and not sandbox.died.done():
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED, timeout=KILL_LIMIT)
        if call.done():
            return call.result()
        if sandbox.died.done():
            return None
        _log.error("the guest does not end it; its exit is told without", process=process.name)
        return _KILLED
    except Exception as error:  # noqa: BLE001  (whatever went wrong, the exit must be told)
        _log.warning("the exit status is lost", process=process.name, error=str(error))
        return None
    finally:
        call.cancel()
        killed.cancel()
        await asyncio.wait([call, killed])


async def _ask(sandbox: Sandbox, process: Process) -> int:
    if not sandbox.direct_stdio:
        # A stock agent forgets the process with WaitProcess, and its last output with it. Its
        # reads end half a second after the exit, so a pipe held open by others holds up nobody.
        assert process.stdio is not None
        await process.stdio.until_output_ends()
    return await sandbox.agent.wait_process(process.container_id, process.exec_id)
