"""Every RPC in every state is answered with the code that containerd's clients expect, or with success."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf import any_pb2

from devices.errors import KataError
from proto import task_types_pb2
from shim.tasks.process import TABLE, Call, Kind, Status
from tests.unit.shim.fakes import TaskClient

OK, NOT_FOUND, EXISTS = "OK", "NOT_FOUND", "ALREADY_EXISTS"
REFUSED, UNIMPLEMENTED, INVALID = "FAILED_PRECONDITION", "UNIMPLEMENTED", "INVALID_ARGUMENT"

INIT_STATES = ("absent", "created", "running", "paused", "stopped", "deleted")
# fmt: off
INIT_TABLE = {
    #             absent     created        running        paused         stopped        deleted
    "State":      (NOT_FOUND, OK,            OK,            OK,            OK,            NOT_FOUND),
    "Create":     (OK,        EXISTS,        EXISTS,        EXISTS,        EXISTS,        OK),
    "Start":      (NOT_FOUND, OK,            REFUSED,       REFUSED,       REFUSED,       NOT_FOUND),
    "Delete":     (NOT_FOUND, OK,            REFUSED,       REFUSED,       OK,            NOT_FOUND),
    "Pids":       (NOT_FOUND, OK,            OK,            OK,            OK,            NOT_FOUND),
    "Pause":      (NOT_FOUND, REFUSED,       OK,            REFUSED,       REFUSED,       NOT_FOUND),
    "Resume":     (NOT_FOUND, REFUSED,       REFUSED,       OK,            REFUSED,       NOT_FOUND),
    "Checkpoint": (NOT_FOUND, UNIMPLEMENTED, UNIMPLEMENTED, UNIMPLEMENTED, UNIMPLEMENTED, NOT_FOUND),
    "Kill":       (NOT_FOUND, OK,            OK,            OK,            NOT_FOUND,     NOT_FOUND),
    "Exec":       (NOT_FOUND, OK,            OK,            REFUSED,       REFUSED,       NOT_FOUND),
    "ResizePty":  (NOT_FOUND, OK,            OK,            OK,            OK,            NOT_FOUND),
    "CloseIO":    (NOT_FOUND, OK,            OK,            OK,            OK,            NOT_FOUND),
    "Update":     (NOT_FOUND, OK,            OK,            OK,            REFUSED,       NOT_FOUND),
    "Stats":      (NOT_FOUND, OK,            OK,            OK,            OK,            NOT_FOUND),
    "Connect":    (OK,        OK,            OK,            OK,            OK,            OK),
    "Shutdown":   (OK,        OK,            OK,            OK,            OK,            OK),
}

EXEC_STATES = ("absent", "created", "running", "stopped", "deleted")
EXEC_TABLE = {
    #             absent     created   running   stopped    deleted
    "State":      (NOT_FOUND, OK,       OK,       OK,        NOT_FOUND),
    "Exec":       (OK,        EXISTS,   EXISTS,   EXISTS,    OK),
    "Start":      (NOT_FOUND, OK,       REFUSED,  REFUSED,   NOT_FOUND),
    "Delete":     (NOT_FOUND, OK,       REFUSED,  OK,        NOT_FOUND),
    "Kill":       (NOT_FOUND, REFUSED,  OK,       NOT_FOUND, NOT_FOUND),
    "ResizePty":  (NOT_FOUND, OK,       OK,       OK,        NOT_FOUND),
    "CloseIO":    (NOT_FOUND, OK,       OK,       OK,        NOT_FOUND),
}
# fmt: on


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[TaskClient]:
    """The shim of a pod, whose own container keeps the VM up."""
    client = TaskClient(tmp_path, pod="pod")
    await client.create("pod")
    await client.start("pod")
    yield client
    await client.close()


async def bring(shim: TaskClient, state: str) -> None:
    """Container "c" into a state."""
    if state == "absent":
        return
    await shim.create()
    if state in {"running", "paused", "stopped"}:
        await shim.start()
    if state == "paused":
        await shim.call("Pause", id="c")
    if state == "stopped":
        shim.guest().exit(0)
        await shim.wait()
    if state == "deleted":
        await shim.delete()


async def bring_exec(shim: TaskClient, state: str) -> None:
    """Exec "e" of the running container "c" into a state."""
    await shim.create()
    await shim.start()
    if state == "absent":
        return
    await shim.exec()
    if state in {"running", "stopped"}:
        await shim.start(exec_id="e")
    if state == "stopped":
        shim.guest(exec_id="e").exit(0)
        await shim.wait(exec_id="e")
    if state == "deleted":
        await shim.delete(exec_id="e")


async def code(shim: TaskClient, rpc: str, exec_id: str = "") -> str:
    fields: dict[str, Any] = {"exec_id": exec_id} if exec_id else {}
    if rpc == "Kill":
        fields["signal"] = 0
    if rpc == "CloseIO":
        fields["stdin"] = True
    if rpc == "Update":
        fields["resources"] = any_pb2.Any(value=b"{}")
    try:
        if rpc == "Create":
            await shim.create()
        elif rpc == "Exec":
            await shim.exec(**fields)
        else:
            await shim.call(rpc, id="c", **fields)
    except KataError as error:
        return error.code
    return OK


@pytest.mark.parametrize("state", INIT_STATES)
@pytest.mark.parametrize("rpc", INIT_TABLE)
async def test_of_a_container(shim: TaskClient, rpc: str, state: str) -> None:
    await bring(shim, state)
    assert await code(shim, rpc) == INIT_TABLE[rpc][INIT_STATES.index(state)]


@pytest.mark.parametrize("state", EXEC_STATES)
@pytest.mark.parametrize("rpc", EXEC_TABLE)
async def test_of_an_exec(shim: TaskClient, rpc: str, state: str) -> None:
    await bring_exec(shim, state)
    assert await code(shim, rpc, "e") == EXEC_TABLE[rpc][EXEC_STATES.index(state)]


async def test_the_text_of_a_late_kill(shim: TaskClient) -> None:
    await bring(shim, "stopped")
    with pytest.raises(KataError, match=r"^process already finished: not found$"):
        await shim.kill()


async def test_a_kill_that_the_guest_finds_late(shim: TaskClient) -> None:
    """The process has ended in the guest, and the shim does not know yet."""
    await bring(shim, "running")
    shim.guest().exited.set_result(0)
    with pytest.raises(KataError, match=r"^process already finished: not found$"):
        await shim.kill()


async def test_a_signal_to_one_and_to_all(shim: TaskClient) -> None:
    """Without `all` it is for the init process alone; of an exec there is no "all"."""
    await bring_exec(shim, "running")
    init, exec_ = shim.guest(), shim.guest(exec_id="e")
    init.ignores = exec_.ignores = {1}
    await shim.kill(signal=1)
    assert (init.signals, exec_.signals) == ([1], [])
    await shim.kill(signal=1, everyone=True)
    assert (init.signals, exec_.signals) == ([1, 1], [1])
    await shim.kill(exec_id="e", signal=1, everyone=True)
    assert (init.signals, exec_.signals) == ([1, 1], [1, 1])


async def test_killing_all_of_nothing(shim: TaskClient) -> None:
    """CRI does it after each exit; runc's shim says it is done."""
    await bring(shim, "stopped")
    await shim.kill(everyone=True)


