"""A pod gets a template, or the reason why its VM boots; whatever the making of one meets, nothing is left of
it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from devices.errors import HypervisorError
from devices.undo import MemoryUndo
from shim.config import Config, load_config
from shim.factory import build as build_module
from shim.factory import factory
from shim.factory.cold import Cold
from shim.factory.factory import obtain, reject, why_cold
from shim.factory.store import Store
from shim.factory.template_class import template_class
from shim.state.trace import Trace


class Vm:
    """Saves two words. `fails`: the name of the method that does; `running`: whether it still does."""

    fails = ""
    running = 0
    gate: asyncio.Event | None = None

    def __init__(self, section: Any, **_: Any) -> None:
        self.section = section

    async def _step(self, name: str) -> None:
        if self.fails == name:
            raise HypervisorError(f"{name} failed")

    async def prepare_vm(self, _id: str, netns: str | None) -> None:
        assert netns is None
        await self._step("prepare_vm")

    async def add_device(self, _device: Any) -> str:
        await self._step("add_device")
        return ""

    async def start_vm(self, _timeout: float) -> None:
        Vm.running += 1
        await self._step("start_vm")

    async def get_agent_socket(self) -> Any:
        return self

    async def wait_ready(self, _timeout: float) -> None:
        if self.gate is not None:
            await self.gate.wait()

    async def connect(self, _port: int, _timeout: float) -> Any:
        await self._step("connect")
        return self, 0

    async def check(self, _timeout: float) -> None:
        await self._step("check")

    async def close(self) -> None:
        pass

    async def save_vm(self, path: str) -> None:
        await self._step("save_vm")
        assert self.section.memory_path == f"{path}/memory"
        assert self.section.boot_to_be_template
        Path(path, "device_state").write_text("state")

    async def stop_vm(self) -> None:
        Vm.running = 0

    async def cleanup(self) -> None:
        assert not Vm.running

    def diagnostics(self) -> dict[str, str]:
        return {"vmm stderr": "its last words"}


class Plugin:
    @staticmethod
    def create(section: Any, **more: Any) -> Vm:
        return Vm(section, **more)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(Vm, "fails", "")
    monkeypatch.setattr(Vm, "running", 0)
    monkeypatch.setattr(Vm, "gate", None)
    monkeypatch.setattr(build_module, "get_plugin", lambda _: Plugin)
    monkeypatch.setattr(build_module, "GuestAgent", lambda client, *_: client)
    monkeypatch.setattr("ttrpc.Client", lambda sock: sock)
    for name in ("path", "kernel", "initrd", "image"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o755)
    named = "\n".join(f'{name} = "{tmp_path}/{name}"' for name in ("path", "kernel", "initrd", "image"))
    path = tmp_path / "c.toml"
    path.write_text(
        f'[hypervisor.qemu]\nshared_fs = "none"\ndefault_memory = 64\n{named}\n'
        f'[hypervisor.qemu.factory]\nenable_template = true\ntemplate_path = "{tmp_path}/store"\n'
    )
    return load_config(str(path), env={})


async def get(config: Config) -> str:
    undo = MemoryUndo()
    try:
        _, path = await obtain(config, undo, Trace("x"))
    finally:
        assert undo.entries == []
    return path


async def test_the_first_makes_it_and_the_next_finds_it(config: Config) -> None:
    path = await get(config)
    assert sorted(os.listdir(path)) == ["device_state", "memory", "template.json"]
    assert os.stat(f"{path}/memory").st_size == 64 << 20
    Vm.fails = "start_vm"
    assert await get(config) == path


async def test_a_new_class_replaces_the_one_before(config: Config) -> None:
    await get(config)
    changed = replace(config, hypervisor=replace(config.hypervisor, kernel_params="quiet"))
    path = await get(changed)
    assert [one.digest for one in Store(config.factory.template_path).listed()] == [os.path.basename(path)]


@pytest.mark.parametrize("step", ["prepare_vm", "add_device", "start_vm", "connect", "check", "save_vm"])
async def test_a_failure_is_told_and_leaves_nothing_and_nobody_tries_again(config: Config, step: str) -> None:
    Vm.fails = step
    with pytest.raises(Cold, match=f"no template could be made: .*{step} failed.*its last words"):
        await get(config)
    digest = template_class(config).digest
    assert sorted(os.listdir(config.factory.template_path)) == [f"{digest}.failed", "lock"]
    Vm.fails = ""
    with pytest.raises(Cold, match=f"there is no template, because: .*{step} failed"):
        await get(config)


async def test_whoever_comes_while_it_is_made_boots(config: Config) -> None:
    Vm.gate = asyncio.Event()
    first = asyncio.create_task(get(config))
    while not Vm.running:  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.01)
    with pytest.raises(Cold, match="no template yet: another process makes"):
        await get(config)
    Vm.gate.set()
    assert await first == await get(config)


async def test_one_that_is_given_up_leaves_nothing(config: Config) -> None:
    Vm.gate = asyncio.Event()
    making = asyncio.create_task(get(config))
    while not Vm.running:  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.01)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert os.listdir(config.factory.template_path) == ["lock"]
    Vm.gate = None
    assert await get(config)


async def test_one_that_is_rejected_is_gone(config: Config) -> None:
    await get(config)
    await reject(config, template_class(config), "its VM is gone")
    with pytest.raises(Cold, match="because: its VM is gone"):
        await get(config)


async def test_a_store_that_cannot_be_is_no_error_of_the_pod(config: Config, tmp_path: Path) -> None:
    broken = replace(config, factory=replace(config.factory, template_path=f"{tmp_path}/kernel/x"))
    with pytest.raises(Cold, match="no template"):
        await get(broken)
    (tmp_path / "image").unlink()
    with pytest.raises(Cold, match=r"no template: .*image"):
        await get(config)


def test_what_a_tenant_chooses_makes_no_template(config: Config) -> None:
    limits = {"linux": {"resources": {"memory": {"limit": 64 << 20}}}}
    static = replace(config, runtime=replace(config.runtime, static_sandbox_resource_mgmt=True))
    cold: Callable[..., str] = lambda config, spec: why_cold(config, spec, pod=False)  # noqa: E731
    assert cold(config, {}) == cold(config, limits) == cold(static, {}) == ""
    assert "static_sandbox_resource_mgmt" in cold(static, limits)
    asked = replace(config, annotations=("io.katacontainers.config.hypervisor.default_memory",))
    direct = replace(config, runtime=replace(config.runtime, dan_conf="/run/kata-containers/dans"))
    assert "dan_conf" in cold(direct, {})
    assert "the pod's annotations change its VM" in cold(asked, {})
    assert factory.__doc__
