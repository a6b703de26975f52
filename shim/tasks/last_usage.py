"""What a container had used when it ended, for who asks after its exit.

What: `LastUsage` asks the guest once, at the exit, and keeps the answer until Delete; before that what was
told last.
Why: containerd 2.3 asks for the figures of each task that SIGKILL has ended, and runc's shim has a cgroup to
read until Delete.
Invariants: an exit never waits for the answer, only who asks for the figures does. A guest that did not
answer, or went with its VM first, leaves what was told last, or zeros.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from devices.errors import KataError
from proto import agent_pb2

__all__ = ["LastUsage"]

_Question = Callable[[], Coroutine[Any, Any, agent_pb2.StatsContainerResponse]]

_log = structlog.get_logger("usage")


class LastUsage:
    """One container's. `question` asks the guest, with a deadline."""

    def __init__(self, question: _Question) -> None:
        self._question = question
        self._figures = agent_pb2.StatsContainerResponse()
        self._asked: asyncio.Task[None] | None = None

    def told(self, figures: agent_pb2.StatsContainerResponse) -> None:
        """What the guest said while it ran."""
        if self._asked is None:
            self._figures = figures

    def ask(self) -> None:
        """The container has ended: have the answer, if there is one. Once."""
        if self._asked is None:
            self._asked = asyncio.create_task(self._take())

    async def settled(self) -> agent_pb2.StatsContainerResponse:
        """Of a container that has ended, when the answer is there or there will be none."""
        self.ask()  # nobody has yet where it was not the guest that told its end, nor of an earlier shim's
        assert self._asked is not None
        await asyncio.wait([self._asked])
        return self._figures

    async def close(self) -> None:
        """Wait for no answer any more. Idempotent."""
        if self._asked is not None:
            self._asked.cancel()
            await asyncio.wait([self._asked])

    async def _take(self) -> None:
        try:
            self._figures = await self._question()
        except KataError as error:
            _log.debug("no last figures", error=str(error))
