"""The end of a sandbox needs neither its guest nor its agent, and no VM outlives the means to ask it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.empty_pb2 import Empty

from agent.service import HealthService
from devices.undo import MemoryUndo
from hypervisors.base import Capabilities, VmExit
from proto import agent_pb2, health_pb2
from shim.protocols import Deadlines
from shim.resources.network.settings import NetworkSettings
from shim.resources.sizing import Bounds
from shim.sandbox import loss as loss_module
from shim.sandbox import running as running_module
from shim.sandbox import sandbox as sandbox_module
from shim.sandbox.health import HealthSettings
from shim.sandbox.sandbox import VirtSandbox
from shim.sandbox.settings import SandboxSettings
from shim.spec.limits import Size
from shim.state.trace import Trace
from ttrpc import Server

STOP = 0.3  # seconds that the guest has to unmount
BUSY = 3.0  # more, for a machine that has other things to do


class Vm:
    """A hypervisor whose VM is a ttrpc server: of its agent only what a sandbox needs to start and to end.

    `silent`: the agent answers nothing any more. `log`: what was done with it, in order.
    """

    def __init__(self, state_dir: str) -> None:
        self.state_dir = state_dir
        loop = asyncio.get_running_loop()
        self.log: list[str] = []
        self.silent = False
        self.ended: asyncio.Future[VmExit] = loop.create_future()
        self._server = Server()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # a name of the kernel's choice
        self._listener.listen()
        self._serving: asyncio.Task[None] | None = None

    # --- the hypervisor

    def diagnostics(self) -> dict[str, str]:
        return {"guest console": "the last line"}

    async def capabilities(self) -> Capabilities:
        return Capabilities()

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002
        pass

    async def start_vm(self, timeout: float) -> None:
        self._server.register(agent_pb2.DESCRIPTOR.services_by_name["AgentService"], self)
        self._server.register(health_pb2.DESCRIPTOR.services_by_name["Health"], _Health(self))
        self._serving = asyncio.create_task(self._server.serve(self._listener))

    async def get_vmm_master_tid(self) -> int:
        return os.getpid()

    async def wait_vm(self) -> VmExit:
        return await asyncio.shield(self.ended)

    async def get_agent_socket(self) -> Any:
        return self

    async def stop_vm(self) -> None:
        self.log.append("stop_vm")
        self.end(VmExit(-9, "the VM was stopped", expected=True))

    async def cleanup(self) -> None:
        self.log.append("cleanup")
        await self.hang_up()

    # --- its channel

    async def wait_ready(self, timeout: float) -> None:
        pass

    async def connect(self, port: int, timeout: float) -> tuple[socket.socket, int]:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(self._listener.getsockname())
        return sock, port

    # --- its agent

    async def create_sandbox(self, _ctx: object, _request: object) -> Empty:
        return Empty()

    async def get_oom_event(self, _ctx: object, _request: object) -> agent_pb2.OOMEvent:
        await self.ended
        return agent_pb2.OOMEvent()

    async def remove_container(self, _ctx: object, request: Any) -> Empty:
        self.log.append(f"remove {request.container_id}")
        await self.answer()
        return Empty()

    async def answer(self) -> None:
        if self.silent:
            await asyncio.wait([self.ended])

    # --- the test

    def end(self, ended: VmExit) -> None:
        if not self.ended.done():
            self.ended.set_result(ended)

    async def hang_up(self) -> None:
        """The agent's end of the connection goes."""
        await self._server.close(0)
        if self._serving is not None:
            await self._serving
        self._listener.close()


class _Health(HealthService):
    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    async def check(self, context: Any, request: Any) -> health_pb2.HealthCheckResponse:
        await self._vm.answer()
        return await super().check(context, request)


class _Files:
    """None."""

    async def set_up(self) -> None:
        pass

    def sandbox_storages(self) -> list[Any]:
        return []

    async def tear_down(self) -> list[Exception]:
        return []


class Started(VirtSandbox):
    """One with that VM, which runs."""

    def __init__(self, vm: Vm, tasks: asyncio.TaskGroup, health: HealthSettings, stop: float) -> None:
        size = Size(1.0, 256 << 20)
        settings = SandboxSettings(
            sandbox_id="s",
            key="0" * 32,
            alias="s",
            state_dir=vm.state_dir,
            container_type="single_container",
            network=NetworkSettings(),
            hostname="h",
            dns=(),
            shm_size=1 << 20,
            share_path="/none",
            devices=(),
            deadlines=Deadlines(stop=stop),
            bounds=Bounds(size, size, size),
            health=health,
        )
        super().__init__(
            settings, cast("Any", vm), undo=MemoryUndo(), tasks=tasks, trace=Trace("s"), on_oom=lambda _: None
        )
        self._files = cast("Any", _Files())

    def wrote(self, *names: str) -> None:
        """These containers have disks that they write to."""
        self._containers.writing.update(names)


