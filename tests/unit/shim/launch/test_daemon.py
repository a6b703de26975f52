"""The daemon ends by itself when nobody needs it, and can be run in the foreground by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shim.launch import daemon
from tests.unit.shim.shims import REPO, Shims, shims_fixture
from ttrpc import Server


class _Service:
    """As idle as the test says."""

    def __init__(self, *idle: bool) -> None:
        self._idle = list(idle)
        self.looks = 0

    @property
    def idle(self) -> bool:
        self.looks += 1
        return self._idle.pop(0) if len(self._idle) > 1 else self._idle[0]

    def register(self, server: Server) -> None: ...

    async def take_over(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def shims() -> Iterator[Shims]:
    yield from shims_fixture()


_GIVEN_UP = """
import asyncio, sys
sys.path[:0] = [{repo!r}]
from shim.launch import daemon, launcher
make = daemon._link
async def link(*args):
    await make(*args)
    raise asyncio.CancelledError
daemon._link = link
launcher.main({argv!r})
"""


def test_one_that_is_ended_while_it_is_set_up_leaves_nothing(shims: Shims) -> None:
    """It never served: containerd asks nobody to clean up after it."""
    bundle = shims.bundle("c1")
    code = _GIVEN_UP.format(repo=str(REPO), argv=shims.argv(bundle, "daemon")[1:])
    ended = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=bundle.path,
        env=shims.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "the daemon failed" in ended.stderr
    assert not shims.state_dir(bundle).exists()
    assert not shims.link(bundle).is_symlink()
    assert os.listdir(f"{shims.root}/run/containerd/s") == []


async def test_idle_daemon_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """containerd died between start and Create: after the idle time the daemon asks for its end."""
    monkeypatch.setattr(daemon, "IDLE_LIMIT", 0.01)
    stop = asyncio.Event()

    async with asyncio.timeout(10):
        await daemon._end_when_idle(_Service(True), stop)

    assert stop.is_set()


async def test_busy_daemon_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a container, or one that was there at the last look, it goes on."""
    monkeypatch.setattr(daemon, "IDLE_LIMIT", 0.001)
    stop = asyncio.Event()
    service = _Service(False)
    timer = asyncio.create_task(daemon._end_when_idle(service, stop))
    while service.looks < 5:  # noqa: ASYNC110  (the stand-in has no event to wait for)
        await asyncio.sleep(0.001)

    assert not stop.is_set()
    assert not timer.done()
    timer.cancel()


async def test_shutdown_goes_on_past_errors() -> None:
    """A step that fails, or that takes too long, does not keep the next from running."""

    async def fails() -> None:
        raise OSError("no")

    await daemon._bounded("fails", fails(), 1.0)
    await daemon._bounded("hangs", asyncio.sleep(1000), 0.01)


def test_foreground(shims: Shims) -> None:
    """`daemon` serves in the foreground, tells its address on stderr, and ends cleanly on SIGINT."""
    bundle = shims.bundle("c1")
    with subprocess.Popen(
        shims.argv(bundle, "daemon"), cwd=bundle.path, env=shims.env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("unix:///")
        while '"serving"' not in process.stderr.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        rest = process.stderr.read()

    assert process.returncode == 0
    assert '"msg": "done"' in rest
