"""A container's life through the task service: its calls, answers and events, in containerd's order."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from devices.errors import CallerError, GuestError, HostError, KataError
from proto import task_types_pb2, task_v2_pb2, task_v3_pb2
from shim.tasks.exits import Exits
from tests.unit.shim.fakes import VMM_PID, TaskClient, open_descriptors


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[TaskClient]:
    """A single container's shim, which leaves no descriptor behind."""
    client = TaskClient(tmp_path)
    before = open_descriptors()
    yield client
    await client.close()
    assert open_descriptors() == before


async def code_of(call: object) -> str:
    """The code that a call is refused with; "OK" if it is not."""
    try:
        await call  # type: ignore[misc]
    except KataError as error:
        return error.code
    return "OK"


async def test_a_container_lives_and_ends(shim: TaskClient) -> None:
    assert (await shim.create()).pid == VMM_PID
    state = await shim.state()
    assert state.status == task_types_pb2.CREATED
    assert not state.HasField("exited_at")
    waiter = asyncio.create_task(shim.wait())
    assert (await shim.start()).pid == VMM_PID
    assert (await shim.state()).status == task_types_pb2.RUNNING
    assert not waiter.done()
    before = time.time_ns()
    shim.guest().exit(42)
    ended = await waiter
    assert ended.exit_status == 42
    assert before <= ended.exited_at.ToNanoseconds() <= time.time_ns()
    assert (await shim.wait()).exit_status == 42
    state = await shim.state()
    assert (state.status, state.exit_status, state.pid) == (task_types_pb2.STOPPED, 42, VMM_PID)
    deleted = await shim.delete()
    assert (deleted.pid, deleted.exit_status) == (VMM_PID, 42)
    assert deleted.exited_at == ended.exited_at
    assert shim.events.topics == ["create", "start", "exit", "delete"]
    assert await code_of(shim.delete()) == "NOT_FOUND"
    assert shim.sandbox.prepared == set()


