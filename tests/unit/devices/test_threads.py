"""A thread that acquires runs to its end before anybody undoes; one that only looks is left behind."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from devices.errors import HostError
from devices.threads import acquire, look, start


class Slow:
    """A call that goes on until `end` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.end = threading.Event()
        self.began = threading.Event()
        self.log: list[str] = []
        self._error = error

    def __call__(self, answer: int) -> int:
        self.began.set()
        self.end.wait(20)
        self.log.append("made")
        if self._error is not None:
            raise self._error
        return answer


async def _begun(work: asyncio.Task[int], slow: Slow) -> None:
    while not slow.began.is_set():
        assert not work.done()
        await asyncio.sleep(0)


async def test_it_answers_and_raises_what_the_call_does() -> None:
    assert await acquire(divmod, 7, 2) == (3, 1)
    assert await look(int, "12") == 12
    with pytest.raises(ValueError, match="invalid literal"):
        await acquire(int, "x")


@pytest.mark.parametrize("times", [1, 3])
async def test_the_undo_comes_after_the_thread(times: int) -> None:
    slow = Slow()

    async def user() -> int:
        try:
            return await acquire(slow, 5, lost=lambda answer: slow.log.append(f"lost {answer}"))
        except asyncio.CancelledError:
            slow.log.append("undone")
            raise

    work = asyncio.create_task(user())
    await _begun(work, slow)
    for _ in range(times):
        work.cancel()
        await asyncio.sleep(0.01)
    assert not work.done()
    slow.end.set()
    with pytest.raises(asyncio.CancelledError):
        await work

    assert slow.log == ["made", "lost 5", "undone"]


async def test_a_call_that_failed_meanwhile_has_nothing_to_undo() -> None:
    slow = Slow(OSError(5, "broken"))
    work = asyncio.create_task(acquire(slow, 5, lost=lambda _: slow.log.append("lost")))
    await _begun(work, slow)
    work.cancel()
    slow.end.set()
    with pytest.raises(asyncio.CancelledError):
        await work

    assert slow.log == ["made"]


async def test_who_only_looks_may_leave() -> None:
    slow = Slow()
    work = asyncio.create_task(look(slow, 5))
    await _begun(work, slow)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work

    assert slow.log == []
    slow.end.set()


async def test_looks_that_hang_do_not_keep_anything_from_being_given_back() -> None:
    """However many file servers are dead."""
    slow = [Slow() for _ in range(100)]
    looks = [asyncio.create_task(look(one, 5)) for one in slow]
    await _begun(looks[0], slow[0])

    assert await asyncio.wait_for(acquire(int, "12"), 10) == 12
    for one in slow:
        one.end.set()
    assert await asyncio.gather(*looks) == [5] * len(looks)


async def test_where_no_thread_can_be_started_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither now nor later, by a thread that was busy: its caller believes that nothing was taken."""
    done = list[str]()
    with ThreadPoolExecutor(2) as executor:
        busy = Slow()
        first = asyncio.create_task(acquire(busy, 1, executor=executor))
        await _begun(first, busy)

        def refuse(*_args: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="no more threads") as caught:
            await acquire(done.append, "second", executor=executor)
        assert "pids.max" in caught.value.hint
        with pytest.raises(HostError):
            start(threading.Thread(target=done.append, args=("third",)))
        monkeypatch.undo()
        busy.end.set()
        assert await first == 1
        assert await acquire(len, "four", executor=executor) == 4
    assert done == []
