"""Kernel modules by modprobe.

What: `modprobe` loads one and waits for the program's end, which the reaper sees.
Invariants: the name never looks like an option; the wait ends at `DEADLINE`.
"""

from __future__ import annotations

import asyncio
import os

from agent.reaper import Reaper
from ttrpc import Code, RpcError

__all__ = ["modprobe"]

DEADLINE = 30.0  # seconds


async def modprobe(reaper: Reaper, name: str, *parameters: str) -> int:
    """modprobe's exit code. `name` may be an alias. Raises RpcError if it cannot be run or does not end."""
    if not name or name.startswith("-"):
        raise RpcError(Code.INVALID_ARGUMENT, f"kernel module {name[:60]!r}")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        _, ended = reaper.spawn(
            ["/sbin/modprobe", name, *parameters],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=null,
            stdout=null,
            stderr=null,
        )
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"cannot run modprobe: {error.strerror}") from None
    finally:
        os.close(null)
    try:
        return await asyncio.wait_for(ended, DEADLINE)
    except TimeoutError:
        raise RpcError(
            Code.DEADLINE_EXCEEDED, f"modprobe {name[:60]} did not end within {DEADLINE:g} s"
        ) from None
