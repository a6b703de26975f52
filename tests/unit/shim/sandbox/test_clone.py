"""The first that a restored guest hears are random numbers, then the time."""

from __future__ import annotations

import time
from typing import Any, cast

from shim.sandbox.agent_client import GuestAgent
from shim.sandbox.clone import ENTROPY, make_own


class Agent:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    async def reseed_random_dev(self, data: bytes) -> None:
        self.told.append(("reseed", data))

    async def set_guest_date_time(self, seconds: int, microseconds: int) -> None:
        self.told.append(("clock", seconds + microseconds / 1e6))


async def test_random_numbers_come_first_and_are_new_each_time() -> None:
    one, other = Agent(), Agent()
    for agent in (one, other):
        await make_own(cast("GuestAgent", agent))
        assert [name for name, _ in agent.told] == ["reseed", "clock"]
        assert len(agent.told[0][1]) == ENTROPY
        assert abs(agent.told[1][1] - time.time()) < 60
    assert one.told[0] != other.told[0]
