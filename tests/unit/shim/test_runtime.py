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

from devices.errors import CallerError, HypervisorError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.remote.config import RemoteConfig
from shim.config.schema import FactoryConfig, RuntimeConfig
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


class Clones(Handler):
    """One with templates: `sandboxes` are what `new_instance` makes, in turn."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup, *sandboxes: FakeSandbox) -> None:
        super().__init__(directory, tasks)
        self.sandboxes = list(sandboxes)
        self.templates: list[Any] = []

    async def _make(self, *arguments: Any) -> Any:
        return await VirtContainer._make(self, *arguments)

    async def _check_disks(self, spec: Mapping[str, Any]) -> None:
        pass

    async def _passed(self, *_arguments: Any) -> None:
        pass

    def new_instance(self, *_arguments: Any, template: Any = None) -> Any:
        self.templates.append(template)
        self.made.append(self.sandboxes[len(self.made)])
        return self.made[-1]


class Doubtful(FakeSandbox):
    """Its start fails; `template_failed`: whether by the template."""

    template_failed = True

    async def start(self) -> None:
        raise HypervisorError("it is broken")


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A factory that has one; the reasons why it was rejected."""
    config = SimpleNamespace(
        runtime=RuntimeConfig(),
        inactive=(),
        annotations=(),
        factory=FactoryConfig(enable_template=True),
        hypervisor=None,
    )
    rejected: list[str] = []

    async def obtain(*_: Any) -> tuple[str, str]:
        return "class", "/run/template"

    async def reject(_config: Any, wanted: Any, reason: str) -> None:
        rejected.append(f"{wanted}: {reason}")

    monkeypatch.setattr("shim.runtime.load_config", lambda **_: config)
    monkeypatch.setattr("shim.factory.factory.obtain", obtain)
    monkeypatch.setattr("shim.factory.factory.reject", reject)
    return rejected


async def test_a_pod_begins_with_the_template(tmp_path: Path, factory: list[str]) -> None:
    async with asyncio.TaskGroup() as tasks:
        handler = Clones(tmp_path, tasks, FakeSandbox("p"))
        sandbox = await _container(handler, "a")
        assert (sandbox.started, factory) == (True, [])
        assert handler.templates == [("class", "/run/template")]


async def test_a_template_that_fails_is_rejected_and_the_vm_boots(tmp_path: Path, factory: list[str]) -> None:
    async with asyncio.TaskGroup() as tasks:
        handler = Clones(tmp_path, tasks, Doubtful("p"), FakeSandbox("p"))
        sandbox = await _container(handler, "a")
        first, second = handler.made
        assert (first.stopped, second is sandbox, second.started) == (True, True, False)
        assert handler.templates == [("class", "/run/template"), None]
        assert len(factory) == 1
        assert "it is broken" in factory[0]


async def test_what_fails_after_the_template_is_the_pods_failure(
    tmp_path: Path, factory: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Doubtful, "template_failed", False)
    async with asyncio.TaskGroup() as tasks:
        handler = Clones(tmp_path, tasks, Doubtful("p"))
        with pytest.raises(HypervisorError, match="it is broken"):
            await _container(handler, "a")
        assert (handler.made[0].stopped, factory) == (True, [])


async def test_a_pod_of_the_sandbox_api_boots(tmp_path: Path, factory: list[str]) -> None:
    async with asyncio.TaskGroup() as tasks:
        handler = Clones(tmp_path, tasks, FakeSandbox("p"))
        await handler.make_pod({}, AnyMessage(), DEFAULTS)
        assert (handler.templates, factory) == ([None], [])
