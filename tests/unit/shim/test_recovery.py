"""How things stand is written down before containerd hears of it, and is not offered when it is not so."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from devices.errors import ConfigError, HostError
from hypervisors.registry import register_built_in
from shim import recovery
from shim.protocols import DaemonContext
from shim.recovery import Keeper, check
from shim.sandbox.recovered import RecoveredSandbox
from shim.state import recoveryfile
from tests.unit.shim.fakes import Recorder, TaskClient
from tests.unit.shim.saved import saved


class Kept:
    """A daemon's containers with a Keeper, whose sandbox was recovered."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.state.mkdir()
        self.client = TaskClient(directory)
        self.events = Recorder()
        context = SimpleNamespace(
            state_dir=str(self.state),
            events=self.events,
            id="c",
            address="unix:///run/s",
            config_path="",
            publish_binary="",
            runtime_class="",
            alias="c",
            debug=False,
        )
        self.keeper = Keeper(cast("DaemonContext", context), self.client.manager)

    async def create(self) -> None:
        await self.client.create()
        sandbox = cast("Any", self.client.sandbox)
        sandbox.writing = {"c"}
        self.keeper.go_on(cast("RecoveredSandbox", sandbox), saved())
        await asyncio.sleep(0)

    def written(self) -> recoveryfile.Saved:
        return recoveryfile.read(str(self.state))


async def test_each_change_is_written_before_it_is_answered(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    await kept.create()
    statuses = []
    for call in ("Start", "Pause", "Resume"):
        await kept.client.call(call, id="c")
        statuses.append(kept.written().containers[0].processes[0].status)
    assert statuses == ["running", "paused", "running"]
    await kept.client.exec()
    assert [each.exec_id for each in kept.written().containers[0].processes] == ["", "e"]
    assert kept.written().containers[0].processes[1].spec
    await kept.client.call("CloseIO", id="c", stdin=True)
    await asyncio.sleep(0)
    assert kept.written().containers[0].processes[0].input_over
    assert kept.written().sandbox.writing == ("c",)
    assert kept.events.topics == ["create", "start", "paused", "resumed", "exec-added"]
    await kept.client.manager.close()


async def test_nothing_is_offered_after_the_end(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    await kept.create()
    await kept.client.call("Start", id="c")
    assert kept.written()

    kept.client.guest().exit(0)
    await kept.client.call("Wait", id="c")
    await kept.client.call("Delete", id="c")

    assert list(kept.state.iterdir()) == []
    await kept.client.manager.close()


async def test_what_cannot_be_written_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old state would have the next shim tell exits twice."""
    kept = Kept(tmp_path)
    await kept.create()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recoveryfile, "write", full)
    await kept.client.call("Start", id="c")

    assert list(kept.state.iterdir()) == []
    await kept.client.manager.close()


def test_a_vmm_that_cannot_is_refused() -> None:
    register_built_in()

    check("qemu")
    with pytest.raises(ConfigError, match="under firecracker cannot be taken over"):
        check("firecracker")


def test_another_schema_is_told() -> None:
    """What a newer shim has besides is left to its default; what cannot be said in it is refused."""
    register_built_in()
    context = cast("DaemonContext", SimpleNamespace(sandbox_id="c", state_dir="/s", undo=None))
    old = saved().sandbox

    vm = recovery._hypervisor(context, dataclasses.replace(old, section={"gone": 1, "path": "/q"}))
    assert cast("Any", vm)._section.path == "/q"
    for vm_saved, words in (
        ({**old.vm, "pid": "7"}, "sandbox.vm.pid is no int"),
        ({}, "is missing, or unknown"),
    ):
        with pytest.raises(HostError, match=words):
            recovery._state(dataclasses.replace(old, vm=vm_saved))
    with pytest.raises(ConfigError, match="unheard-of"):
        recovery._hypervisor(context, dataclasses.replace(old, hypervisor="unheard-of"))