@pytest.fixture
async def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vm:
    monkeypatch.setattr(loss_module, "_GATHER", 0.2)
    monkeypatch.setattr(running_module, "_SILENT", 0.1)
    monkeypatch.setattr(sandbox_module, "_PULSE", 1.0)
    return Vm(str(tmp_path))


@contextlib.asynccontextmanager
async def started(
    vm: Vm,
    health: HealthSettings = HealthSettings(0),  # noqa: B008
    stop: float = STOP,
) -> AsyncIterator[Started]:
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        sandbox = Started(vm, tasks, health, stop)
        await sandbox.start()
        try:
            yield sandbox
        finally:
            await sandbox.stop()


async def test_a_vm_does_not_outlive_its_agents_connection(vm: Vm) -> None:
    """Nobody can end anything in it any more, and what ran there has been told as ended."""
    async with started(vm) as sandbox:
        await vm.hang_up()
        reason = await asyncio.wait_for(asyncio.shield(sandbox.died), BUSY)
        assert "the connection to the agent ended, and its VM ran on" in reason
        assert "guest console: the last line" in reason
        assert vm.log == ["stop_vm"]


async def test_a_vms_own_death_is_the_better_reason(vm: Vm) -> None:
    async with started(vm) as sandbox:
        await vm.hang_up()
        vm.end(VmExit(-9, "qemu was killed by SIGKILL"))
        assert "qemu was killed by SIGKILL" in await asyncio.wait_for(asyncio.shield(sandbox.died), BUSY)
        await asyncio.sleep(0.3)
        assert vm.log == []


async def test_disks_are_unmounted_at_once_under_one_deadline(vm: Vm) -> None:
    """A hundred containers of a guest that does not answer take no longer than one."""
    async with started(vm) as sandbox:
        names = [f"c{number}" for number in range(100)]
        sandbox.wrote(*names)
        vm.silent = True
        began = time.monotonic()
        await sandbox.stop()
        assert time.monotonic() - began < STOP + BUSY
        assert sorted(vm.log[:100]) == sorted(f"remove {name}" for name in names)
        assert vm.log[100:] == ["stop_vm", "cleanup"]
        assert not sandbox.died.done(), "it was stopped"


async def test_a_guest_that_answers_unmounts_before_its_vm_ends(vm: Vm) -> None:
    async with started(vm) as sandbox:
        sandbox.wrote("c")
        await sandbox.stop()
        assert vm.log == ["remove c", "stop_vm", "cleanup"]


async def test_what_is_known_is_not_waited_for(vm: Vm) -> None:
    async with started(vm, stop=20.0) as sandbox:
        vm.silent = True
        sandbox.doubt("it did not end c after SIGKILL")
        assert sandbox.unresponsive
        sandbox.wrote("c")
        began = time.monotonic()
        await sandbox.stop()
        assert time.monotonic() - began < BUSY
        sandbox.doubt("too late to matter")


async def test_a_silent_guest_is_not_asked_to_let_go(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that it holds go with the VM then; the rest of the container is released all the same."""
    async with started(vm) as sandbox:
        released: list[bool] = []

        async def release(_name: str, *, alive: bool) -> None:
            released.append(alive)

        monkeypatch.setattr(sandbox._containers, "plugged", lambda _: True)
        monkeypatch.setattr(sandbox._containers, "release", release)
        await sandbox.release_container("c")
        vm.silent = True
        await sandbox.release_container("c")
        assert released == [True, False]
        assert sandbox.unresponsive
        began = time.monotonic()
        await sandbox.release_container("c")
        assert time.monotonic() - began < 1.0, "it is known by now"


async def test_a_silent_guest_is_ended_where_that_is_wanted(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim.sandbox.health.RETRY", 0.01)
    async with started(vm, HealthSettings(0.01, 0.05, ends=True)) as sandbox:
        vm.silent = True
        reason = await asyncio.wait_for(asyncio.shield(sandbox.died), BUSY)
        assert "the guest does not answer: it did not answer 3 questions for its health" in reason
        assert vm.log == ["stop_vm"]
        assert os.listdir(vm.state_dir) == ["health.json"]
