"""A child is started, watched, explained and ended; the undo log knows it meanwhile, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devices import mark
from devices.child import Child, describe_exit, process_start_time, thread_ids
from devices.confine import Confinement
from devices.console import Console
from devices.errors import HostError
from devices.mark import mark_children, mark_of, marked
from devices.undo import Entry, MemoryUndo

OPEN = Confinement(view=None, own_pids=False)
"""For children that are not looked at for what they may."""


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something outside this process; the test's own time-out is the deadline."""
    while not condition():  # noqa: ASYNC110  (no event comes from there)
        await asyncio.sleep(0.005)


async def shell(script: str, undo: MemoryUndo | None = None) -> Child:
    return await Child.spawn(
        ["/bin/sh", "-c", script], name="sh", undo=undo or MemoryUndo(), confinement=OPEN
    )


@pytest.mark.parametrize("code", [0, 1, 42, 255])
async def test_exit_codes_are_exact(code: int) -> None:
    child = await shell(f"exit {code}")

    assert await child.wait(10) == code


async def test_a_signal_is_a_negative_status() -> None:
    child = await shell("kill -TERM $$")

    assert await child.wait(10) == -signal.SIGTERM
    assert child.describe() == "was killed by SIGTERM"


async def test_all_output_is_there_when_exited_resolves() -> None:
    for _ in range(20):
        child = await shell("echo first; echo last >&2; exit 3")
        await child.wait(10)

        assert child.stderr_tail() == "first\nlast"


async def test_its_standard_output_can_be_apart() -> None:
    """A VMM's may be its guest's console."""
    console = Console()
    child = await Child.spawn(
        ["/bin/sh", "-c", "echo guest; echo mine >&2"],
        name="sh",
        undo=MemoryUndo(),
        confinement=OPEN,
        stdout=console.guest_end,
    )
    console.handed_over()
    await child.wait(10)
    console.drain()
    assert (child.stderr_tail(), console.tail()) == ("mine", "guest")
    console.close()


async def test_output_is_bounded_and_cleaned() -> None:
    child = await shell(r"head -c 300000 /dev/zero | tr '\0' x; printf '\n\033[31mred\033[0m\007 end\n'")
    await child.wait(20)

    assert len(child.output) == 64 << 10
    assert child.stderr_tail(1) == "red end"
    assert len(child.stderr_tail(2).splitlines()[0]) < 500


async def test_kill_is_idempotent_and_forgets_the_entry() -> None:
    undo = MemoryUndo()
    child = await shell("exec sleep 100", undo)

    assert undo.entries[0].facts == {
        "name": "sh",
        "pid": child.pid,
        "start": process_start_time(child.pid),
    }
    await asyncio.gather(child.kill(), child.kill())
    await child.kill()
    assert undo.entries == []
    assert not Path(f"/proc/{child.pid}").exists()


async def test_a_child_carries_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it is, in its environment and that of what it starts; nobody's has any without a mark set."""
    monkeypatch.setattr(mark, "_mark", {})
    assert marked({"A": "1"}) == {"A": "1"}
    mark_children("0123abcd" * 4, 77)
    for env in (None, {"A": "1"}):
        child = await Child.spawn(
            ["/bin/sh", "-c", "sleep 100 & echo $!; wait"],
            name="sh",
            undo=MemoryUndo(),
            confinement=OPEN,
            env=env,
        )
        await until(lambda child=child: bool(child.stderr_tail()))  # type: ignore[misc]
        for pid in (child.pid, int(child.stderr_tail())):
            assert mark_of(pid) == ("0123abcd" * 4, 77)
        os.kill(int(child.stderr_tail()), signal.SIGKILL)
        await child.kill()
    assert mark_of(os.getpid()) == ("", 0)
    with pytest.raises(OSError, match="No such"):
        mark_of(child.pid)


async def test_a_child_that_cannot_be_written_down_is_ended() -> None:
    """The journal's file system may be full just when its pid is known."""

    class Full(MemoryUndo):
        def update(self, entry: Entry, **facts: str | int) -> None:
            pids.append(int(facts["pid"]))
            raise HostError("cannot write the journal")

    pids: list[int] = []
    undo = Full()
    with pytest.raises(HostError, match="cannot write"):
        await shell("exec sleep 100", undo)

    assert not Path(f"/proc/{pids[0]}").exists()
    assert undo.entries == []


async def test_the_undo_log_can_end_it() -> None:
    undo = MemoryUndo()
    child = await shell("exec sleep 100", undo)

    assert await undo.release_all() == []
    assert child.exited.result() == -signal.SIGKILL


