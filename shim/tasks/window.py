"""The size of a process's terminal: as its client wants it, and as the guest has been told.

What: `Window.resize` takes a size down and has the guest told, if there is a terminal to tell of.
Why not a call for each: who drags a window asks for a hundred sizes a second, and of calls that are under way
together the guest chooses which comes last.
Invariants: the guest is told of one size at a time, the newest, and of the last one for certain; those that
were asked for meanwhile are answered with it, also if it fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

__all__ = ["Window"]


class Window:
    """Of one process. `size`: rows and columns that were asked for last, None before."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self._asked = self._told = 0  # how many sizes
        self._turn = asyncio.Lock()

    async def resize(
        self, size: tuple[int, int], shown: Callable[[], bool], tell: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """Have the terminal that is `shown` this large. Without one the size is what it begins with."""
        self.size = size
        self._asked += 1
        mine = self._asked
        async with self._turn:
            if self._told >= mine or not shown():
                return
            self._told = self._asked
            try:
                await tell(*self.size)
            except asyncio.CancelledError:  # its caller has gone; the others are to be answered still
                self._told = mine - 1
                raise
