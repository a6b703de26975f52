"""One shim makes one sandbox, whoever asks for it at the same time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import CallerError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.remote.config import RemoteConfig
from shim.protocols import DaemonContext
from shim.runtime import VirtContainer
from shim.sandbox.pod_config import PodDefaults
from shim.tasks.container_manager import ContainerManager
from tests.unit.shim.fakes import FakeSandbox, Recorder

DEFAULTS = PodDefaults({}, {})


class Handler(VirtContainer):
    """One whose sandboxes take their time to be made, and are counted."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        context = DaemonContext(
            namespace="default",
            id="p",
            sandbox_id="p",
            containerd="/c.sock",
            key="0" * 32,
            alias="p",
            bundle=str(directory),
            address="unix:///s",
            publish_binary="",
            config_path="",
            state_dir=str(directory),
            share_dir=str(directory / "share"),
            debug=False,
            events=Recorder(),
            undo=MemoryUndo(),
            shutdown=lambda: None,
        )
        super().__init__(context, tasks)
        self.manager = ContainerManager(self, Recorder(), namespace="default", undo=MemoryUndo())
        self.made: list[FakeSandbox] = []

    async def _make(self, *_arguments: Any) -> Any:
        await asyncio.sleep(0.01)
        self.made.append(FakeSandbox("p"))
        return self.made[-1]

    def _check(self, spec: Mapping[str, Any]) -> None:
        pass


def _container(handler: Handler, name: str) -> Any:
    return handler.sandbox_for(name, "", {}, AnyMessage())


async def test_two_first_containers_have_one_sandbox(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        handler = Handler(tmp_path, tasks)
        first, second = await asyncio.gather(_container(handler, "a"), _container(handler, "b"))
        assert first is second
        assert handler.made == [first]
        await first.stop()
        assert await _container(handler, "c") is handler.made[1], "after its end there may be another"


@pytest.mark.parametrize("pod_first", [True, False])
async def test_a_container_and_a_pod_at_once(tmp_path: Path, pod_first: bool) -> None:
    """Whoever comes second is refused: a pod that does not run takes no container, a container no pod."""
    async with asyncio.TaskGroup() as tasks:
        handler = Handler(tmp_path, tasks)
        work = [handler.make_pod({}, AnyMessage(), DEFAULTS), _container(handler, "a")]
        outcomes = await asyncio.gather(*(work if pod_first else reversed(work)), return_exceptions=True)
        assert [isinstance(outcome, CallerError) for outcome in outcomes] == [False, True]
        assert len(handler.made) == 1
        assert os.listdir(tmp_path) == []


async def test_a_vm_on_another_machine_gets_no_disks(tmp_path: Path) -> None:
    """Refused, with what to do, before a VM is asked for."""
    async with asyncio.TaskGroup() as tasks:
        handler = VirtContainer(Handler(tmp_path, tasks)._context, tasks)
        handler._config = SimpleNamespace(hypervisor=RemoteConfig(), hypervisor_name="remote")  # type: ignore[assignment]
        rule = {"allow": True, "type": "b", "major": 7, "minor": 0, "access": "rw"}
        disk = {"path": "/dev/disk", "type": "b", "major": 7, "minor": 0}
        spec = {"linux": {"devices": [disk], "resources": {"devices": [rule]}}}
        with pytest.raises(UnsupportedByHypervisor, match=r"/dev/disk: .*another machine") as caught:
            await handler._check_disks(spec)
        assert "under a VMM of this host" in caught.value.hint
        await handler._check_disks({"mounts": [{"destination": "/x", "source": "/", "options": ["bind"]}]})
        with pytest.raises(CallerError, match="no annotation of the container names one"):
            handler._check({})