async def test_terminate_ends_what_ignores_sigterm() -> None:
    child = await shell("trap '' TERM; echo ready; while :; do sleep 1; done")
    await until(lambda: child.stderr_tail() != "")
    await child.terminate(0.05)

    assert child.exited.result() == -signal.SIGKILL


async def test_a_cancelled_waiter_harms_nobody() -> None:
    child = await shell("exec sleep 100")
    waiter = asyncio.create_task(child.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)

    assert child.alive
    with pytest.raises(TimeoutError):
        await child.wait(0.01)
    await child.kill()


async def test_a_program_that_is_not_there_is_named() -> None:
    undo = MemoryUndo()
    with pytest.raises(HostError, match="cannot start tool: /nope/tool does not exist"):
        await Child.spawn(["/nope/tool"], name="tool", undo=undo, confinement=OPEN)

    assert undo.entries == []


async def test_a_namespace_that_is_not_there_is_named() -> None:
    undo = MemoryUndo()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="network namespace /nope/netns"):
        await Child.spawn(
            ["/bin/true"], name="true", undo=undo, confinement=Confinement(network="/nope/netns")
        )

    assert undo.entries == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
async def test_only_the_child_enters_the_namespace() -> None:
    holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        await asyncio.to_thread(holder.stdout.readline)
        netns = f"/proc/{holder.pid}/ns/net"
        undo = MemoryUndo()
        for path, expected in ((netns, os.readlink(netns)), (None, os.readlink("/proc/self/ns/net"))):
            child = await Child.spawn(
                ["/bin/readlink", "/proc/self/ns/net"],
                name="readlink",
                undo=undo,
                confinement=Confinement(network=path),
            )
            await child.wait(10)

            assert child.stderr_tail() == expected
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


async def test_passed_descriptors_arrive_and_others_do_not() -> None:
    reader, writer = os.pipe()
    try:
        child = await Child.spawn(
            ["/bin/sh", "-c", f"echo hello >/proc/self/fd/{writer}; ls /proc/self/fd | wc -l"],
            name="sh",
            undo=MemoryUndo(),
            confinement=OPEN,
            pass_fds=[writer],
        )
        await child.wait(10)

        assert os.read(reader, 100) == b"hello\n"
        assert int(child.stderr_tail()) == 5  # 0, 1, 2, the pipe, and the one ls reads by
    finally:
        os.close(reader)
        os.close(writer)


async def test_nothing_is_leaked_by_many_children() -> None:
    await (await shell("exit 0")).wait(10)
    before = sorted(os.listdir("/proc/self/fd"))
    children = await asyncio.gather(*(shell("exit 0") for _ in range(20)))
    await asyncio.gather(*(child.wait(20) for child in children))

    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_a_cancelled_spawn_leaves_no_process() -> None:
    undo = MemoryUndo()
    spawning = asyncio.create_task(
        Child.spawn(["/bin/sleep", "987"], name="sleep", undo=undo, confinement=OPEN)
    )
    await asyncio.sleep(0)
    spawning.cancel()
    await asyncio.gather(spawning, return_exceptions=True)
    await asyncio.sleep(0)

    assert spawning.cancelled()
    assert undo.entries == []


def test_children_die_with_the_process_that_made_them(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, signal\n"
        "from devices.child import Child\n"
        "from devices.confine import Confinement\n"
        "from devices.undo import MemoryUndo\n"
        "async def main():\n"
        "    child = await Child.spawn(['/bin/sleep', '100'], name='sleep', undo=MemoryUndo(),"
        "        confinement=Confinement(user=2000000123))\n"
        "    await asyncio.sleep(0.2)\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead; whoever adopted it has not reaped it yet
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlived its maker")


async def test_threads_by_the_numbers_that_the_child_knows() -> None:
    """A VMM tells its threads by the numbers of its own pid namespace."""
    child = await Child.spawn(
        ["/bin/sleep", "100"], name="sleep", undo=MemoryUndo(), confinement=Confinement()
    )
    assert thread_ids(child.pid) == {1: child.pid}
    assert thread_ids(os.getpid())[os.getpid()] == os.getpid()
    await child.kill()
    with pytest.raises(ProcessLookupError):
        thread_ids(child.pid)


def test_statuses_in_words() -> None:
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-63) == "was killed by signal 63"


def test_the_start_time_of_nobody() -> None:
    with pytest.raises(ProcessLookupError):
        process_start_time(1 << 22)
