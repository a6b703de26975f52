"""A guest that falls silent is told once, in log and file, until it answers again; or it is ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from devices.errors import CallerError, GuestError
from shim.sandbox import health as health_module
from shim.sandbox.health import MISSED, Health, HealthSettings
from shim.state import healthfile

SOON = 10.0  # seconds in which anything happens that happens at all


class Guest:
    """One that answers, unless it is `silent`; `asked` counts the questions."""

    def __init__(self) -> None:
        self.silent = False
        self.error: Exception | None = None
        self.asked = 0

    async def check(self, _seconds: float) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.silent:
            await asyncio.sleep(0)
            raise GuestError("the agent did not answer Check within 1 s", code="DEADLINE_EXCEEDED")


class Watched:
    """A guest's health, the reasons for which it was given up, and how often evidence was asked for."""

    def __init__(self, directory: Path, settings: HealthSettings) -> None:
        self.directory = str(directory)
        self.guest = Guest()
        self.given_up: list[str] = []
        self.evidence = 0
        self.health = Health(settings, self.directory, evidence=self._evidence, give_up=self._give_up)
        self.task = asyncio.create_task(self.health.watch(self.guest.check))

    def _evidence(self) -> dict[str, str]:
        self.evidence += 1
        return {"guest console": "rcu: INFO: rcu_sched self-detected stall"}

    async def _give_up(self, why: str) -> None:
        self.given_up.append(why)

    @property
    def told(self) -> healthfile.Silence | None:
        return healthfile.read(self.directory)


Make = Callable[..., Watched]


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setattr(health_module, "RETRY", 0.01)
    made: list[Watched] = []

    def _make(interval: float = 0.01, *, ends: bool = False) -> Watched:
        made.append(Watched(tmp_path, HealthSettings(interval, 1.0, ends)))
        return made[-1]

    yield _make
    for one in made:
        one.task.cancel()
        await asyncio.wait([one.task])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110  (what a task of its own does, and a thread)
            await asyncio.sleep(0.001)


async def test_silence_is_told_and_taken_back(make: Make) -> None:
    one = make()
    await until(lambda: one.guest.asked > 2)
    assert (one.health.unresponsive, one.told, one.evidence) == (False, None, 0)
    one.guest.silent = True
    before = one.guest.asked
    await until(lambda: one.told is not None)
    assert one.guest.asked - before >= MISSED
    assert one.health.unresponsive
    told = one.told
    assert told is not None
    assert told.why.startswith(
        "it did not answer 3 questions for its health, the last one: the agent did not"
    )
    await until(lambda: one.guest.asked > before + 10)
    assert one.evidence == 1, "told once"
    one.guest.silent = False
    await until(lambda: one.told is None)
    assert not one.health.unresponsive
    assert one.given_up == []
    assert os.listdir(one.directory) == []


async def test_a_question_missed_now_and_then_is_nothing(make: Make) -> None:
    one = make()
    for _ in range(5):
        asked = one.guest.asked
        one.guest.silent = True
        await until(lambda asked=asked: one.guest.asked == asked + MISSED - 1)  # type: ignore[misc]
        one.guest.silent = False
        asked = one.guest.asked
        await until(lambda asked=asked: one.guest.asked > asked)  # type: ignore[misc]
    assert (one.told, one.evidence) == (None, 0)


@pytest.mark.parametrize("interval", [0.0, 1000.0])
async def test_a_doubt_is_told_at_once_and_looked_at(make: Make, interval: float) -> None:
    """Also where nobody asks otherwise: or it would be marked for ever."""
    one = make(interval)
    await asyncio.sleep(0.05)
    assert one.guest.asked == 0
    one.guest.silent = True
    one.health.doubt("it did not end c after SIGKILL")
    assert one.health.unresponsive
    await until(lambda: one.told is not None)
    await until(lambda: one.guest.asked > 2 * MISSED)
    assert one.told is not None
    assert one.told.why == "it did not end c after SIGKILL"
    one.guest.silent = False
    await until(lambda: one.told is None)
    asked = one.guest.asked
    await asyncio.sleep(0.05)
    assert one.guest.asked == asked, "and then it is left in peace"


async def test_a_doubt_during_an_answer_is_a_question_of_its_own(make: Make) -> None:
    one = make(0.0)
    original = one.guest.check
    doubts = 0

    async def check(seconds: float) -> None:
        nonlocal doubts
        await original(seconds)
        if doubts < 2:
            doubts += 1
            one.health.doubt("again")

    one.task.cancel()
    one.task = asyncio.create_task(one.health.watch(check))
    one.health.doubt("once")
    await until(lambda: not one.health.unresponsive)
    assert one.guest.asked == 3


async def test_a_silent_guest_is_ended_where_that_is_wanted(make: Make) -> None:
    one = make(ends=True)
    one.guest.silent = True
    await until(lambda: one.given_up)
    assert one.given_up[0].startswith("the guest does not answer: it did not answer 3 questions")
    assert one.task.done()


async def test_without_questions_nothing_is_ended(make: Make) -> None:
    one = make(0.0, ends=True)
    one.guest.silent = True
    one.health.doubt("it did not end c after SIGKILL")
    await until(lambda: one.guest.asked > 3 * MISSED)
    assert one.given_up == []


async def test_an_agent_without_the_service_answers(make: Make) -> None:
    one = make()
    one.guest.error = CallerError("Check is not implemented", code="UNIMPLEMENTED")
    await until(lambda: one.guest.asked > 2 * MISSED)
    assert not one.health.unresponsive


async def test_a_state_directory_that_takes_no_file(make: Make) -> None:
    one = make()
    one.directory = "/nope"
    one.health._directory = "/nope"
    one.guest.silent = True
    await until(lambda: one.health.unresponsive)
    one.guest.silent = False
    await until(lambda: not one.health.unresponsive)
