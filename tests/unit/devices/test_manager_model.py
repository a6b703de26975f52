"""Whoever meets at a device, and whatever fails: it is plugged once while anybody uses it, and gone before
anybody gets it anew."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.config import BlockConfig, DeviceConfig
from devices.errors import CallerError, HypervisorError, UnsupportedByHypervisor
from devices.manager import DeviceManager


class FakeVm:
    """Plugs what it is given; `broken` ids fail, `fixed` ones cannot be unplugged by this VMM at all; a
    closed `gate` holds every call."""

    def __init__(self) -> None:
        self.plugged: list[str] = []
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.fixed: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def add_device(self, device: DeviceConfig) -> str:
        self.calls.append(f"+{device.id}")
        await self.gate.wait()
        if device.id in self.broken:
            raise HypervisorError("no")
        assert device.id not in self.plugged
        self.plugged.append(device.id)
        return f"{len(self.plugged):02x}"

    async def remove_device(self, device_id: str) -> None:
        self.calls.append(f"-{device_id}")
        await self.gate.wait()
        if device_id in self.fixed:
            raise UnsupportedByHypervisor("fake", f"removing {device_id}")
        if device_id in self.broken:
            raise HypervisorError("the guest does not let go")
        self.plugged.remove(device_id)


def disk(directory: Path, name: str) -> BlockConfig:
    path = directory / f"{name}.img"
    path.touch()
    return BlockConfig(id=name, path=str(path))


async def settle() -> None:
    """Let everything run that can; threads (stat) need a little real time."""
    for _ in range(5):
        await asyncio.sleep(0.005)


async def test_users_that_come_at_once_are_one_plug(tmp_path: Path) -> None:
    vm, manager = FakeVm(), DeviceManager()
    one = disk(tmp_path, "one")
    vm.gate.clear()
    adding = [asyncio.create_task(manager.try_add_device(one, vm)) for _ in range(5)]
    await settle()
    vm.gate.set()

    assert await asyncio.gather(*adding) == ["one"] * 5
    assert vm.calls == ["+one"]


async def test_whoever_waited_for_a_plug_that_failed_tries_it_anew(tmp_path: Path) -> None:
    vm, manager = FakeVm(), DeviceManager()
    one = disk(tmp_path, "one")
    again = BlockConfig(id="again", path=one.path)
    vm.broken = {"one"}
    vm.gate.clear()
    first = asyncio.create_task(manager.try_add_device(one, vm))
    await settle()
    second = asyncio.create_task(manager.try_add_device(again, vm))
    await settle()
    vm.gate.set()
    results = await asyncio.gather(first, second, return_exceptions=True)

    assert isinstance(results[0], HypervisorError)
    assert results[1] == "again"
    assert vm.plugged == ["again"]


async def test_a_cancelled_plug_is_not_counted(tmp_path: Path) -> None:
    vm, manager = FakeVm(), DeviceManager()
    vm.gate.clear()
    adding = asyncio.create_task(manager.try_add_device(disk(tmp_path, "one"), vm))
    await settle()
    adding.cancel()
    await asyncio.gather(adding, return_exceptions=True)

    with pytest.raises(CallerError):
        await manager.try_remove_device("one", vm)


async def test_who_waits_for_the_last_unplug_plugs_anew_or_is_told(tmp_path: Path) -> None:
    vm, manager = FakeVm(), DeviceManager()
    one = disk(tmp_path, "one")
    await manager.try_add_device(one, vm)
    vm.gate.clear()
    removing = asyncio.create_task(manager.try_remove_device("one", vm))
    await settle()
    once_more = asyncio.create_task(manager.try_remove_device("one", vm))
    await settle()
    adding = asyncio.create_task(manager.try_add_device(one, vm))
    await settle()
    vm.gate.set()
    results = await asyncio.gather(removing, once_more, adding, return_exceptions=True)

    assert results[0] == 0
    assert isinstance(results[1], CallerError)
    assert results[2] == "one"
    assert vm.calls == ["+one", "-one", "+one"]


@contextmanager
def disks(count: int) -> Iterator[list[BlockConfig]]:
    with TemporaryDirectory() as directory:
        yield [disk(Path(directory), f"d{number}") for number in range(count)]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "remove", "remove", "break", "fix", "mend"]), st.integers(0, 3))
)


class Model:
    """One disk, by plain counting: `there` with its index, `leaving` when an unplug failed."""

    def __init__(self) -> None:
        self.users = 0
        self.index: int | None = None
        self.leaving = False


@settings(max_examples=100)
@given(ACTIONS)
def test_any_sequence_agrees_with_plain_counting(actions: list[tuple[str, int]]) -> None:
    async def play() -> None:
        vm, manager = FakeVm(), DeviceManager()
        models = [Model() for _ in range(4)]
        for action, number in actions:
            name, model = f"d{number}", models[number]
            broken, fixed = name in vm.broken, name in vm.fixed
            if action == "break":
                vm.broken.add(name)
            elif action == "fix":
                vm.fixed.add(name)
            elif action == "mend":
                vm.broken.discard(name)
                vm.fixed.discard(name)
            elif action == "add":
                await add(manager, vm, configs[number], models, model, stuck=broken or fixed)
            elif model.index is None:
                with pytest.raises(CallerError):
                    await manager.try_remove_device(name, vm)
            elif model.users > 1:
                model.users -= 1
                assert await manager.try_remove_device(name, vm) is None
            elif broken or fixed:
                with pytest.raises(UnsupportedByHypervisor if fixed else HypervisorError):
                    await manager.try_remove_device(name, vm)
                model.users, model.leaving = 0, not fixed
            else:
                assert await manager.try_remove_device(name, vm) == model.index
                models[number] = Model()
            assert sorted(vm.plugged) == [f"d{n}" for n in range(4) if models[n].index is not None]

    async def add(
        manager: DeviceManager,
        vm: FakeVm,
        config: BlockConfig,
        models: list[Model],
        model: Model,
        *,
        stuck: bool,
    ) -> None:
        anew = model.index is None or model.leaving
        if anew and (config.id in vm.broken or (model.leaving and stuck)):
            with pytest.raises(HypervisorError):
                await manager.try_add_device(config, vm)
            if model.leaving and config.id in vm.fixed:
                model.leaving = False  # it is there, and will be found there
            return
        assert await manager.try_add_device(config, vm) == config.id
        if anew:
            taken = {one.index for one in models if one is not model}
            model.index, model.leaving = min(set(range(5)) - taken), False
        model.users += 1

    with disks(4) as configs:
        asyncio.run(play())


async def test_a_disk_that_does_not_go_is_given_to_nobody(tmp_path: Path) -> None:
    vm, manager = FakeVm(), DeviceManager()
    one = disk(tmp_path, "one")
    await manager.try_add_device(one, vm)
    vm.broken = {"one"}
    for _ in range(2):
        with pytest.raises(HypervisorError, match="does not let go"):
            await manager.try_remove_device("one", vm)
    with pytest.raises(HypervisorError, match="does not let go"):
        await manager.try_add_device(BlockConfig(id="again", path=one.path), vm)
    assert await manager.try_add_device(disk(tmp_path, "two"), vm) == "two"
    assert await manager.get_device_guest_path("two") == "/dev/vdb"  # vda is not free yet

    vm.broken.clear()
    assert await manager.try_add_device(BlockConfig(id="again", path=one.path), vm) == "again"
    assert vm.calls[-2:] == ["-one", "+again"]
    assert await manager.try_remove_device("again", vm) == 0


async def test_a_vmm_that_cannot_unplug_gives_the_disk_to_the_next(tmp_path: Path) -> None:
    vm, manager = FakeVm(), DeviceManager()
    one = disk(tmp_path, "one")
    await manager.try_add_device(one, vm)
    vm.fixed = {"one"}
    with pytest.raises(UnsupportedByHypervisor):
        await manager.try_remove_device("one", vm)

    assert await manager.try_add_device(one, vm) == "one"
    assert vm.calls == ["+one", "-one"]
