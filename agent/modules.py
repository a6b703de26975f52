"""Kernel modules by modprobe.

What: `modprobe` loads one and waits for the program's end, which the reaper sees.
Invariants: the name never looks like an option; the wait ends at `DEADLINE`.
"""

from __future__ import annotations

from agent.programs import run_program
from agent.reaper import Reaper
from ttrpc import Code, RpcError

__all__ = ["modprobe"]

DEADLINE = 30.0  # seconds


async def modprobe(reaper: Reaper, name: str, *parameters: str) -> int:
    """modprobe's exit code. `name` may be an alias. Raises RpcError if it cannot be run or does not end."""
    if not name or name.startswith("-"):
        raise RpcError(Code.INVALID_ARGUMENT, f"kernel module {name[:60]!r}")
    return await run_program(reaper, ["/sbin/modprobe", name, *parameters], DEADLINE)
