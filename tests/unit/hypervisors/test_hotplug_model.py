"""Whatever QEMU refuses and the guest ignores, with devices of every kind that comes and goes: who has a
device has it, and in the end all of them can go."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from devices.addresses import PciTopology
from devices.config import (
    BlockConfig,
    BlockOptions,
    DeviceConfig,
    IoLimits,
    NetworkConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
)
from devices.errors import CallerError, HypervisorError
from devices.kinds import Kind, Op
from devices.manager import DeviceManager
from hypervisors.qemu.abilities import MOST
from hypervisors.qemu.disks import update_disk
from hypervisors.qemu.hotplug import Plugger
from hypervisors.qemu.recipes import SCSI, Placed
from tests.unit.hypervisors.machine import NODE_SIZE, Machine

PLACES = 4  # fewer than devices, so that they run out
COMMANDS = (
    *("blockdev-add", "blockdev-del", "chardev-add", "chardev-remove", "object-add", "object-del", "getfd"),
    *(
        "add-fd",
        "remove-fd",
        "netdev_add",
        "netdev_del",
        "device_add",
        "device_del",
        "block_resize",
        "query-named-block-nodes",
    ),
)
DEVICES = 9
SIZES = {Kind.VCPU, Kind.DIMM, Kind.VIRTIO_MEM}  # tests/unit/hypervisors/test_sizing.py
ACTIONS = ["plug", "plug", "unplug", "unplug", "cancel", "resize"]

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(ACTIONS), st.integers(0, DEVICES - 1)),
        st.tuples(st.just("refuse"), st.sampled_from(COMMANDS)),
        st.tuples(st.sampled_from(["mend", "ignore", "look"]), st.none()),
    ),
    max_size=40,
)


class Host:
    """`devices.device.ChangingHost` over a plugger. `fd` is every back end's connection."""

    def __init__(self, plugger: Plugger, fd: int) -> None:
        self.plugger = plugger
        self._fd = fd
        self._fdsets = itertools.count(1)

    async def add_device(self, device: DeviceConfig) -> str:
        served = device.kind in (Kind.VHOST_USER_BLK, Kind.SHARE_FS)
        path = "/nope/relay.sock" if device.kind is Kind.VHOST_USER_NET else ""
        placed = Placed(device=device, fd=self._fd if served else -1, path=path)
        if isinstance(device, BlockConfig):
            placed = dataclasses.replace(placed, file=self._fd, fdset=next(self._fdsets))
        return await self.plugger.add(placed)

    async def remove_device(self, device_id: str) -> None:
        await self.plugger.remove(device_id)

    async def update_device(self, device: DeviceConfig) -> None:
        placed = self.plugger.placed(device.id)
        assert placed is not None
        assert isinstance(device, BlockConfig)
        assert isinstance(placed.device, BlockConfig)
        await update_disk(self.plugger._qmp, placed.device, device)
        self.plugger.changed(dataclasses.replace(placed, device=device))


def devices(directory: Path, fd: int) -> list[DeviceConfig]:
    """Two disks, one of them with limits; one behind the SCSI controller; and one of each other kind."""
    paths = []
    for name in ("a", "b", "c", "blk.sock", "net.sock"):
        path = directory / name
        path.write_bytes(bytes(NODE_SIZE))
        paths.append(str(path))
    limited = BlockOptions(limits=IoLimits(bytes=1 << 20))
    mac = "02:00:00:00:00:0"
    return [
        BlockConfig(id="d0", path=paths[0]),
        BlockConfig(id="d1", path=paths[1], options=limited),
        BlockConfig(id="d2", path=paths[2], driver=Kind.SCSI),
        NetworkConfig(id="d3", mac=f"{mac}3", tap_fds=(fd, fd)),
        NetworkConfig(id="d4", mac=f"{mac}4", tap_fds=(fd,), vhost_fds=(fd,)),
        VhostUserBlkConfig(id="d5", path=paths[3]),
        VhostUserNetConfig(id="d6", path=paths[4], mac=f"{mac}6"),
        ShareFsConfig(id="d7", source="/nope"),
        VfioConfig(id="d8", address="0000:01:00.0"),
    ]


def test_every_kind_that_comes_and_goes_is_among_them() -> None:
    going = {kind for kind, able in MOST.items() if not able.reason(Op.HOT) and not able.reason(Op.UNPLUG)}
    with TemporaryDirectory() as directory:
        assert {device.kind for device in devices(Path(directory), 0)} | SIZES == going


class Play:
    """One VM, its devices, and how many users each should have."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.configs = devices(directory, fd)
        self.fd = fd
        self.users = [0] * len(self.configs)
        self.machine = Machine()
        self.topology = PciTopology()
        self.topology.add_root_ports(PLACES)
        self.manager = DeviceManager()

    async def run(self, steps: list[tuple[str, int | str | None]]) -> None:
        """Every step, then mend everything and have all of them go."""
        client = await self.machine.connect()
        self.host = Host(Plugger(client, self.topology, 0.02), self.fd)
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
        machine = self.machine
        controller = machine.devices.pop(SCSI, None)  # it stays for the next disk behind it
        assert (machine.devices, machine.nodes, machine.netdevs) == ({}, {}, {})
        assert (machine.chardevs, machine.objects) == ({}, {})
        assert (machine.descriptors, machine.fdsets) == (set(), {})
        assert self.topology.free() == PLACES - (controller is not None)
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
            elif action == "resize":
                if isinstance(self.configs[number], BlockConfig):
                    await self.manager.update_disk(name, self.host, size=2 * NODE_SIZE)
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
                assert device.get("chardev", "char") in (*machine.chardevs, "char")
        on_pci = [device for device in machine.devices.values() if device["driver"] != "scsi-hd"]
        assert len(on_pci) <= PLACES - self.topology.free()


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_fails_nothing_is_lost_or_left(steps: list[tuple[str, int | str | None]]) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with TemporaryDirectory() as directory:
            asyncio.run(Play(Path(directory), fd).run(steps))
    finally:
        os.close(fd)