async def test_the_vm_is_gone_when_wait_answers(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    shim.guest().exit(0)
    await shim.wait()
    assert shim.sandbox.stopped


async def test_shutdown_ends_the_shim_only_without_containers(shim: TaskClient) -> None:
    await shim.create()
    await shim.call("Shutdown", id="c")
    assert shim.shutdowns == 0
    await shim.delete()
    await shim.call("Shutdown", id="c")
    assert shim.shutdowns == 1


async def test_connect_and_pids(shim: TaskClient) -> None:
    assert await code_of(shim.call("Connect", id="c")) == "NOT_FOUND", "else containerd keeps its id taken"
    await shim.create()
    answer = await shim.call("Connect", id="c")
    assert (answer.shim_pid, answer.task_pid) == (os.getpid(), VMM_PID)
    assert (await shim.call("Connect", id="member")).task_pid == 0, "1.7 asks before Create"
    await shim.start()
    await shim.exec()
    assert [entry.pid for entry in (await shim.call("Pids", id="c")).processes] == [VMM_PID]
    await shim.start(exec_id="e")
    entries = (await shim.call("Pids", id="c")).processes
    assert [entry.pid for entry in entries] == [VMM_PID, VMM_PID]
    assert entries[1].info.type_url == "containerd.runc.v1.ProcessDetails"
    assert entries[1].info.value == b"\x0a\x01e"
    shim.agent.children = 2
    entries = (await shim.call("Pids", id="c")).processes
    assert [entry.pid for entry in entries] == [VMM_PID] * 4, "no pid of the guest gets out"
    assert [entry.HasField("info") for entry in entries] == [False, True, False, False]


async def test_pids_of_a_guest_that_does_not_say(shim: TaskClient) -> None:
    """A stock agent does not list processes, and a hanging one is not waited for: the books are enough."""
    await shim.create()
    await shim.start()
    shim.agent.children = 2

    async def refuse() -> None:
        raise CallerError("GetDiagnosticData is not implemented", code="UNIMPLEMENTED")

    shim.agent.before["list_processes"] = refuse
    assert [entry.pid for entry in (await shim.call("Pids", id="c")).processes] == [VMM_PID]


@pytest.mark.parametrize("messages", [task_v2_pb2, task_v3_pb2])
async def test_each_package_is_answered_in_its_own_classes(tmp_path: Path, messages: object) -> None:
    shim = TaskClient(tmp_path, messages=messages)
    assert isinstance(await shim.create(), messages.CreateTaskResponse)  # type: ignore[attr-defined]
    assert isinstance(await shim.state(), messages.StateResponse)  # type: ignore[attr-defined]
    assert isinstance(await shim.delete(), messages.DeleteResponse)  # type: ignore[attr-defined]
    await shim.close()


async def test_exec(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    await shim.exec()
    state = await shim.state(exec_id="e")
    assert (state.id, state.exec_id, state.pid, state.status) == ("e", "e", 0, task_types_pb2.CREATED)
    assert (await shim.start(exec_id="e")).pid == VMM_PID
    shim.guest(exec_id="e").exit(5)
    assert (await shim.wait(exec_id="e")).exit_status == 5
    assert (await shim.delete(exec_id="e")).exit_status == 5
    assert await code_of(shim.delete(exec_id="e")) == "NOT_FOUND"
    assert shim.events.topics == ["create", "start", "exec-added", "exec-started", "exit"]
    assert (await shim.state()).status == task_types_pb2.RUNNING
    assert not shim.sandbox.stopped
    assert [(phase, id_) for phase, id_, start, end in shim.sandbox.phases if start <= end] == [
        ("exec.streams", "c/e"),
        ("exec.process", "c/e"),
        ("exec.output", "c/e"),
    ]


async def test_a_process_that_dies_inside_start_exits_after_its_start(shim: TaskClient) -> None:
    await shim.create()

    async def die() -> None:
        shim.guest().exit(3)
        for _ in range(20):
            await asyncio.sleep(0)

    async def start_although_dead(container_id: str) -> None:
        await die()

    shim.agent.start_container = start_although_dead  # type: ignore[method-assign]
    await shim.start()
    assert (await shim.wait()).exit_status == 3
    assert shim.events.topics == ["create", "start", "exit"]


async def test_a_failing_create_leaves_nothing(shim: TaskClient) -> None:
    shim.runtime.prepare = lambda sandbox: sandbox.fail.update(
        start=HostError("there is no kernel", phase="boot", hint="make guest")
    )
    with pytest.raises(HostError, match="boot: there is no kernel; try: make guest"):
        await shim.create()
    assert shim.sandbox.stopped
    assert shim.events.topics == []
    assert await code_of(shim.delete()) == "NOT_FOUND"
    await shim.call("Shutdown", id="c")
    assert shim.shutdowns == 1


async def test_a_create_that_the_guest_refuses_is_undone(shim: TaskClient) -> None:
    async def refuse() -> None:
        raise GuestError('exec: "nope": executable file not found in $PATH')

    shim.runtime.prepare = lambda sandbox: sandbox.agent.before.update(create_container=refuse)
    with pytest.raises(GuestError, match="nope"):
        await shim.create()
    assert shim.sandbox.prepared == set()
    assert shim.sandbox.stopped
    assert shim.manager.idle


async def test_a_create_whose_caller_gave_up_is_undone(shim: TaskClient) -> None:
    booting = asyncio.Event()

    async def boot() -> None:
        booting.set()
        await asyncio.get_running_loop().create_future()

    shim.runtime.prepare = lambda sandbox: sandbox.before.update(start=boot)
    create = asyncio.create_task(shim.create())
    await booting.wait()
    create.cancel()
    with pytest.raises(asyncio.CancelledError):
        await create
    assert await code_of(shim.delete()) == "NOT_FOUND"
    await shim.call("Shutdown", id="c")
    await asyncio.wait_for(shim.shut_down.wait(), 5)
    assert shim.sandbox.stopped


async def test_the_death_of_the_vm_ends_every_process_at_once(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    await shim.exec()
    await shim.start(exec_id="e")
    waiters = [asyncio.create_task(shim.wait(exec_id=exec_id)) for exec_id in ("", "e")]
    await asyncio.sleep(0)
    shim.sandbox.die()
    async with asyncio.timeout(1):
        assert [(await waiter).exit_status for waiter in waiters] == [255, 255]
    assert sorted(event.id for event in shim.events.of("exit")) == ["c", "e"]
    async with asyncio.timeout(1):
        while not shim.sandbox.stopped:  # noqa: ASYNC110  (at once, not with Delete)
            await asyncio.sleep(0)
    assert (await shim.state()).status == task_types_pb2.STOPPED
    assert await code_of(shim.kill()) == "NOT_FOUND"
    assert (await shim.delete()).exit_status == 255
    assert shim.sandbox.stopped


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), RuntimeError("a fault of ours")], ids=["given up", "ours"]
)
async def test_whatever_becomes_of_the_wait_the_exit_is_told(shim: TaskClient, error: BaseException) -> None:
    """The task that waits for a process may be ended by anything: nobody may wait for the exit for ever."""
    gone = asyncio.Event()

    async def fail() -> None:
        await gone.wait()
        raise error

    shim.runtime.prepare = lambda sandbox: sandbox.agent.before.update(wait_process=fail)
    await shim.create()
    await shim.start()
    waiter = asyncio.create_task(shim.wait())
    gone.set()
    async with asyncio.timeout(5):
        assert (await waiter).exit_status == 255
    assert len(shim.events.of("exit")) == 1
    assert (await shim.delete()).exit_status == 255


