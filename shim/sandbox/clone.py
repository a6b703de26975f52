"""What a VM that began with a template must become before it is a pod's: a machine of its own.

What: `make_own`, the first that a restored guest hears.
Why: its memory is that of every other VM of the template, its random generator's state and its clock
included. The rest of what machines differ in comes as for a VM that has booted: host name, resolver and
sandbox id with CreateSandbox, network cards by hot-plug, and boot id at its first reading, which no template
has done.
Invariants: random numbers first, before anything else runs in the guest that could want one; nothing of a pod
has reached the guest by then.
"""

from __future__ import annotations

import asyncio
import os
import time

from shim.sandbox.agent_client import GuestAgent

__all__ = ["ENTROPY", "make_own"]

ENTROPY = 512
"""Bytes: as many as Kata's shim gives."""


async def make_own(agent: GuestAgent) -> None:
    """Reseed the guest's random generator, and set its clock. Raises KataError."""
    now = time.time_ns()
    await asyncio.gather(  # the agent takes them in this order, and does each at once
        agent.reseed_random_dev(os.urandom(ENTROPY)),
        agent.set_guest_date_time(now // 10**9, now // 1000 % 10**6),
    )
