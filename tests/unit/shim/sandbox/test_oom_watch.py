"""A guest's out-of-memory events are asked for at our pace, whatever the guest answers."""

from __future__ import annotations

import asyncio
import time

import pytest

from devices.errors import GuestError
from shim.sandbox import oom_watch
from shim.sandbox.oom_watch import BURST, watch_oom
from tests.unit.turns import LIMIT, turns


class Agent:
    """Answers at once, `left` times; then its connection is gone."""

    def __init__(self, left: int) -> None:
        self.left = left

    async def get_oom_event(self) -> str:
        if not self.left:
            raise GuestError("gone")
        self.left -= 1
        return f"c{self.left}"


async def test_some_pass_at_once_and_in_order() -> None:
    told: list[str] = []
    async with asyncio.timeout(10):
        await watch_oom(Agent(BURST), told.append)
    assert told == [f"c{number}" for number in reversed(range(BURST))]


async def test_a_flood_comes_at_our_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom_watch, "PAUSE", 0.01)
    agent = Agent(BURST + 20)
    began = time.monotonic()
    async with turns() as longest, asyncio.timeout(30):
        await watch_oom(agent, lambda _: None)
    assert time.monotonic() - began >= 0.19
    assert longest.seconds < LIMIT


async def test_after_a_quiet_time_some_pass_at_once_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent is asked again only when the pause is over, so a quiet guest is always asked."""
    monkeypatch.setattr(oom_watch, "PAUSE", 0.001)
    asked: asyncio.Queue[str] = asyncio.Queue()

    class Slow:
        async def get_oom_event(self) -> str:
            return await asked.get()

    told: list[str] = []
    watching = asyncio.create_task(watch_oom(Slow(), told.append))
    for round_ in (1, 2):
        for number in range(BURST):
            asked.put_nowait(f"c{number}")
        async with asyncio.timeout(10):
            while len(told) < round_ * BURST:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.sleep(BURST * 0.001)
    watching.cancel()
    await asyncio.wait([watching])
