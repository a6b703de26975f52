"""What one daemon wrote down the next one has back: states, exits, streams; and nothing is told twice."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devices.errors import CallerError, GuestError
from devices.undo import MemoryUndo
from shim.protocols import VM_DEATH
from shim.state import recoveryfile
from shim.state.recoveryfile import SavedContainer
from shim.tasks.container_manager import ContainerManager
from shim.tasks.process import Status
from shim.tasks.recall import recall, snapshot, streams
from tests.unit.shim.fakes import Recorder, TaskClient
from tests.unit.shim.saved import process, saved


class Succession:
    """The first daemon's client, and the manager of the second."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = TaskClient(directory)
        self.events = Recorder()
        self.next = ContainerManager(self.client.runtime, self.events, namespace="default", undo=MemoryUndo())

    async def dies(self) -> tuple[SavedContainer, ...]:
        """The first daemon is gone; what it wrote down, as it is read back."""
        recoveryfile.write(str(self.directory), saved(*snapshot(self.client.manager.containers.values())))
        await self.client.manager.close()
        for sock in self.client.sandbox.opened:
            sock.close()
        return recoveryfile.read(str(self.directory)).containers

    async def recall(self, written: SavedContainer) -> None:
        container = self.next.known(
            written.id, written.bundle, self.client.sandbox, streams(written.processes[0])
        )
        try:
            await recall(container, written)
        except BaseException:
            await container.abandon()
            raise
        self.next.admit([container])


@pytest.fixture
async def succession(tmp_path: Path) -> AsyncIterator[Succession]:
    made = Succession(tmp_path)
    yield made
    await made.client.manager.close()
    await made.next.close()
    for sock in made.client.sandbox.opened:
        sock.close()


def _fifo(directory: Path, name: str) -> tuple[str, int]:
    path = str(directory / name)
    os.mkfifo(path)
    return path, os.open(path, os.O_RDWR | os.O_NONBLOCK)


async def test_who_runs_goes_on(succession: Succession) -> None:
    """Output comes by a new connection, a kill reaches the guest, and the exit is told once."""
    client = succession.client
    path, fd = _fifo(succession.directory, "out")
    await client.create(stdout=path)
    await client.call("Start", id="c")
    (written,) = await succession.dies()

    await succession.recall(written)

    container = succession.next.get("c")
    assert container.init.status is Status.RUNNING
    await client.guest().write(b"words")
    client.guest().exit(7)
    assert (await container.wait("")).status == 7
    assert os.read(fd, 100) == b"words"
    assert succession.events.topics == ["exit"]
    os.close(fd)


async def test_who_ended_meanwhile_has_its_own_status(succession: Succession) -> None:
    client = succession.client
    await client.create()
    await client.call("Start", id="c")
    (written,) = await succession.dies()
    client.guest().exit(7)

    await succession.recall(written)

    assert (await succession.next.get("c").wait("")).status == 7
    assert [event.exit_status for event in succession.events.of("exit")] == [7]


async def test_what_was_told_is_not_told_again(succession: Succession) -> None:
    """An exec that has ended stays so; one that was added can be started."""
    client = succession.client
    await client.create()
    await client.call("Start", id="c")
    for name in ("ended", "added"):
        await client.exec(exec_id=name, args=[name])
    await client.call("Start", id="c", exec_id="ended")
    client.guest(exec_id="ended").exit(3)
    before = (await client.call("Wait", id="c", exec_id="ended")).exited_at
    (written,) = await succession.dies()

    await succession.recall(written)

    container = succession.next.get("c")
    assert (await container.wait("ended")).at == before.ToNanoseconds()
    await container.start("added")
    assert list(client.guest(exec_id="added").spec.Args) == ["added"]
    assert succession.events.topics == ["exec-started"]
    await succession.next.delete("c", "ended")
    with pytest.raises(CallerError, match="not found"):
        container.process("ended")


async def test_who_was_paused_is(succession: Succession) -> None:
    client = succession.client
    await client.create()
    await client.call("Start", id="c")
    await client.call("Pause", id="c")
    (written,) = await succession.dies()

    await succession.recall(written)

    assert succession.next.get("c").init.status is Status.PAUSED
    await succession.next.resume("c")
    assert not client.agent.paused


async def test_who_has_not_begun_can(succession: Succession) -> None:
    client = succession.client
    await client.create()
    (written,) = await succession.dies()

    await succession.recall(written)

    await succession.next.start("c", "")
    assert client.guest().running


async def test_an_output_that_has_gone_is_dropped(succession: Succession) -> None:
    """The process must not stand still for a reader that will never come."""
    client = succession.client
    path, fd = _fifo(succession.directory, "out")
    await client.create(stdout=path)
    await client.call("Start", id="c")
    (written,) = await succession.dies()
    os.close(fd)
    os.unlink(path)

    await succession.recall(written)

    async with asyncio.timeout(20):
        await client.guest().write(b"x" * (1 << 20))
    client.guest().exit(0)
    assert (await succession.next.get("c").wait("")).status == 0


async def test_whom_the_guest_forgot_has_exited(succession: Succession) -> None:
    client = succession.client
    await client.create()
    await client.call("Start", id="c")
    (written,) = await succession.dies()
    client.agent.processes.clear()

    await succession.recall(written)

    assert (await succession.next.get("c").wait("")).status == VM_DEATH


async def test_a_guest_that_is_gone_is_told(succession: Succession) -> None:
    """Nothing is left of the attempt."""
    client = succession.client
    await client.create()
    await client.call("Start", id="c")
    (written,) = await succession.dies()
    client.sandbox.down.set_result(None)

    with pytest.raises(GuestError):
        await succession.recall(written)

    assert not succession.next.containers
    assert succession.events.topics == []


@pytest.mark.parametrize(
    "processes",
    [(process("e"),), (process(), process()), (process(status="gone"),), (process(), process("e", spec="?"))],
)
async def test_what_no_daemon_wrote_is_refused(
    succession: Succession, processes: tuple[recoveryfile.SavedProcess, ...]
) -> None:
    await succession.client.create()
    (written,) = await succession.dies()

    with pytest.raises(ValueError):  # noqa: PT011  (whose text is for nobody)
        await succession.recall(dataclasses.replace(written, processes=processes))


async def test_a_kill_reaches_it(succession: Succession) -> None:
    client = succession.client
    await client.create()
    await client.call("Start", id="c")
    (written,) = await succession.dies()
    await succession.recall(written)

    await succession.next.get("c").kill("", signal.SIGTERM)

    assert client.guest().signals == [signal.SIGTERM]
