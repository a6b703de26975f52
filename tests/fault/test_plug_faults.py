"""Whatever QEMU refuses or is too slow to answer while a device of any kind comes or goes: nothing is plugged
half, what is left goes at the next attempt, and the next plug works. With a real QEMU and its guest."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from conformance.gear import KINDS, Gear
from devices.config import DeviceConfig
from devices.errors import HypervisorError
from devices.kinds import Op
from hypervisors.qemu.qmp import QmpClient, QmpError
from hypervisors.qemu.vmm import Qemu
from tests.e2e.vms import Boot

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")]

# Commands that only look are not part of a plug.
_LOOKS = ("query-", "qom-list", "qom-get", "human-monitor-command")


class Saboteur:
    """Between the shim and QEMU: fails the command number `at`, before QEMU has it or after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.at = -1
        self.after = False
        self.hit = False
        original = QmpClient.execute

        async def execute(client: QmpClient, command: str, *args: Any, **kwargs: Any) -> Any:
            if command.startswith(_LOOKS):
                return await original(client, command, *args, **kwargs)
            self.seen.append(command)
            hit = len(self.seen) - 1 == self.at
            self.hit |= hit
            if hit and not self.after:
                raise QmpError(command, "GenericError", "sabotage")
            answer = await original(client, command, *args, **kwargs)
            if hit:
                raise HypervisorError(f"QEMU did not answer {command}", code="DEADLINE_EXCEEDED")
            return answer

        monkeypatch.setattr(QmpClient, "execute", execute)

    def arm(self, at: int, *, after: bool) -> None:
        self.seen, self.at, self.after, self.hit = [], at, after, False

    def disarm(self) -> None:
        self.seen, self.at = [], -1


async def everything(vm: Qemu) -> dict[str, Any]:
    """All that QEMU has of devices and what they stand on, and the places that are free. No DIMM has the
    name of an earlier one: it is told without its number."""
    qmp = vm._parts.qmp
    assert qmp is not None
    blocks = await qmp.execute("query-named-block-nodes", {"flat": True})
    return {
        "nodes": sorted(node["node-name"] for node in blocks if not node["node-name"].startswith("#")),
        "chardevs": sorted(one["label"] for one in await qmp.execute("query-chardev")),
        "objects": await names(qmp, "/objects"),
        "devices": await names(qmp, "/machine/peripheral"),
        "netdevs": await qmp.execute("human-monitor-command", {"command-line": "info network"}),
        "descriptors": len(os.listdir(f"/proc/{await vm.get_vmm_master_tid()}/fd")),
        "free": vm._places.topology.free(),
        "pids": len(await vm.get_pids()),
    }


async def names(qmp: QmpClient, path: str) -> list[str]:
    listed = await qmp.execute("qom-list", {"path": path})
    return sorted(re.sub(r"dimm\d+", "dimm", one["name"]) for one in listed)


async def settled(vm: Qemu, wanted: dict[str, Any]) -> None:
    """QEMU frees a device's memory, and with it descriptors, a moment after it said that it is gone."""
    for _ in range(200):
        have = await everything(vm)
        if have == wanted:
            return
        await asyncio.sleep(0.02)
    assert have == wanted


async def quiet(vm: Qemu) -> dict[str, Any]:
    """What there is when nothing changes any more."""
    have = await everything(vm)
    while True:
        await asyncio.sleep(0.2)
        have, earlier = await everything(vm), have
        if have == earlier:
            return have


async def attempt(work: Awaitable[object]) -> bool:
    """Whether it came through."""
    try:
        await work
    except HypervisorError:
        return False
    return True


async def test_no_fault_leaves_half_a_device(
    boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saboteur = Saboteur(monkeypatch)
    vm, _, _ = await boot()
    can = await vm.capabilities()
    gear = Gear(tmp_path)
    tried = 0
    try:
        for kind in KINDS:
            if not can.can(kind, Op.HOT) or not can.can(kind, Op.UNPLUG) or gear.missing(kind):
                continue
            device = await gear.make(kind)
            plug, unplug = await commands_of(vm, device, saboteur)
            before = await quiet(vm)  # after a first plug: what QEMU makes once for a kind, it keeps
            for after in (False, True):
                for number in range(len(plug)):
                    saboteur.arm(number, after=after)
                    came = await attempt(vm.add_device(device))
                    what = f"{kind.value}: {plug[number]} {'unanswered' if after else 'refused'}"
                    saboteur.disarm()
                    assert not came, what
                    await settled(vm, before)
                for number in range(len(unplug)):
                    await vm.add_device(device)
                    saboteur.arm(number, after=after)
                    went = await attempt(vm.remove_device(device.id))
                    saboteur.disarm()
                    if not went:
                        await vm.remove_device(device.id)
                    await settled(vm, before)
            tried += 1
    finally:
        await gear.close()
    assert tried >= 2


@pytest.mark.parametrize("virtio_mem", [False, True], ids=["DIMM", "virtio-mem"])
async def test_no_fault_leaves_half_a_resize(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, virtio_mem: bool
) -> None:
    """Memory, up and down: the next attempt reaches the size, and QEMU has what it had with it before."""
    saboteur = Saboteur(monkeypatch)
    vm, _, _ = await boot(enable_virtio_mem=virtio_mem, default_maxmemory=1024)
    base, more = 256, 384
    wanted: dict[int, dict[str, Any]] = {}
    commands: dict[int, list[str]] = {}
    for size in (more, base, more, base):  # the first time the daemons see new memory they open descriptors
        saboteur.disarm()
        assert await vm.resize_memory(size) == size
        commands[size] = saboteur.seen
        wanted[size] = await quiet(vm)
    tried = 0
    for after in (False, True):
        for number in range(max(map(len, commands.values()))):
            for target in (more, base):
                if number >= len(commands[target]):
                    continue
                for _ in range(20):  # a guest may keep its memory: then the command was not sent
                    assert await vm.resize_memory(base + more - target) == base + more - target
                    saboteur.arm(number, after=after)
                    came = await attempt(vm.resize_memory(target))
                    if saboteur.hit:
                        break
                what = f"{commands[target][number]} {'unanswered' if after else 'refused'}"
                saboteur.disarm()
                assert not came, what
                for _ in range(100):  # a guest that is at it still lets go soon
                    assert await vm.resize_memory(target) == target, what
                    if await everything(vm) == wanted[target]:
                        break
                    await asyncio.sleep(0.02)
                assert await everything(vm) == wanted[target], what
                tried += 1
    assert tried >= 4


async def commands_of(vm: Qemu, device: DeviceConfig, saboteur: Saboteur) -> tuple[list[str], list[str]]:
    """The commands of one plug and of one unplug; a first plug makes what a kind shares, a controller."""
    await vm.add_device(device)
    await vm.remove_device(device.id)
    seen: list[list[str]] = []
    steps: list[Callable[[], Awaitable[object]]] = [
        lambda: vm.add_device(device),
        lambda: vm.remove_device(device.id),
    ]
    for step in steps:
        saboteur.disarm()
        await step()
        seen.append(saboteur.seen)
    assert "device_add" in seen[0]
    assert "device_del" in seen[1]
    return seen[0], seen[1]
