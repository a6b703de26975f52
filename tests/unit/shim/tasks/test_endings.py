"""SIGKILL leads to one exit in time, whatever the agent answers; nobody who ends something waits for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from devices.errors import CallerError, GuestError, KataError
from proto import task_types_pb2
from shim.tasks import container as container_module
from shim.tasks import container_manager as manager_module
from shim.tasks import exits as exits_module
from shim.tasks import signals as signals_module
from tests.unit.shim.fakes import TaskClient, open_descriptors

LIMIT = 0.4  # seconds: the shims' kill_limit, half of which is the guest's
ANSWER = 0.1
BUSY = 3.0  # more, for a machine that has other things to do; a hang is for ever

Answer = Callable[[TaskClient], Awaitable[None]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim's own times are seconds."""
    monkeypatch.setattr(signals_module, "ANSWER", ANSWER)
    monkeypatch.setattr(signals_module, "_KNOWN_BAD", 0.05)
    monkeypatch.setattr(exits_module, "EXEC_GRACE", ANSWER)
    monkeypatch.setattr(container_module, "_REMOVE_DEADLINE", ANSWER)
    monkeypatch.setattr(container_module, "_REMOVE_TRY", 0.05)
    monkeypatch.setattr(manager_module, "_KILL_GRACE", ANSWER)


def prepared(client: TaskClient) -> TaskClient:
    client.runtime.prepare = lambda sandbox: setattr(sandbox, "kill_limit", LIMIT)
    return client


@pytest_asyncio.fixture
async def single(tmp_path: Path) -> AsyncIterator[TaskClient]:
    """A single container "c", which runs. No descriptor is left behind."""
    client = prepared(TaskClient(tmp_path))
    before = open_descriptors()
    await client.create()
    await client.start()
    yield client
    await client.close()
    assert open_descriptors() == before


@pytest_asyncio.fixture
async def pod(tmp_path: Path) -> AsyncIterator[TaskClient]:
    """A pod's own container "pod" and two members, "c" and "d", which run."""
    client = prepared(TaskClient(tmp_path, pod="pod"))
    before = open_descriptors()
    for name in ("pod", "c", "d"):
        await client.create(name)
        await client.start(name)
    yield client
    await client.close()
    assert open_descriptors() == before


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


async def silence(shim: TaskClient) -> None:
    """Until the connection ends."""
    await asyncio.wait([shim.sandbox.down])


async def late(_: TaskClient) -> None:
    await asyncio.sleep(LIMIT + 10)


async def not_found(_: TaskClient) -> None:
    raise CallerError("no such process", code="NOT_FOUND")


async def refused(_: TaskClient) -> None:
    raise CallerError("not in this state", code="FAILED_PRECONDITION")


async def failed(_: TaskClient) -> None:
    raise GuestError("out of paper", code="INTERNAL")


async def dropped(shim: TaskClient) -> None:
    if not shim.sandbox.down.done():
        shim.sandbox.down.set_result(None)
    raise GuestError("the connection to the agent ended", code="UNAVAILABLE")


async def taken(_: TaskClient) -> None:
    """The agent says it has done it; `hang` sees to it that nothing happens."""


ANSWERS = {
    "silence": silence,
    "late": late,
    "NOT_FOUND": not_found,
    "FAILED_PRECONDITION": refused,
    "INTERNAL": failed,
    "a dropped connection": dropped,
    "a lie": taken,
}
bad_answers = pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())


def hang(shim: TaskClient, answer: Answer = silence, *rpcs: str) -> None:
    """No process of the guest ends any more, and these calls get this answer (SignalProcess by default)."""
    for process in shim.agent.processes.values():
        process.ignores |= set(range(1, 65))
    for rpc in rpcs or ("signal_process",):
        shim.agent.before[rpc] = lambda: answer(shim)


async def code_of(call: Awaitable[object]) -> str:
    try:
        await call
    except KataError as error:
        return error.code
    return "OK"


def exits(shim: TaskClient) -> list[tuple[str, int]]:
    return [(event.id, event.exit_status) for event in shim.events.of("exit")]


@bad_answers
async def test_a_single_container_ends_with_its_vm(single: TaskClient, answer: Answer) -> None:
    hang(single, answer)
    with within(LIMIT + BUSY):
        with within(ANSWER + 0.5):
            assert await code_of(single.kill()) in {"OK", "NOT_FOUND"}
        assert (await single.wait()).exit_status == 137
    assert single.sandbox.stopped
    assert (await single.state()).status == task_types_pb2.STOPPED
    assert (await single.delete()).exit_status == 137
    assert exits(single) == [("c", 137)]


