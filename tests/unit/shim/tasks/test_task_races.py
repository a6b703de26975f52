"""Calls that meet in flight, and storms of them: one exit each, events in order, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devices.errors import KataError
from tests.unit.shim.fakes import TaskClient, open_descriptors


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[TaskClient]:
    """The shim of a pod, which leaves no descriptor behind."""
    client = TaskClient(tmp_path, pod="pod")
    before = open_descriptors()
    yield client
    await client.close()
    assert open_descriptors() == before


async def settled(*calls: Awaitable[Any]) -> list[str]:
    """The codes of calls made at the same time."""
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    codes = []
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, KataError):
            raise result
        codes.append(result.code if isinstance(result, KataError) else "OK")
    return codes


async def test_one_of_two_deletes_wins(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    shim.guest().exit(1)
    await shim.wait()
    assert sorted(await settled(shim.delete(), shim.delete())) == ["NOT_FOUND", "OK"]
    assert shim.events.topics == ["create", "start", "exit", "delete"]


async def test_one_of_two_creates_wins(shim: TaskClient) -> None:
    assert sorted(await settled(shim.create(), shim.create())) == ["ALREADY_EXISTS", "OK"]
    await shim.delete()


async def test_one_of_two_starts_wins(shim: TaskClient) -> None:
    await shim.create()
    assert sorted(await settled(shim.start(), shim.start())) == ["FAILED_PRECONDITION", "OK"]
    assert shim.events.topics == ["create", "start"]


async def test_one_of_two_equal_execs_wins(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    assert sorted(await settled(shim.exec(), shim.exec())) == ["ALREADY_EXISTS", "OK"]
    assert sorted(await settled(shim.start(exec_id="e"), shim.start(exec_id="e"))) == [
        "FAILED_PRECONDITION",
        "OK",
    ]


async def test_kill_start_and_delete_at_once(shim: TaskClient) -> None:
    """Whatever comes first: no exit before its start, one exit, and Delete gets it away in the end."""
    for _ in range(20):
        shim.events.events.clear()
        await shim.create()
        await settled(shim.start(), shim.kill(), shim.delete(), shim.wait())
        if "c" in shim.manager.containers:
            await shim.wait()
            await shim.delete()
        topics = shim.events.topics
        assert topics in (["create", "start", "exit", "delete"], ["create", "exit", "delete"])


async def test_the_vm_dies_during_each_call(shim: TaskClient) -> None:
    """The call ends with an error, the exit is told once, and Delete works."""
    calls: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
        ("start_container", shim.start),
        ("pause_container", lambda: shim.call("Pause", id="c")),
        ("exec_process", lambda: shim.start(exec_id="e")),
        ("signal_process", shim.kill),
    ]
    for rpc, call in calls:
        shim.events.events.clear()
        await shim.create()
        if rpc != "start_container":
            await shim.start()
        await shim.exec()

        async def die() -> None:
            shim.sandbox.die()

        shim.agent.before[rpc] = die
        assert (await settled(call()))[0] in {"UNAVAILABLE", "NOT_FOUND"}
        assert (await asyncio.wait_for(shim.wait(), 1)).exit_status == 255
        await asyncio.wait_for(shim.wait(exec_id="e"), 1)
        await shim.delete()
        assert shim.events.topics.count("exit") == 1
        assert shim.sandbox.stopped


async def test_a_caller_that_leaves_does_not_stop_a_start(shim: TaskClient) -> None:
    """containerd was restarted: its connection, and with it the call, is gone; the start is not."""
    await shim.create()
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        reached.set()
        await go_on.wait()

    shim.agent.before["start_container"] = slowly
    start = asyncio.create_task(shim.start())
    await reached.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    go_on.set()
    assert await settled(shim.start()) == ["FAILED_PRECONDITION"]  # it queued behind the first
    shim.guest().exit(0)
    await asyncio.wait_for(shim.wait(), 5)
    await shim.delete()
    assert shim.events.topics == ["create", "start", "exit", "delete"]


async def test_a_waiter_that_leaves_does_not_hurt_the_others(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    waiters = [asyncio.create_task(shim.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    await asyncio.sleep(0)
    shim.guest().exit(7)
    assert [(await waiter).exit_status for waiter in waiters[1:]] == [7, 7]


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_short_containers(shim: TaskClient, seed: int) -> None:
    """Two hundred, eight at a time, each exiting at a moment of its own: during Start, before, after."""
    dice = random.Random(seed)
    await shim.create("pod")
    await shim.start("pod")
    turn = asyncio.Semaphore(8)

    async def pauses() -> None:
        for _ in range(dice.randrange(6)):
            await asyncio.sleep(0)

    async def one(number: int) -> None:
        name, status = f"c{number}", dice.randrange(255)
        async with turn:
            await shim.create(name)
            wait = asyncio.create_task(shim.wait(name))

            async def end() -> None:
                await pauses()
                shim.guest(name).exit(status)

            start, ending = asyncio.create_task(shim.start(name)), asyncio.create_task(end())
            await settled(start, ending)
            assert (await wait).exit_status == status
            assert (await shim.delete(name)).exit_status == status

    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(200))), 30)
    histories: dict[str, list[str]] = {}
    for topic, event in shim.events.events:
        histories.setdefault(event.container_id, []).append(topic)
    assert histories.pop("pod") == ["create", "start"]
    assert len(histories) == 200
    for history in histories.values():
        assert history in (["create", "start", "exit", "delete"], ["create", "exit", "delete"])
    assert shim.sandbox.prepared == {"pod"}
    assert set(shim.agent.containers) == {"pod"}


async def test_closing_the_daemon_ends_what_waits(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    never = asyncio.get_running_loop().create_future()

    async def stuck() -> None:
        await never

    shim.agent.before["pause_container"] = stuck
    pause = asyncio.create_task(shim.call("Pause", id="c"))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(shim.manager.close(), 5)
    with pytest.raises(asyncio.CancelledError):
        await pause
