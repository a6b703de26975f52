"""How a process ended, by the guest's word, or that nobody will ever know.

What: `exit_status` waits for the end of one process in the guest.
Why apart: it races the agent's answer against the death of the VM and the clock of a SIGKILL, and takes any
failure for an answer: whatever goes wrong, an exit must be told.
Invariants: it returns within moments of the VM's death, and at the latest when the guest's time after a
SIGKILL is over (`Process.condemn`): neither a guest whose kernel cannot end a process (seen: an init that
waits for a child which is dead already), nor one that stands still, nor an agent that lies may keep a
container from being stopped. It raises nothing but for its own cancellation.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Any, NamedTuple

import structlog

from devices.errors import GuestError
from shim.protocols import VM_DEATH, Sandbox
from shim.tasks.process import Process

__all__ = ["KILLED", "Ended", "Word", "exit_status"]

KILLED = 128 + 9
"""Exit status of what SIGKILL has ended."""

_log = structlog.get_logger("container")


class Word(enum.Enum):
    """Who says that it has ended."""

    GUEST = "the guest"
    LOST = "nobody: the VM is gone, or its agent"
    OVERDUE = "we do: the guest's time is over"


class Ended(NamedTuple):
    """`status` 0..255; `by`: whose word it is."""

    status: int
    by: Word


async def exit_status(sandbox: Sandbox, process: Process) -> Ended:
    """The guest's status; `VM_DEATH` when the guest died or lost it; `KILLED` when it was to be killed and
    the guest did not, or it went with a VM that was ended for that."""
    call = asyncio.create_task(_ask(sandbox, process))
    killed = asyncio.create_task(process.killed.wait())
    either: list[asyncio.Future[Any]] = [call, sandbox.died]
    try:
        await asyncio.wait([*either, killed], return_when=asyncio.FIRST_COMPLETED)
        if not call.done() and not sandbox.died.done():
            left = process.guests_until - asyncio.get_running_loop().time()
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED, timeout=max(0.0, left))
        if call.cancelled():
            raise GuestError("the wait for it was given up")  # by somebody else, or we would not be here
        if call.done():
            return Ended(call.result(), Word.GUEST)
        if sandbox.died.done():
            return Ended(VM_DEATH, Word.LOST)
        return Ended(KILLED, Word.OVERDUE)
    except Exception as error:  # noqa: BLE001  (whatever went wrong, the exit must be told)
        _log.warning("the exit status is lost", process=process.name, error=str(error))
        ours = process.killed.is_set() and not sandbox.died.done()
        return Ended(KILLED if ours else VM_DEATH, Word.LOST)
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
