"""A Firecracker is stopped by SIGKILL at once, whatever it does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devices.errors import HypervisorError
from devices.undo import MemoryUndo
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.vmm import Firecracker

# A Firecracker that says yes to everything, and does nothing.
SCRIPT = f"""#!{sys.executable} -IS
import signal, socket
listener = socket.socket(socket.AF_UNIX)
listener.bind("fc.sock")
listener.listen()
peer, _ = listener.accept()
while data := peer.recv(1 << 16):
    peer.sendall(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
signal.pause()
"""
BUSY = 5.0  # seconds more, for a machine that has other things to do


@pytest.fixture
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Firecracker]:
    """One that has started; afterwards nothing of it is left."""
    monkeypatch.setattr(os, "access", lambda *_: True)  # there need be no /dev/kvm
    program = tmp_path / "firecracker"
    program.write_text(SCRIPT)
    program.chmod(0o755)
    kernel = tmp_path / "kernel"
    kernel.write_text("")
    state = tmp_path / "state"
    state.mkdir()
    undo = MemoryUndo()
    section = FirecrackerConfig(path=str(program), kernel=str(kernel), initrd=str(kernel), image=str(kernel))
    vm = Firecracker(section, sandbox_id="vm", state_dir=str(state), undo=undo)
    await vm.prepare_vm("vm", None)
    yield vm
    await vm.cleanup()
    assert await vm.get_pids() == []
    assert undo.entries == []


async def stopped(vm: Firecracker) -> int:
    """How it ended, having been stopped by two at once, in time."""
    began = time.monotonic()
    await asyncio.gather(vm.stop_vm(), vm.stop_vm())
    assert time.monotonic() - began < BUSY
    ended = await vm.wait_vm()
    assert (ended.expected, ended.reason) == (True, "the VM was stopped")
    return ended.code


async def test_a_stop_is_sigkill(running: Firecracker) -> None:
    await running.start_vm(20)
    assert await stopped(running) == -signal.SIGKILL


async def test_one_that_stands_still(running: Firecracker) -> None:
    """SIGKILL ends it, and a call that waits for its answer."""
    await running.start_vm(20)
    os.kill(await running.get_vmm_master_tid(), signal.SIGSTOP)
    call = asyncio.create_task(running.pause_vm())
    await asyncio.sleep(0)
    assert await stopped(running) == -signal.SIGKILL
    with pytest.raises(HypervisorError):
        await call


async def test_a_stop_before_it_answers(running: Firecracker) -> None:
    """Nothing runs yet that could be asked: no time is lost."""
    starting = asyncio.create_task(running.start_vm(20))
    while not await running.get_pids():  # noqa: ASYNC110  (there is no event for it)
        await asyncio.sleep(0)
    await running.stop_vm()
    with pytest.raises(HypervisorError, match="stopped"):
        await starting
