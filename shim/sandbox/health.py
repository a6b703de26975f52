"""Whether the guest answers: asked at an interval, doubted when it fails at something, told where one looks.

What: `Health.watch` asks the agent's Health service; `doubt` is for who has met a guest that does not do what
it must (`shim.tasks.container`). While `unresponsive` nobody waits long for the guest, `kata-ctl list` says
so (`shim.state.healthfile`), and the log has said it once, with what VMM and console said last.
Why asked at all: an agent that hangs is noticed with the next call otherwise, and a quiet pod may make none
for a month. Why doubted besides: the kill of a container must not wait for the next question.
Invariants:
- One question at a time, each with a deadline; no answer is an answer like any other.
- `MISSED` questions in a row without an answer make it unresponsive, and so does a doubt at once; the first
  answer after that takes it back. A guest in doubt is asked every `RETRY` seconds, whatever the interval is.
- Only missed questions end a VM, and only if the configuration wants that.
- A paused container is no silent guest: the agent is not in its cgroup, and answers.
Source: Kata asks every 30 s, and ends its shim at the first answer that does not come (facts/kata.md 1.14).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from devices.errors import GuestError, KataError
from devices.threads import acquire
from shim.state import healthfile

__all__ = ["MISSED", "RETRY", "Health", "HealthSettings"]

MISSED = 3
"""Questions in a row that a guest may leave unanswered."""
RETRY = 5.0
"""Seconds between two questions to a guest that has missed one, or is in doubt."""

_log = structlog.get_logger("health")


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Seconds between two questions (0: none) and for one answer; `ends`: a silent guest's VM is ended."""

    interval: float = 30.0
    timeout: float = 10.0
    ends: bool = False


class Health:
    """One guest's. `directory`: the sandbox's state directory; `evidence`: what VMM and console said last;
    `give_up` ends the VM for the reason that it gets."""

    def __init__(
        self,
        settings: HealthSettings,
        directory: str,
        *,
        evidence: Callable[[], dict[str, str]],
        give_up: Callable[[str], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._evidence = evidence
        self._give_up = give_up
        self._silence: healthfile.Silence | None = None
        self._told: healthfile.Silence | None = None
        self._soon = asyncio.Event()
        self._missed = 0

    @property
    def unresponsive(self) -> bool:
        """Whether the guest is known not to answer."""
        return self._silence is not None

    def doubt(self, why: str) -> None:
        """It did not do something in time; `why` is a sentence, "it did not ...". It is asked at once."""
        self._mark(why)
        self._soon.set()

    async def watch(self, ask: Callable[[float], Awaitable[None]]) -> None:
        """Ask, for as long as the VM lives. `ask(seconds)` raises KataError when there is no good answer."""
        while True:
            await self._pause()
            await self._tell()
            try:
                await ask(self._settings.timeout)
            except KataError as error:
                if error.code != "UNIMPLEMENTED":  # else it answers, but has no such service
                    self._missed += 1
                    if await self._judge(error):
                        return
                    continue
            self._missed = 0
            if not self._soon.is_set():  # a doubt that came with the answer is a question of its own
                self._silence = None
                await self._tell()

    async def _pause(self) -> None:
        seconds = self._settings.interval
        if self._missed or self.unresponsive:
            seconds = min(seconds, RETRY) if seconds else RETRY
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds or None):
                await self._soon.wait()
        self._soon.clear()

    async def _judge(self, error: KataError) -> bool:
        """Whether the VM was ended."""
        if self._missed < MISSED:
            return False
        self._mark(f"it did not answer {MISSED} questions for its health, the last one: {error.cause}")
        await self._tell()
        if not self._settings.ends or not self._settings.interval:
            return False
        assert self._silence is not None
        await self._give_up(f"the guest does not answer: {self._silence.why}")
        return True

    def _mark(self, why: str) -> None:
        if self._silence is None:
            self._silence = healthfile.Silence(time.time(), why)
            error = GuestError(
                f"the guest does not answer: {why}",
                phase="health",
                details=self._evidence(),
                hint="it is asked until it does; to end it, kill the pod",
            )
            _log.error("the guest is unresponsive", error=str(error))

    async def _tell(self) -> None:
        """Have the file say what is the case."""
        silence = self._silence
        if silence is self._told:
            return
        try:
            if silence is None:
                assert self._told is not None
                seconds = round(time.time() - self._told.since, 1)
                _log.warning("the guest answers again", after_seconds=seconds, was=self._told.why)
                await acquire(healthfile.clear, self._directory)
            else:
                await acquire(healthfile.write, self._directory, silence)
        except OSError as error:
            _log.warning("cannot tell the guest's health", directory=self._directory, error=str(error))
        self._told = silence