@bad_answers
async def test_a_member_ends_without_its_pod(pod: TaskClient, answer: Answer) -> None:
    hang(pod, answer)
    with within(LIMIT + BUSY):
        assert await code_of(pod.kill("c")) in {"OK", "NOT_FOUND"}
        assert (await pod.wait("c")).exit_status == 137
    assert [one for one in exits(pod) if one[0] == "c"] == [("c", 137)]
    if answer is dropped:  # nothing of the pod can be asked any more, so all of it has ended
        await pod.wait("pod")
        assert pod.sandbox.stopped
        return
    assert exits(pod) == [("c", 137)]
    assert not pod.sandbox.stopped
    assert pod.sandbox.doubts == ["it did not end c after SIGKILL"]
    assert (await pod.state("d")).status == task_types_pb2.RUNNING
    assert (await pod.delete("c")).exit_status == 137


@bad_answers
async def test_a_pods_own_container_takes_all_along(pod: TaskClient, answer: Answer) -> None:
    hang(pod, answer)
    with within(LIMIT + BUSY):
        assert await code_of(pod.kill("pod")) in {"OK", "NOT_FOUND"}
        for name in ("pod", "c", "d"):
            status = (await pod.wait(name)).exit_status
            assert status == 137 or (answer is dropped and status == 255), name
    assert pod.sandbox.stopped
    assert sorted(name for name, _ in exits(pod)) == ["c", "d", "pod"]


@bad_answers
async def test_an_exec_ends_alone(pod: TaskClient, answer: Answer) -> None:
    await pod.exec()
    await pod.start(exec_id="e")
    hang(pod, answer)
    with within(LIMIT + BUSY):
        assert await code_of(pod.kill(exec_id="e")) in {"OK", "NOT_FOUND"}
        assert (await pod.wait(exec_id="e")).exit_status == 137
    assert [one for one in exits(pod) if one[0] == "e"] == [("e", 137)]
    if answer is not dropped:
        assert (await pod.state("c")).status == task_types_pb2.RUNNING


async def test_the_clock_starts_with_the_first_kill(single: TaskClient) -> None:
    hang(single)
    killed = time.monotonic()
    waiting = asyncio.create_task(single.wait())
    while not waiting.done():
        assert await code_of(single.kill()) in {"OK", "NOT_FOUND"}  # none of them takes it back
        await asyncio.sleep(0.01)
    assert time.monotonic() - killed < LIMIT + BUSY
    assert exits(single) == [("c", 137)]


async def test_what_the_guest_ends_in_time_is_the_guests(pod: TaskClient) -> None:
    """A slow answer to the signal is none of the exit's business."""
    hang(pod)
    await pod.kill("c")
    pod.guest().exit(9)
    assert (await pod.wait("c")).exit_status == 9
    assert pod.sandbox.doubts == []


async def test_a_signal_that_nobody_takes_is_on_its_way(single: TaskClient) -> None:
    """The CRI plugin sends SIGKILL after SIGTERM, but only if that did not fail."""
    hang(single)
    with within(ANSWER + 0.5):
        await single.kill(signal=15)
    await asyncio.sleep(LIMIT)
    assert exits(single) == [], "nobody has killed it"


async def test_a_signal_that_the_guest_refuses_is_refused(single: TaskClient) -> None:
    hang(single, refused)
    assert await code_of(single.kill(signal=15)) == "FAILED_PRECONDITION"
    hang(single, not_found)
    assert await code_of(single.kill(signal=15)) == "NOT_FOUND"


async def test_all_execs_end_under_one_deadline(pod: TaskClient) -> None:
    """Twenty of which the guest ends none: they are told before their container, together."""
    names = [f"e{number}" for number in range(20)]
    for name in names:
        await pod.exec(exec_id=name)
        await pod.start(exec_id=name)
    hang(pod)
    with within(2 * ANSWER + BUSY):
        pod.agent.process("c").exited.set_result(3)
        assert (await pod.wait("c")).exit_status == 3
    told = exits(pod)
    assert sorted(told[:-1]) == sorted((name, 137) for name in names)
    assert told[-1] == ("c", 3)
    asked = [call[2] for call in pod.agent.calls if call[0] == "signal_process"]
    assert sorted(asked) == sorted(names), "each was asked for, at once"


