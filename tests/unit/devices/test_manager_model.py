"""Whoever meets at a device, and whatever fails: it is plugged exactly while its count is not zero."""

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
    """Plugs what it is given; `broken` ids fail; a closed `gate` holds every call."""

    def __init__(self) -> None:
        self.plugged: list[str] = []
        self.calls: list[str] = []
        self.broken: set[str] = set()
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
        if device_id in self.broken:
            raise UnsupportedByHypervisor("fake", f"removing {device_id}")
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


ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "remove", "break", "mend"]), st.integers(0, 3)))


@settings(max_examples=60)
@given(ACTIONS)
def test_any_sequence_agrees_with_plain_counting(actions: list[tuple[str, int]]) -> None:
    async def play() -> None:
        vm, manager = FakeVm(), DeviceManager()
        counts, indices = [0] * 4, dict[int, int]()
        for action, number in actions:
            name = f"d{number}"
            fails = name in vm.broken
            if action == "break":
                vm.broken.add(name)
            elif action == "mend":
                vm.broken.discard(name)
            elif action == "add":
                if counts[number] == 0 and fails:
                    with pytest.raises(HypervisorError):
                        await manager.try_add_device(configs[number], vm)
                    continue
                assert await manager.try_add_device(configs[number], vm) == name
                if counts[number] == 0:
                    indices[number] = min(set(range(5)) - set(indices.values()))
                counts[number] += 1
            elif counts[number] == 0:
                with pytest.raises(CallerError):
                    await manager.try_remove_device(name, vm)
            elif counts[number] == 1 and fails:
                with pytest.raises(UnsupportedByHypervisor):
                    await manager.try_remove_device(name, vm)
            else:
                counts[number] -= 1
                freed = indices.pop(number) if counts[number] == 0 else None
                assert await manager.try_remove_device(name, vm) == freed
            assert sorted(vm.plugged) == [f"d{one}" for one in range(4) if counts[one]]

    with disks(4) as configs:
        asyncio.run(play())
