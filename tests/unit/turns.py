"""How long one turn of the event loop takes, by the CPU time of its thread: a busy machine changes nothing.

`with turns() as longest: ...; assert longest.seconds < LIMIT`. LIMIT is what the shim promises while somebody
floods it: another container's calls are answered after a few of such turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator

__all__ = ["LIMIT", "Longest", "turns"]

LIMIT = 0.1
"""Seconds."""


class Longest:
    """The longest turn so far, and how many there were."""

    seconds = 0.0
    count = 0


@contextlib.asynccontextmanager
async def turns() -> AsyncIterator[Longest]:
    """Measure what happens inside; the turn that is under way at the end counts.

    Without Python's garbage collector, which in a test has the objects of all tests to walk through.
    """
    longest = Longest()
    collecting = gc.isenabled()
    gc.disable()

    async def watch() -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest.seconds, longest.count = max(longest.seconds, now - before), longest.count + 1
            before = now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        yield longest
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    finally:
        if collecting:
            gc.enable()
        watching.cancel()
        await asyncio.wait([watching])
