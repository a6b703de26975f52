"""A task's life with an agent that has nothing of ours, by the calls of Kata's protocol over a connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from devices.errors import CallerError, KataError
from proto import agent_pb2, oci_pb2
from shim.protocols import Deadlines, GuestContainer
from shim.sandbox.agent_client import GuestAgent
from shim.sandbox.oom_watch import watch_oom
from shim.state.trace import Trace
from tests.unit.shim.fakes import FakeSandbox, TaskClient
from tests.unit.shim.plain_agent import PlainAgent
from ttrpc import Client

MIB = 1 << 20
Both = tuple[TaskClient, PlainAgent]


@pytest_asyncio.fixture
async def both(tmp_path: Path) -> AsyncIterator[Both]:
    """A shim whose sandbox has such an agent."""
    agent = PlainAgent()
    async with agent as sock:
        guest = GuestAgent(Client(sock), Deadlines(kill=5), Trace("s"))
        client = TaskClient(tmp_path, direct=False)

        def prepare(sandbox: FakeSandbox) -> None:
            sandbox._agent = guest  # type: ignore[assignment]

        client.runtime.prepare = prepare
        yield client, agent
        await client.close()
        await guest.close()


def _file(directory: Path, name: str) -> str:
    return f"file://{directory}/{name}"


async def test_output_of_both_streams_and_the_exit(both: Both, tmp_path: Path) -> None:
    """All that was written before the exit is there, although the agent forgets the process with its exit."""
    shim, agent = both
    await shim.create(stdout=_file(tmp_path, "out"), stderr=_file(tmp_path, "err"))
    await shim.start()
    process = await agent.process("c")
    noise = os.urandom(MIB)
    process.write(noise)
    process.write(b"err\n", "stderr")
    process.exit(7)
    assert (await shim.wait()).exit_status == 7
    assert (tmp_path / "out").read_bytes() == noise
    assert (tmp_path / "err").read_bytes() == b"err\n"
    assert agent.containers == {"c": {}}, "forgotten"
    await shim.delete()
    (create,) = (request for name, request in agent.calls if name == "create_container")
    assert (create.stdin_port, create.stdout_port, create.stderr_port) == (0, 0, 0)


async def test_input_arrives_and_ends(both: Both, tmp_path: Path) -> None:
    shim, agent = both
    os.mkfifo(tmp_path / "in")
    await shim.create(stdin=str(tmp_path / "in"), stdout=_file(tmp_path, "out"))
    await shim.start()
    process = await agent.process("c")
    data = os.urandom(MIB)
    await asyncio.to_thread((tmp_path / "in").write_bytes, data)
    await shim.call("CloseIO", id="c", stdin=True)
    async with asyncio.timeout(10):
        await process.stdin_closed.wait()
    assert process.stdin == data
    process.exit(0)
    await shim.wait()
    await shim.delete()


async def test_a_terminal_is_read_by_one_call_and_ends_with_an_error(both: Both, tmp_path: Path) -> None:
    """Kata's agent answers ReadStderr of a terminal with its output, too: what asks for it takes it away."""
    shim, agent = both
    await shim.create(stdout=_file(tmp_path, "out"), terminal=True)
    await shim.start()
    process = await agent.process("c")
    process.terminal = True
    await shim.call("ResizePty", id="c", width=120, height=40)
    process.write(b"hello\r\n")
    process.exit(0)
    assert (await shim.wait()).exit_status == 0
    assert (tmp_path / "out").read_bytes() == b"hello\r\n"
    assert process.window == (40, 120)
    await shim.delete()


async def test_execs_signals_and_what_is_not_there(both: Both, tmp_path: Path) -> None:
    shim, agent = both
    await shim.create()
    await shim.start()
    await shim.exec(stdout=_file(tmp_path, "exec"))
    await shim.start(exec_id="e")
    exec_ = await agent.process("c", "e")
    exec_.write(b"from exec")
    await shim.kill(exec_id="e", signal=10)
    assert (await shim.wait(exec_id="e")).exit_status == 138
    assert (tmp_path / "exec").read_bytes() == b"from exec"
    await shim.delete(exec_id="e")
    await shim.exec(exec_id="missing", args=["/nonexistent"])
    with pytest.raises(KataError, match="No such file or directory"):
        await shim.start(exec_id="missing")
    # Nobody lists processes there: those that containerd knows are answered.
    assert [process.pid for process in (await shim.call("Pids", id="c")).processes] == [shim.sandbox.vmm_pid]
    await shim.kill(everyone=True)
    assert (await shim.wait()).exit_status == 137
    await shim.delete()
    signals = [(each.exec_id, each.signal) for name, each in agent.calls if name == "signal_process"]
    assert signals[:2] == [("e", 10), ("", 9)]


async def test_statistics_pauses_and_updates(both: Both) -> None:
    """An update leaves out what only our agent understands: CPUs by the host's numbers."""
    shim, agent = both
    await shim.create()
    await shim.start()
    await shim.call("Stats", id="c")
    await shim.call("Pause", id="c")
    await shim.call("Resume", id="c")
    resources = oci_pb2.LinuxResources(CPU=oci_pb2.LinuxCPU(Cpus="0-1", Quota=5000))
    await shim.manager.get("c").update(resources, beyond={})
    (update,) = (request for name, request in agent.calls if name == "update_container")
    assert (update.resources.CPU.Cpus, update.resources.CPU.Quota) == ("", 5000)
    with pytest.raises(CallerError, match="the guest's agent has no place for") as caught:
        await shim.manager.get("c").update(resources, beyond={"unified": {"memory.high": "9"}})
    assert caught.value.code == "UNIMPLEMENTED"
    await shim.kill()
    await shim.wait()
    await shim.delete()


async def test_the_kernels_kills_for_memory_are_heard() -> None:
    agent = PlainAgent()
    async with agent as sock:
        guest = GuestAgent(Client(sock), Deadlines(), Trace("s"))
        heard: asyncio.Queue[str] = asyncio.Queue()
        watching = asyncio.create_task(watch_oom(guest, heard.put_nowait))
        agent.oom.put_nowait("c1")
        async with asyncio.timeout(10):
            assert await heard.get() == "c1"
        await guest.check(5)
        assert not await guest.has_loopback()
        await guest.close()
        await watching


async def test_fields_that_kata_has_no_place_for_are_refused() -> None:
    agent = PlainAgent()
    async with agent as sock:
        guest = GuestAgent(Client(sock), Deadlines(), Trace("s"))
        container = GuestContainer(spec=oci_pb2.Spec(), beyond={"process": {"user": {"umask": 7}}})
        with pytest.raises(CallerError, match=r"no place for process\.user\.umask"):
            await guest.create_container("c", container)
        assert [name for name, _ in agent.calls] == ["get_guest_details"]
        assert isinstance(agent.calls[0][1], agent_pb2.GuestDetailsRequest)
        await guest.close()