async def test_the_status_of_a_paused_container(shim: TaskClient) -> None:
    await bring(shim, "paused")
    assert (await shim.state()).status == task_types_pb2.PAUSED
    await shim.call("Resume", id="c")
    assert (await shim.state()).status == task_types_pb2.RUNNING
    assert shim.events.topics[-2:] == ["paused", "resumed"]
    assert shim.agent.paused == set()


async def test_a_paused_container_that_is_killed(shim: TaskClient) -> None:
    await bring(shim, "paused")
    await shim.kill()
    assert (await shim.wait()).exit_status == 137


@pytest.mark.parametrize(
    ("rpc", "fields"),
    [
        ("Kill", {"signal": 65}),
        ("ResizePty", {"width": 65536}),
        ("Exec", {"exec_id": "e", "spec": any_pb2.Any(value=b"{")}),
        ("Exec", {"exec_id": "e", "spec": any_pb2.Any(value=b"[]")}),
        ("Exec", {"exec_id": "../e", "spec": any_pb2.Any(value=b"{}")}),
        ("Exec", {"exec_id": "", "spec": any_pb2.Any(value=b"{}")}),
        ("Update", {"resources": any_pb2.Any(value=b'{"memory": []}')}),
        ("Update", {"resources": any_pb2.Any(value=b"\xff")}),
    ],
)
async def test_what_cannot_be_meant(shim: TaskClient, rpc: str, fields: dict[str, Any]) -> None:
    await bring(shim, "running")
    with pytest.raises(KataError) as caught:
        await shim.call(rpc, id="c", **fields)
    assert caught.value.code == INVALID
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/", ".hidden", "x" * 129, "a\nb", "a\0b", "ü"])
async def test_ids_that_could_be_paths(shim: TaskClient, name: str) -> None:
    with pytest.raises(KataError) as caught:
        await shim.call("Create", id=name, bundle=str(shim.directory))
    assert caught.value.code == INVALID


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, NOT_FOUND),
        (b"{", INVALID),
        (b"[]", INVALID),
        (b"[" * 100000, INVALID),
        (b" " * (4 << 20) + b"{}", INVALID),
    ],
    ids=["missing", "broken", "a list", "deep", "huge"],
)
async def test_bundles_without_a_spec(shim: TaskClient, content: bytes | None, expected: str) -> None:
    bundle = shim.directory / "bundle"
    bundle.mkdir()
    if content is not None:
        (bundle / "config.json").write_bytes(content)
    with pytest.raises(KataError, match=r"^bundle: .*config\.json") as caught:
        await shim.call("Create", id="c", bundle=str(bundle))
    assert caught.value.code == INVALID
    assert "\n" not in str(caught.value)


async def test_restoring_a_checkpoint_is_refused(shim: TaskClient) -> None:
    with pytest.raises(KataError) as caught:
        await shim.create(checkpoint="/somewhere")
    assert caught.value.code == UNIMPLEMENTED
    assert set(shim.manager.containers) == {"pod"}


def test_the_table_is_closed() -> None:
    """Nothing leads out of deleted, nothing into created, and each status but created is reached."""
    for kind in Kind:
        moves = [(before, after) for row in TABLE[kind].values() for before, after in row.items()]
        assert all(before is not Status.DELETED for before, _ in moves)
        assert all(after is not Status.CREATED for before, after in moves if before is not after)
    reached = {after for row in TABLE[Kind.INIT].values() for after in row.values()}
    assert reached == set(Status)
    assert Status.PAUSED not in {after for row in TABLE[Kind.EXEC].values() for after in row.values()}
    assert Call.PAUSE not in TABLE[Kind.EXEC]
