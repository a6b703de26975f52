"""Work in a namespace is done by threads that end; the daemon stays where it is."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from devices.errors import HostError
from shim.resources.network.netns import Netns
from tests.netlab import NetLab


def _here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


async def test_a_call_runs_inside_and_nothing_stays_there(lab: NetLab) -> None:
    before = _here()
    netns = Netns.open(lab.pod)
    assert netns is not None
    found = await netns.run(_here)
    assert found == os.stat(lab.pod).st_ino != before
    assert _here() == await asyncio.to_thread(_here) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "netns" and thread.is_alive()]
    netns.close()
    netns.close()


async def test_a_new_one_is_empty_and_has_a_path_for_others() -> None:
    netns = await Netns.create()
    assert await netns.run(lambda: os.listdir("/proc/thread-self/net/dev_snmp6")) == ["lo"]
    assert os.stat(netns.path).st_ino == await netns.run(_here)
    path = netns.path
    netns.close()
    assert not os.path.exists(path)


def test_the_hosts_own_is_nobodys_pod() -> None:
    before = os.listdir("/proc/self/fd")
    assert Netns.open("/proc/self/ns/net") is None
    assert os.listdir("/proc/self/fd") == before


def test_one_that_is_not_there_is_named() -> None:
    with pytest.raises(HostError, match="network namespace /nowhere cannot be opened"):
        Netns.open("/nowhere")


@pytest.mark.parametrize("what", ["fifo", "file", "pid"])
def test_what_is_none_is_refused(tmp_path: Path, what: str) -> None:
    """A FIFO would hold up whoever opens it, the event loop with him."""
    path = "/proc/self/ns/pid"
    if what != "pid":
        path = str(tmp_path / what)
        os.mkfifo(path) if what == "fifo" else Path(path).touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match="cannot be opened: it is no network namespace"):
        Netns.open(path)
    assert os.listdir("/proc/self/fd") == before


async def test_errors_come_back(lab: NetLab) -> None:
    netns = Netns.open(lab.pod)
    assert netns is not None
    with pytest.raises(ZeroDivisionError):
        await netns.run(lambda: 1 // 0)
    netns.close()


async def test_who_is_cancelled_waits_for_the_end_of_the_call(lab: NetLab) -> None:
    """What the call acquired is known then, and can be released."""
    netns = Netns.open(lab.pod)
    assert netns is not None
    begun, go, done = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        go.wait(30)
        done.append(1)

    task = asyncio.create_task(netns.run(work))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, go.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [1]
    netns.close()
