"""Row (g): how long it takes to plug and to unplug, kind by kind, against raw QMP on a twin of the VM.

What: ours goes through `DeviceManager` or `Hypervisor.resize_*`, the peer sends the commands that ours sent
last, from a plain socket, to a second VM of the same arguments. A plug ends when QEMU has realised the
device, or the guest has taken the vCPU or the memory. An unplug ends when the guest has let go and the back
ends are gone.
Why twins: what one VM has gone through is what the other has, round by round.
Invariants: both guests have settled before anything is timed; what is measured is checked to have happened
by QEMU's own word; a new kind is one case in `_item` and one word in `_SECTIONS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from conformance.back_ends import Passt, StorageDaemon, listens, passt_missing
from devices.config import (
    BlockConfig,
    DeviceConfig,
    NetworkConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
)
from devices.kinds import Kind, Op
from devices.manager import DeviceManager
from devices.pci_driver import give_to_vfio, restore
from devices.share_fs import Flavour, find_virtiofsd, flavour_of, virtiofsd_arguments
from devices.undo import MemoryUndo
from devices.vfio import read_function
from hypervisors.qemu.vmm import Qemu
from testing.containerd import Containerd
from tests.bench.figures import Row, Series
from tests.bench.raw_qmp import Command, RawQmp, Recorder
from tests.bench.rows import Progress
from tests.e2e.vms import booting

__all__ = ["plugs"]

_OURS, _PEER = "kata-shim", "raw QMP"
_MAC = "02:00:00:00:00:07"
_LIMIT = 60.0  # seconds for a guest's driver
_CPUS = frozenset(range(64))  # as if the host had them: each round plugs one more under TCG
_MIB = 1 << 20


# --- what is plugged: one line a kind


def _image(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(b"")
    os.truncate(path, 8 * _MIB)
    return str(path)


def _tap(stack: contextlib.ExitStack) -> int:
    """A tap of this host's, which goes with its descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"katabench%d", flags))  # TUNSETIFF
    return fd


async def _function(stack: contextlib.ExitStack) -> str:
    """The address of the bench host's spare PCI function, QEMU's edu, given to vfio-pci."""
    for name in os.listdir("/sys/bus/pci/devices"):
        function = read_function(name)
        if (function.vendor, function.device) == (0x1234, 0x11E8):
            entry = await give_to_vfio(function, MemoryUndo())
            stack.callback(restore, entry.facts)
            return name
    raise _MissingError("no PCI function to give away; the bench host has one")


class _Item:
    """A device for both VMs, one after the other, and what the peer has to do besides QMP."""

    def __init__(self, device: DeviceConfig, served: str = "") -> None:
        self.device = device
        self.served = served

    def before(self) -> str:
        """The socket of the back end, which listens then; "" without one."""
        return self.served

    def after(self) -> None:
        """Once it is unplugged."""


class _Share(_Item):
    """A virtiofsd for each plug, as ours has."""

    def __init__(self, device: ShareFsConfig, flavour: Flavour, folder: Path) -> None:
        super().__init__(device, str(folder / "virtiofsd"))
        self._child: subprocess.Popen[bytes] | None = None
        words = virtiofsd_arguments(device, flavour, 0)[1:]
        self._argv = [find_virtiofsd(""), f"--socket-path={self.served}", *words]

    def before(self) -> str:
        self._child = subprocess.Popen(self._argv, stderr=subprocess.DEVNULL)
        while not listens(self.served):
            assert self._child.poll() is None, "virtiofsd ended"
            time.sleep(0.0005)
        return self.served

    def after(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.served)


async def _item(kind: Kind, folder: Path, stack: contextlib.ExitStack) -> _Item:
    """Of this kind. Raises _MissingError if this host cannot have it."""
    match kind:
        case Kind.BLK:
            return _Item(BlockConfig(id="disk", path=_image(folder, "disk")))
        case Kind.SCSI:
            return _Item(BlockConfig(id="lun", path=_image(folder, "lun"), driver=kind))
        case Kind.NET:
            return _Item(NetworkConfig(id="card", mac=_MAC, tap_fds=(_tap(stack),)))
        case Kind.VFIO:
            return _Item(VfioConfig(id="edu", address=await _function(stack)))
        case Kind.VHOST_USER_BLK:
            disk = stack.enter_context(
                closing(StorageDaemon(Path(_image(folder, "served")), folder / "disks"))
            )
            return _Item(VhostUserBlkConfig(id="served", path=disk.path), disk.path)
        case Kind.VHOST_USER_NET:
            if missing := passt_missing():
                raise _MissingError(missing)
            net = stack.enter_context(closing(Passt(folder / "passt")))
            return _Item(VhostUserNetConfig(id="passt", path=net.path, mac=_MAC), net.path)
        case Kind.SHARE_FS:
            share = ShareFsConfig(id="more", tag="more", source=str(folder))
            item = _Share(share, (await flavour_of(find_virtiofsd(""), MemoryUndo()))[0], folder)
            stack.callback(item.after)
            return item
        case _:
            raise AssertionError(f"no device of kind {kind.value}")


