"""Programs of the image that the agent runs for itself.

What: `run_program` starts one without input and output and waits for its end, which the reaper sees.
Invariants: no argument of the host's is ever an option; the wait ends at its deadline.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from agent.reaper import Reaper
from ttrpc import Code, RpcError

__all__ = ["run_program"]


async def run_program(reaper: Reaper, argv: Sequence[str], deadline: float) -> int:
    """Its exit code; argv[0] is a path. Raises RpcError if it cannot be run or does not end in `deadline`
    seconds."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        _, ended = reaper.spawn(
            list(argv),
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=null,
            stdout=null,
            stderr=null,
        )
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"cannot run {argv[0]}: {error.strerror}") from None
    finally:
        os.close(null)
    try:
        return await asyncio.wait_for(ended, deadline)
    except TimeoutError:
        raise RpcError(Code.DEADLINE_EXCEEDED, f"{argv[0]} did not end within {deadline:g} s") from None