async def test_what_follows_from_an_exit_fails_and_it_is_told(
    shim: TaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Exits, "_drain", fail)
    await shim.create()
    await shim.start()
    shim.sandbox.agent.process("c", "").exit(7)
    async with asyncio.timeout(5):
        assert (await shim.wait()).exit_status == 7
    assert len(shim.events.of("exit")) == 1


async def test_a_created_container_is_killed_by_delete(shim: TaskClient) -> None:
    await shim.create()
    assert (await shim.delete()).exit_status == 137
    assert shim.events.topics == ["create", "exit", "delete"]


async def test_an_exec_that_cannot_start(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    await shim.exec(args=["missing"])
    waiter = asyncio.create_task(shim.wait(exec_id="e"))
    with pytest.raises(KataError, match="missing"):
        await shim.start(exec_id="e")
    async with asyncio.timeout(1):
        await waiter
    assert shim.events.topics == ["create", "start", "exec-added"]
    await shim.delete(exec_id="e")
    assert await code_of(shim.state(exec_id="e")) == "NOT_FOUND"


async def test_execs_end_before_their_container(shim: TaskClient) -> None:
    await shim.create()
    await shim.start()
    await shim.exec()
    await shim.start(exec_id="e")
    shim.guest().exit(0)
    await shim.wait()
    assert [event.id for event in shim.events.of("exit")] == ["e", "c"]
    assert (await shim.wait(exec_id="e")).exit_status == 137


async def test_state_never_waits(shim: TaskClient) -> None:
    stuck = asyncio.Event()

    async def never() -> None:
        await stuck.wait()

    await shim.create()
    shim.agent.before.update(start_container=never, signal_process=never)
    start = asyncio.create_task(shim.start())
    kill = asyncio.create_task(shim.kill(signal=0))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(0.1):
        assert (await shim.state()).status == task_types_pb2.CREATED
        assert (await shim.call("Connect", id="c")).task_pid == VMM_PID
        assert len((await shim.call("Pids", id="c")).processes) == 1
    stuck.set()
    await start
    await kill


async def test_a_pod_outlives_its_containers_and_ends_with_its_sandbox(tmp_path: Path) -> None:
    shim = TaskClient(tmp_path, pod="pod")
    for container in ("pod", "a", "b"):
        await shim.create(container)
        await shim.start(container)
    shim.guest("a").exit(1)
    await shim.wait("a")
    assert not shim.sandbox.stopped
    shim.guest("pod").exit(0)
    assert (await shim.wait("b")).exit_status == 137
    assert (await shim.wait("pod")).exit_status == 0
    assert shim.sandbox.stopped
    assert [event.container_id for event in shim.events.of("exit")] == ["a", "b", "pod"]
    assert await code_of(shim.create("late")) == "FAILED_PRECONDITION"
    for container in ("a", "b", "pod"):
        await shim.delete(container)
    assert len(shim.runtime.sandboxes) == 1
    await shim.close()


async def test_a_create_under_way_when_the_pod_ends_is_undone(tmp_path: Path) -> None:
    shim = TaskClient(tmp_path, pod="pod")
    await shim.create("pod")
    await shim.start("pod")
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        entered.set()
        await go_on.wait()

    shim.agent.before["create_container"] = hold
    late = asyncio.create_task(code_of(shim.create("late")))
    await entered.wait()
    shim.guest("pod").exit(0)
    await shim.wait("pod")
    go_on.set()
    assert await late == "FAILED_PRECONDITION"
    assert shim.sandbox.stopped
    assert "create" not in [topic for topic, event in shim.events.events if event.container_id == "late"]
    await shim.delete("pod")
    await shim.close()


async def test_a_failing_create_does_not_hurt_the_pod(tmp_path: Path) -> None:
    shim = TaskClient(tmp_path, pod="pod")
    await shim.create("pod")

    async def refuse() -> None:
        raise CallerError("no such file")

    shim.agent.before["create_container"] = refuse
    assert await code_of(shim.create("a")) == "FAILED_PRECONDITION"
    assert not shim.sandbox.stopped
    assert shim.sandbox.prepared == {"pod"}
    assert (await shim.state("pod")).status == task_types_pb2.CREATED
    await shim.close()


async def test_a_guest_that_cannot_end_what_is_killed(shim: TaskClient) -> None:
    """SIGTERM may be ignored for ever; after SIGKILL the exit comes, if not by the guest then without it."""
    shim.runtime.prepare = lambda sandbox: setattr(sandbox, "kill_limit", 0.1)
    await shim.create()
    await shim.start()
    shim.guest().ignores |= {9, 15}
    waiting = asyncio.create_task(shim.wait())
    await shim.kill(signal=15)
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    await shim.kill(signal=9)
    async with asyncio.timeout(10):
        assert (await waiting).exit_status == 137
    await shim.delete()
    assert shim.events.topics.count("exit") == 1
