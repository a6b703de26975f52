"""A kill for memory is told once, and before the exit that it explains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import oom
from agent.oom import OomWatcher


class Group:
    """A cgroup directory whose memory.events the test writes."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory)
        self._file = directory / "memory.events"
        self.kills = 0
        self.kill(0)

    def kill(self, number: int = 1) -> None:
        self.kills += number
        self._file.write_text(f"low 0\noom {self.kills}\noom_kill {self.kills}\n")


@pytest.fixture
async def watcher() -> AsyncIterator[OomWatcher]:
    made = OomWatcher(asyncio.get_running_loop())
    yield made
    made.close()


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


async def soon(watcher: OomWatcher) -> str:
    return await asyncio.wait_for(watcher.next(), 10)


async def test_a_kill_is_told_once(watcher: OomWatcher, group: Group) -> None:
    group.kill(3)
    watcher.watch("c", group.path)
    group.kill()
    assert await soon(watcher) == "c"
    await watcher.told("c")
    asking = asyncio.ensure_future(watcher.next())
    await asyncio.sleep(0.05)
    assert not asking.done(), "what was before, and what was told, is no news"
    group.kill()
    assert await asyncio.wait_for(asking, 10) == "c"


async def test_an_exit_waits_until_the_kill_is_taken(watcher: OomWatcher, group: Group) -> None:
    """Also if the exit is known first: the kernel's counter is asked, not the notification."""
    watcher.watch("c", group.path)
    group.kill()
    exit_told = asyncio.ensure_future(watcher.told("c"))
    await asyncio.sleep(0)
    assert not exit_told.done()
    assert await soon(watcher) == "c"
    await asyncio.wait_for(exit_told, 10)


async def test_an_exit_does_not_wait_for_a_host_that_never_asks(
    watcher: OomWatcher, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oom, "_TOLD_DEADLINE", 0.05)
    watcher.watch("c", group.path)
    group.kill()
    await asyncio.wait_for(watcher.told("c"), 10)


async def test_an_exit_without_a_kill_does_not_wait(watcher: OomWatcher, group: Group) -> None:
    watcher.watch("c", group.path)
    await asyncio.wait_for(watcher.told("c"), 10)
    await asyncio.wait_for(watcher.told("unknown"), 10)
    watcher.watch("none", "/nonexistent")
    await asyncio.wait_for(watcher.told("none"), 10)


async def test_of_a_container_one_event_waits(
    watcher: OomWatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is killed in all the time does not keep another one's event back."""
    monkeypatch.setattr(oom, "_TOLD_DEADLINE", 0.01)
    groups = {}
    for name in ("busy", "other"):
        (tmp_path / name).mkdir()
        groups[name] = Group(tmp_path / name)
        watcher.watch(name, groups[name].path)
    for _ in range(20):
        groups["busy"].kill()
        await watcher.told("busy")
    groups["other"].kill()
    await watcher.told("other")
    assert [await soon(watcher), await soon(watcher)] == ["busy", "other"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watcher.next(), 0.05)