@pytest.mark.parametrize("rpc", ["start_container", "pause_container", "exec_process"])
async def test_a_call_under_way_does_not_hold_the_exit(tmp_path: Path, rpc: str) -> None:
    """It is given up with the process that it was for."""
    shim = prepared(TaskClient(tmp_path, pod="pod"))
    await shim.create("pod")
    await shim.create()
    if rpc != "start_container":
        await shim.start()
    if rpc == "exec_process":
        await shim.exec()
    hang(shim, silence, rpc, "signal_process")
    calls = {
        "start_container": shim.call("Start", id="c"),
        "pause_container": shim.call("Pause", id="c"),
        "exec_process": shim.call("Start", id="c", exec_id="e"),
    }
    under_way = asyncio.create_task(code_of(calls.pop(rpc)))
    for other in calls.values():
        other.close()
    await asyncio.sleep(0.01)
    with within(LIMIT + BUSY):
        await shim.kill()
        assert (await shim.wait()).exit_status == 137
        assert await under_way == "ABORTED"
        await shim.delete()
    assert exits(shim) == [("c", 137)]
    topics = [topic for topic, event in shim.events.events if event.container_id == "c"]
    assert topics.count("start") == (rpc != "start_container")
    await shim.close()


async def test_readers_of_what_is_given_up_see_the_end(pod: TaskClient, tmp_path: Path) -> None:
    """containerd 2 deletes a task only then, and the guest will not say it; what came before stays."""
    out = tmp_path / "out"
    os.mkfifo(out)
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    await pod.create("e", stdout=str(out))
    await pod.start("e")
    await pod.guest("e").write(b"last words")
    hang(pod)
    await pod.kill("e")
    assert (await pod.wait("e")).exit_status == 137
    assert os.read(reader, 100) == b"last words"
    assert os.read(reader, 100) == b"", "the end, before Delete"
    await pod.delete("e")
    os.close(reader)


async def test_delete_of_what_never_ran(tmp_path: Path) -> None:
    shim = prepared(TaskClient(tmp_path))
    await shim.create()
    hang(shim)
    with within(LIMIT + BUSY):
        assert (await shim.delete()).exit_status == 137
    assert shim.sandbox.stopped
    assert exits(shim) == [("c", 137)]
    await shim.close()


async def test_delete_in_a_guest_that_does_not_answer(pod: TaskClient) -> None:
    """The first has to wait; after that it is known."""
    hang(pod, silence, "signal_process", "remove_container")
    for name in ("c", "d"):
        pod.guest(name).exit(0)
        await pod.wait(name)
        with within(ANSWER + BUSY):
            await pod.delete(name)
    assert pod.sandbox.doubts == [
        "it did not remove c within 0.1 s",
        "it did not remove d within 0.05 s",
    ]


async def test_the_second_of_a_pod_waits_less(pod: TaskClient) -> None:
    """CRI kills the members one after the other."""
    for name in ("c", "d"):
        pod.sandbox.kill_limit = 20.0
        pod.sandbox.unresponsive = True
        hang(pod)
        with within(BUSY):
            await pod.kill(name)
            assert (await pod.wait(name)).exit_status == 137


async def test_the_end_of_all_does_not_wait_for_the_guest(pod: TaskClient) -> None:
    """StopSandbox: SIGTERM, a while, SIGKILL, a while; who has not ended by then ends with the VM."""
    pod.sandbox.kill_limit = 60.0
    hang(pod)
    with within(4 * ANSWER + BUSY):
        await pod.manager.end_all(0.1)
    assert exits(pod) == []
    await pod.manager.stop_sandbox(pod.sandbox)
    assert {(await pod.wait(name)).exit_status for name in ("pod", "c", "d")} == {137}


async def test_a_vm_that_does_not_end_does_not_hold_the_exit(single: TaskClient) -> None:
    """A VMM that the kernel holds: `delete` and the journal are for that."""
    hang(single)

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    single.sandbox.before["stop"] = never
    with within(LIMIT + BUSY):
        await single.kill()
        assert (await single.wait()).exit_status == 137
    assert exits(single) == [("c", 137)]
    del single.sandbox.before["stop"]
    single.sandbox.die()


async def test_output_that_goes_on_does_not_hold_the_exit(tmp_path: Path) -> None:
    """A killed process's last output has a part of its time, not ten seconds."""
    shim = prepared(TaskClient(tmp_path))
    out = tmp_path / "out"
    os.mkfifo(out)
    reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
    await shim.create(stdout=str(out))
    await shim.start()
    hang(shim, taken)
    with within(LIMIT + BUSY):
        await shim.kill()
        shim.guest().exit(137, keep_streams=True)
        assert (await shim.wait()).exit_status == 137
    assert exits(shim) == [("c", 137)]
    await shim.close()
    os.close(reader)
