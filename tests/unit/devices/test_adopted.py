"""A child that outlives its parent keeps its stderr; who adopts it reads on, sees its end and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from devices.adopted import UNKNOWN, adopt
from devices.child import Child, process_start_time
from devices.errors import HostError
from devices.undo import MemoryUndo

_PARENT = """
import asyncio, os, sys
from devices.child import Child
from devices.confine import Confinement
from devices.outlive import let_children_outlive
from devices.undo import MemoryUndo

async def main():
    let_children_outlive()
    child = await Child.spawn(
        ["/bin/sh", "-c", sys.argv[1]], name="child", undo=MemoryUndo(), confinement=Confinement()
    )
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


class Orphans:
    """Children of parents that were killed by SIGKILL."""

    def __init__(self) -> None:
        self.undo = MemoryUndo()
        self.pids: list[int] = []

    def make(self, script: str) -> int:
        parent = subprocess.run([sys.executable, "-c", _PARENT, script], stdout=subprocess.PIPE, check=False)
        assert parent.returncode == -signal.SIGKILL
        self.pids.append(int(parent.stdout))
        return self.pids[-1]

    def adopt(
        self, pid: int, start: int | None = None, on_output: Callable[[bytes], None] | None = None
    ) -> Child:
        start = process_start_time(pid) if start is None else start
        entry = self.undo.record("process", name="child", pid=pid, start=start)
        return adopt("child", pid, start, undo=self.undo, entry=entry, on_output=on_output)


@pytest.fixture
def orphans() -> Iterator[Orphans]:
    made = Orphans()
    yield made
    for pid in made.pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_it_says_more_than_a_pipe_holds_and_loses_nothing(orphans: Orphans) -> None:
    """Without a reader it waits, and is not ended by a write; with one it goes on."""
    pid = orphans.make("yes 0123456789 | head -c 100000; echo; echo over; exec sleep 1000")
    over = asyncio.Event()
    child = orphans.adopt(pid, on_output=lambda data: over.set() if b"over" in data else None)

    await asyncio.wait_for(over.wait(), 60)
    assert child.output.total == 100_006
    assert child.alive


async def test_its_end_is_seen_and_the_undo_log_forgets_it(orphans: Orphans) -> None:
    child = orphans.adopt(orphans.make("exec sleep 1000"))

    await orphans.undo.release(orphans.undo.entries[0])

    assert child.exited.result() == UNKNOWN
    assert child.describe() == "ended; nobody saw how"
    assert orphans.undo.entries == []


async def test_another_one_under_the_same_pid_is_left_alone(orphans: Orphans) -> None:
    pid = orphans.make("exec sleep 1000")

    with pytest.raises(HostError, match="has ended"):
        orphans.adopt(pid, start=process_start_time(pid) - 1)