_SIZES: dict[Kind, tuple[str, int, int]] = {
    Kind.VCPU: ("resize_vcpu", 1, 1),
    Kind.DIMM: ("resize_memory", 256, 128),
    Kind.VIRTIO_MEM: ("resize_memory", 256, 128),
}
"""The method, what the VM starts with, and by how much it grows."""

_SECTIONS: tuple[tuple[dict[str, object], tuple[Kind, ...]], ...] = (
    ({}, (Kind.BLK, Kind.SCSI, Kind.NET, Kind.VCPU, Kind.DIMM)),
    ({}, (Kind.VHOST_USER_BLK, Kind.VHOST_USER_NET, Kind.SHARE_FS)),
    ({"enable_virtio_mem": True}, (Kind.VIRTIO_MEM,)),
    ({"hot_plug_vfio": "root-port", "pcie_root_port": 1}, (Kind.VFIO,)),
)
"""Which VM has what, beyond the common configuration."""


# --- how


class _MissingError(Exception):
    """What cannot be measured here, and why."""


class _Twins:
    """Two VMs: ours with its manager, the peer's with a socket."""

    def __init__(self, vm: Qemu, manager: DeviceManager, raw: RawQmp) -> None:
        self.vm = vm
        self.manager = manager
        self.raw = raw
        self.client = vm._qmp()  # what its plugger and its sizer use

    async def ask_ours(self, command: str, **arguments: Any) -> Any:
        """Of our VM, by its own connection."""
        return await self.client.execute(command, arguments)

    async def ask_peer(self, command: str, **arguments: Any) -> Any:
        """Of the peer's."""
        return self.raw.execute(command, arguments)


Ask = Callable[..., Awaitable[Any]]


async def _shape(ask: Ask) -> tuple[Any, ...]:
    """What the VM has, as QEMU says."""
    names = sorted(entry["name"] for entry in await ask("qom-list", path="/machine/peripheral"))
    memory = await ask("query-memory-size-summary")
    nodes = sorted(node["node-name"] for node in await ask("query-named-block-nodes"))
    return names, memory, len(await ask("query-cpus-fast")), [n for n in nodes if not n.startswith("#")]


async def _driven(ask: Ask, device_id: str) -> None:
    """Return when the guest's driver runs the device; at once for what is no virtio device."""
    end = time.monotonic() + _LIMIT
    path = f"/machine/peripheral/{device_id}/virtio-backend"
    if path not in {device["path"] for device in await ask("x-query-virtio")}:
        return
    while "DRIVER_OK" not in str(await ask("x-query-virtio-status", path=path)):
        assert time.monotonic() < end, f"no driver took {device_id}"
        await asyncio.sleep(0.001)


@dataclass(slots=True)
class _Step:
    """One thing that both do in each round, and what came of it."""

    title: str
    do: Callable[[], Awaitable[object]]
    device_id: str = ""  # of what the guest's driver has to take afterwards
    before: Callable[[], str] = str  # of the peer: serve it, on which socket
    after: Callable[[], None] = lambda: None  # of the peer: end what served it
    commands: list[Command] = field(default_factory=list)  # that ours sent last
    shape: tuple[Any, ...] = ()  # of our VM after them
    times: dict[str, list[float]] = field(default_factory=lambda: {_OURS: [], _PEER: []})  # ms
    driven: dict[str, list[float]] = field(default_factory=lambda: {_OURS: [], _PEER: []})  # ms

    async def ours(self, twins: _Twins) -> None:
        """Do it, and note how."""
        with Recorder(twins.client).commands() as seen:
            begin = time.perf_counter()
            await self.do()
            await self._done(_OURS, begin, twins.ask_ours)
        self.commands, self.shape = seen, await _shape(twins.ask_ours)

    async def peer(self, twins: _Twins, commands: list[Command], shape: tuple[Any, ...]) -> None:
        """Do what ours did in the round before, and see that it had the same effect."""
        begin = time.perf_counter()
        self.replay(twins, commands)
        await self._done(_PEER, begin, twins.ask_peer)
        assert await _shape(twins.ask_peer) == shape, "the peer did something else"

    def replay(self, twins: _Twins, commands: list[Command]) -> None:
        """What the peer does."""
        twins.raw.replay(commands, served=self.before())
        self.after()

    async def _done(self, who: str, begin: float, ask: Ask) -> None:
        self.times[who].append((time.perf_counter() - begin) * 1000)
        if self.device_id:
            await _driven(ask, self.device_id)
            self.driven[who].append((time.perf_counter() - begin) * 1000)

    def row(self, number: int, rounds: int) -> Row:
        """Of the last `rounds`."""
        ours, peer = (Series(who, tuple(self.times[who][-rounds:])) for who in (_OURS, _PEER))
        notes = {
            f"{who}, ms until the guest's driver has it": round(statistics.median(each[-rounds:]), 1)
            for who, each in self.driven.items()
            if each
        }
        return Row(key=f"g{number}", title=self.title, unit="ms", ours=ours, peer=peer, notes=notes)


