"""Asking the guest in which of its containers something was killed for memory, at a pace that we set.

What: `watch_oom` passes on what the agent answers to GetOOMEvent, one call after the other.
Why a pace: a guest answers as fast as it is asked, 2,400 times a second; each answer costs a turn of our
loop and, as an event, of containerd's. An agent of ours merges what waits, so nothing is lost but numbers.
Invariants: `BURST` at once, then one in `PAUSE` seconds. It ends with the connection; what it is told is a
name and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from devices.errors import KataError

__all__ = ["BURST", "PAUSE", "OomAgent", "watch_oom"]

BURST = 64
"""More than a pod has containers."""
PAUSE = 0.1

_log = structlog.get_logger("sandbox")


class OomAgent(Protocol):
    """What is asked of the agent: a part of `shim.sandbox.agent_client.GuestAgent`."""

    async def get_oom_event(self) -> str: ...


async def watch_oom(agent: OomAgent, on_oom: Callable[[str], None]) -> None:
    """Tell `on_oom` each container that the agent names, until the agent is gone."""
    loop = asyncio.get_running_loop()
    due = 0.0  # when the next one would be, if they came evenly
    while True:
        try:
            container_id = await agent.get_oom_event()
        except KataError as error:
            _log.debug("no more OOM events", error=str(error))
            return
        on_oom(container_id)
        now = loop.time()
        due = max(due, now) + PAUSE
        await asyncio.sleep(max(0.0, due - now - BURST * PAUSE))
