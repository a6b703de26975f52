"""Whatever QEMU refuses and the guest ignores: who has a disk has it, and in the end all of them can go."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from devices.addresses import PciTopology
from devices.config import BlockConfig, DeviceConfig, NetworkConfig
from devices.errors import CallerError, HypervisorError
from devices.manager import DeviceManager
from hypervisors.qemu.hotplug import Plugger
from hypervisors.qemu.recipes import Placed
from tests.unit.hypervisors.machine import Machine

PLACES = 3  # fewer than devices, so that they run out
COMMANDS = ("blockdev-add", "device_add", "device_del", "blockdev-del", "netdev_add", "netdev_del", "getfd")

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["plug", "plug", "unplug", "unplug", "cancel"]), st.integers(0, 4)),
        st.tuples(st.just("refuse"), st.sampled_from(COMMANDS)),
        st.tuples(st.sampled_from(["mend", "ignore", "look"]), st.none()),
    ),
    max_size=40,
)


class Host:
    """`devices.device.DeviceHost` over a plugger."""

    def __init__(self, plugger: Plugger) -> None:
        self.plugger = plugger

    async def add_device(self, device: DeviceConfig) -> str:
        return await self.plugger.add(Placed(device=device))

    async def remove_device(self, device_id: str) -> None:
        await self.plugger.remove(device_id)


class Play:
    """One VM, its devices (three disks, two cards), and how many users each should have."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.configs: list[DeviceConfig] = []
        for number in range(3):
            path = directory / f"d{number}"
            path.touch()
            self.configs.append(BlockConfig(id=f"d{number}", path=str(path)))
        for number in range(3, 5):
            mac = f"02:00:00:00:00:0{number}"
            self.configs.append(NetworkConfig(id=f"d{number}", mac=mac, tap_fds=(fd, fd)))
        self.users = [0] * len(self.configs)
        self.machine = Machine()
        self.topology = PciTopology()
        self.topology.add_root_ports(PLACES)
        self.manager = DeviceManager()

    async def run(self, steps: list[tuple[str, int | str | None]]) -> None:
        """Every step, then mend everything and have all of them go."""
        client = await self.machine.connect()
        self.host = Host(Plugger(client, self.topology, 0.02))
        for action, what in steps:
            if isinstance(what, int):
                await self.use(action, what)
            else:
                self.disturb(action, what)
            self.check()
        self.disturb("mend", None)
        for number in range(len(self.configs)):
            while self.users[number]:
                await self.use("unplug", number)
        # There are fewer places than devices: what still has one goes first, be it only that its removal
        # was refused.
        plugger = self.host.plugger
        for number in sorted(range(len(self.configs)), key=lambda n: f"d{n}" not in plugger):
            await self.finish(number)
        assert (self.machine.devices, self.machine.nodes, self.machine.netdevs) == ({}, {}, {})
        assert self.topology.free() == PLACES
        await client.close()
        await self.machine.close()

    def disturb(self, action: str, what: str | None) -> None:
        machine = self.machine
        if action == "refuse":
            assert what is not None
            machine.refuse.add(what)
        elif action == "ignore":
            machine.lazy = True
        else:
            machine.lazy = False
            for name in list(machine.leaving):
                machine.unplugged(name)
            if action == "mend":
                machine.refuse.clear()

    async def use(self, action: str, number: int) -> None:
        name = f"d{number}"
        try:
            if action == "unplug":
                had = self.users[number]
                self.users[number] = max(0, had - 1)  # who lets go is no user, whatever comes of it
                await self.manager.try_remove_device(name, self.host)
            elif action == "plug":
                await self.manager.try_add_device(self.configs[number], self.host)
                self.users[number] += 1
            else:
                adding = asyncio.create_task(self.manager.try_add_device(self.configs[number], self.host))
                await asyncio.sleep(0)
                adding.cancel()
                await asyncio.wait({adding})
                if not adding.cancelled() and adding.exception() is None:
                    self.users[number] += 1
        except (HypervisorError, CallerError):
            pass

    async def finish(self, number: int) -> None:
        """Nobody uses it; if it is there still, it goes by plugging and unplugging it once more."""
        await self.manager.try_add_device(self.configs[number], self.host)
        await self.manager.try_remove_device(f"d{number}", self.host)

    def check(self) -> None:
        machine = self.machine
        for number, users in enumerate(self.users):
            if users:
                device = machine.devices[f"d{number}"]
                assert f"d{number}" not in machine.leaving
                assert device.get("drive", "node-d") in (*machine.nodes, "node-d")
                assert device.get("netdev", "net") in (*machine.netdevs, "net")
        assert len(machine.devices) <= PLACES - self.topology.free()


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_fails_nothing_is_lost_or_left(steps: list[tuple[str, int | str | None]]) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with TemporaryDirectory() as directory:
            asyncio.run(Play(Path(directory), fd).run(steps))
    finally:
        os.close(fd)