def _device_steps(twins: _Twins, kind: Kind, item: _Item) -> list[_Step]:
    device = item.device

    async def plug() -> None:
        await twins.manager.try_add_device(device, twins.vm)

    async def unplug() -> None:
        await twins.manager.try_remove_device(device.id, twins.vm)

    plugged = _Step(f"plug: {kind.value}", plug, device.id, before=item.before)
    return [plugged, _Step(f"unplug: {kind.value}", unplug, after=item.after)]


def _size_steps(twins: _Twins, kind: Kind, *, shrinks: bool) -> list[_Step]:
    name, size, step = _SIZES[kind]
    resize = getattr(twins.vm, name)

    async def grow() -> None:
        nonlocal size
        size += step
        assert await resize(size) == size

    async def shrink() -> None:
        nonlocal size
        size -= step
        assert await resize(size) == size

    grown = _Step(f"plug: {kind.value}", grow)
    return [grown, _Step(f"unplug: {kind.value}", shrink)] if shrinks else [grown]


async def _measure(twins: _Twins, steps: list[_Step], rounds: int, say: Progress) -> None:
    """In turns, the peer one round behind; two rounds warm up."""
    for number in range(-2, rounds):
        before = [(step.commands, step.shape) for step in steps]

        async def ours() -> None:
            for step in steps:
                await step.ours(twins)

        async def peer(before: Any = before) -> None:
            for step, (commands, shape) in zip(steps, before, strict=True):
                await step.peer(twins, commands, shape)

        turns = [ours, peer] if number % 2 == 0 else [peer, ours]
        for turn in turns if number > -2 else [ours]:
            await turn()
    for step in steps:
        step.replay(twins, step.commands)  # it has caught up
    last = ", ".join(f"{s.title} {s.times[_OURS][-1]:.1f} / {s.times[_PEER][-1]:.1f} ms" for s in steps)
    say(f"{rounds} rounds; the last one, ours / peer: {last}")


@contextlib.asynccontextmanager
async def _twins(folder: Path, section: dict[str, object]) -> AsyncIterator[_Twins]:
    for name in (_OURS, _PEER):
        (folder / name).mkdir()
    async with booting(folder / _OURS) as boot, booting(folder / _PEER) as boot_twin:
        wanted = {"default_maxvcpus": len(_CPUS), "default_maxmemory": 1024, **section}
        vm, _, manager = await boot(**wanted)
        twin, _, _ = await boot_twin(**wanted)
        await twin.disconnect()
        raw = RawQmp(str(folder / _PEER / "state/qmp.sock"))
        try:
            yield _Twins(vm, manager, raw)
        finally:
            raw.close()


async def _group(
    folder: Path, section: dict[str, object], kinds: Sequence[Kind], rounds: int, say: Progress
) -> list[_Step]:
    """The kinds that one pair of VMs has."""
    steps: list[_Step] = []
    with contextlib.ExitStack() as stack:
        items: dict[Kind, _Item] = {}
        for kind in set(kinds) - set(_SIZES):
            try:
                items[kind] = await _item(kind, folder, stack)
            except _MissingError as error:
                say(f"not measured: {kind.value}: {error}")
        kinds = [kind for kind in kinds if kind in items or kind in _SIZES]
        if not kinds:
            return []
        async with _twins(folder, section) as twins:
            able = await twins.vm.capabilities()
            for kind in kinds:
                if kind in items:
                    some = _device_steps(twins, kind, items[kind])
                else:
                    some = _size_steps(twins, kind, shrinks=able.can(kind, Op.UNPLUG))
                await _measure(twins, some, rounds, say)
                steps += some
    return steps


async def _all(rounds: int, say: Progress) -> list[Row]:
    steps: list[_Step] = []
    for section, kinds in _SECTIONS:
        with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
            steps += await _group(Path(name), section, kinds, rounds, say)
    return [step.row(number, rounds) for number, step in enumerate(steps, 1)]


def plugs(_containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(g) plug and unplug, each kind."""
    with mock.patch.object(os, "sched_getaffinity", return_value=_CPUS):
        return asyncio.run(_all(rounds, say))
