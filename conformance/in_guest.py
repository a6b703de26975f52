"""One VM with everything in it, and what its guest says of that: a driver that lies is found out here.

What: `GuestContract`, whose tests share a VM that boots once for the class; `Booted` is that VM, the fixture
`guest` of `conformance.plugin` makes it.
Why a test for each capability: a driver that lies in one thing fails in one test, which says in what
(`tests/conformance/liars.py` holds this).
Invariants: no expectation comes from the driver under test: it comes from the section, from the file or
socket behind a device, from /proc, and from the guest's probe (`conformance.probe`). Each test leaves the VM
as it was, as far as the VMM can.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conformance.gear import DISK_SIZE, KINDS, words
from conformance.guest import Asked, GuestSaysError
from conformance.life import PROMPT, Contract
from conformance.probe import BEAT
from conformance.subject import Subject, World
from devices.child import process_memory, process_stat
from devices.config import (
    BlockConfig,
    DeviceConfig,
    NetworkConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserNetConfig,
)
from devices.errors import BugError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from devices.manager import DeviceManager
from devices.vfio import read_function
from hypervisors.base import Capabilities, Hypervisor, VcpuThreadIds

__all__ = ["Booted", "GuestContract", "booted"]

_TYPES = {Kind.RNG: 4, Kind.BALLOON: 5, Kind.VSOCK: 19, Kind.SHARE_FS: 26}  # of the virtio specification
_DISKS = (Kind.BLK, Kind.SCSI, Kind.PMEM, Kind.VHOST_USER_BLK)
_MODULES = {Kind.SCSI: ("scsi_mod", "virtio_scsi", "sd_mod"), Kind.PMEM: ("nfit", "nd_pmem")}
_SCSI = re.compile(r"\d+:\d+")
_LOOK = 0.05  # seconds between two looks for what nothing announces
_REST = 2.0  # seconds of a pause
_GROWTH = 128  # MiB
_LOST = 16  # MiB of a growth that the kernel may need to describe the rest

_in_class = pytest.mark.asyncio(loop_scope="class")


@dataclass
class Booted:
    """A VM whose guest answers. `cold`: what it began with; all devices are the manager's."""

    world: World
    vm: Hypervisor
    ask: Asked
    can: Capabilities
    manager: DeviceManager
    cold: list[DeviceConfig] = field(default_factory=list)

    async def plug(self, device: DeviceConfig) -> str:
        """Through the device manager; where it says that it is."""
        name = await self.manager.try_add_device(device, self.vm)
        said = await self.manager.get_pci_path(name)
        await self.prepare(device, said)
        return said

    async def prepare(self, device: DeviceConfig, said: str) -> None:
        """Have the guest look for what its kernel does not find by itself."""
        if device.kind in _MODULES:
            scsi = said if device.kind is Kind.SCSI and _SCSI.fullmatch(said) else ""
            await self.ask("modules", names=_MODULES[device.kind], scsi=scsi)

    async def disk(self, device: DeviceConfig) -> dict[str, Any] | None:
        """What the guest has with this device's words on it; None if nothing."""
        disks: list[dict[str, Any]] = await self.ask("disks")
        if device.id == "image":
            return next(disk for disk in disks if disk["node"] == "/dev/vda")
        return next((disk for disk in disks if disk["begins"].startswith(words(device.id))), None)

    async def places(self, device: DeviceConfig) -> list[str]:
        """Each answer for the device's address that is true in the guest; none if it does not have it."""
        if device.kind in _DISKS:
            disk = await self.disk(device)
            return disk["addresses"] if disk else []
        if isinstance(device, NetworkConfig | VhostUserNetConfig):
            return [card["path"] for card in await self.ask("cards") if card["mac"] == device.mac]
        if isinstance(device, VfioConfig):
            real = read_function(device.address)
            wanted = f"{real.vendor:04x}:{real.device:04x}"
            return [path for path, kind in (await self.ask("pci")).items() if kind == wanted]
        wanted_type = _TYPES.get(device.kind)
        if wanted_type is None:  # a serial port, a technology: on no bus
            return [""]
        return [one["path"] for one in await self.ask("virtio") if one["type"] == wanted_type]

    async def count(self, device: DeviceConfig) -> int:
        """How many such the guest has: of what has no name of its own there, all of its kind."""
        return 1 if device.kind in _DISKS and await self.disk(device) else len(await self.places(device))


async def booted(subject: Subject, directory: Path) -> Booted:
    """Boot one with all that its VMM takes before the start, and a disk that is read-only."""
    world = World(subject, directory)
    await world.open()
    (world.share / "whose").write_text("the usual one")
    vm = world.create()
    await vm.prepare_vm("conformance", None)
    can = await vm.capabilities()
    devices = list(subject.devices(await vm.hypervisor_config(), world.share))
    usual = {device.kind for device in devices} - {Kind.BLK}  # the image is one, and nobody writes to it
    for kind in KINDS:
        if kind in usual or not can.can(kind, Op.COLD):
            continue
        if (made := await world.make(kind)) is not None:
            devices.append(made)
    locked = BlockConfig(id="locked", path=str(world.gear.image("locked")), read_only=True)
    devices.insert(-1, locked)
    manager = DeviceManager()
    for device in devices:
        await manager.try_add_device(device, vm)
    await vm.start_vm(subject.patience)
    world.pids.update(await vm.get_pids())
    await (await vm.get_agent_socket()).wait_ready(subject.patience)
    made_of = Booted(world, vm, await world.ask(), can, manager, devices)
    for device in devices:
        await made_of.prepare(device, await manager.get_pci_path(device.id))
    return made_of


async def until(question: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask again until it is so; nothing in the guest announces it. An AssertionError after `PROMPT`."""
    try:
        async with asyncio.timeout(PROMPT):
            while not await question():
                await asyncio.sleep(_LOOK)
    except TimeoutError:
        raise AssertionError(f"after {PROMPT:g} s still not: {what}") from None


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpu_seconds(pids: list[int]) -> float:
    ticks = sum(int(field) for pid in pids for field in process_stat(pid)[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


class GuestContract(Contract):
    """See the module's docstring."""

    @_in_class
    async def test_the_guest_counts_the_vcpus_it_was_given(self, guest: Booted) -> None:
        wanted = math.ceil((await guest.vm.hypervisor_config()).default_vcpus)
        assert await guest.ask("cpus") == wanted

    @_in_class
    async def test_the_guest_counts_the_memory_it_was_given(self, guest: Booted) -> None:
        wanted = (await guest.vm.hypervisor_config()).default_memory
        ram = (await guest.ask("memory"))["ram"]
        assert wanted - 4 <= ram <= wanted, f"{ram} MiB in the guest, {wanted} configured"

    @_in_class
    async def test_the_guest_finds_each_device_at_the_address_that_was_said(self, guest: Booted) -> None:
        """Of what was there at the start, and of what is plugged later."""
        for device in guest.cold:
            await _is_where(guest, device, await guest.manager.get_pci_path(device.id))
        for kind in KINDS:
            plugged = await guest.world.make(kind) if guest.can.can(kind, Op.HOT) else None
            if plugged is not None:
                before = await guest.count(plugged)
                await _is_where(guest, plugged, await guest.plug(plugged), before)
                if guest.can.can(kind, Op.UNPLUG):
                    await guest.manager.try_remove_device(plugged.id, guest.vm)

    @_in_class
    async def test_what_is_read_only_cannot_be_written(self, guest: Booted) -> None:
        """Neither a disk nor the guest's own image, by a guest that tries; a disk that is not, can."""
        for device in guest.cold:
            if not isinstance(device, BlockConfig) or device.kind is not Kind.BLK:
                continue
            disk = await guest.disk(device)
            assert disk is not None
            before = _digest(device.path)
            given = {"node": disk["node"], "offset": disk["size"] - 512, "text": "written by the guest"}
            if not device.read_only:
                assert await guest.ask("write", **given) == len(given["text"])
                with open(device.path, "rb") as file:
                    file.seek(given["offset"])
                    assert file.read(len(given["text"])).decode() == given["text"]
                continue
            with pytest.raises(GuestSaysError):
                await guest.ask("write", **given)
                pytest.fail(f"the guest has written to {device.id}, which is read-only")
            assert _digest(device.path) == before, f"{device.id} is read-only, and another now"

    @_in_class
    async def test_a_share_is_the_directory_it_was_made_of(self, guest: Booted) -> None:
        """By its tag, in both directions; of one that is plugged later too."""
        shares = [device for device in guest.cold if isinstance(device, ShareFsConfig)]
        for device in shares:
            await _is_shared(guest, device)
        if guest.can.can(Kind.SHARE_FS, Op.HOT):
            later = await guest.world.gear.make(Kind.SHARE_FS)
            assert isinstance(later, ShareFsConfig)
            await guest.plug(later)
            await _is_shared(guest, later)
            if guest.can.can(Kind.SHARE_FS, Op.UNPLUG):
                await guest.manager.try_remove_device(later.id, guest.vm)
        elif not shares:
            pytest.skip("this VMM has no shared directory")

    @_in_class
    async def test_entropy_comes_from_the_host(self, guest: Booted) -> None:
        if not guest.can.can(Kind.RNG, Op.COLD):
            pytest.skip(f"an entropy device: {guest.can.why_not(Kind.RNG, Op.COLD)}")

        async def there() -> bool:
            with contextlib.suppress(GuestSaysError):  # its driver is not loaded yet
                said = await guest.ask("entropy")
                return "virtio_rng" in said["source"] and len(said["bytes"]) == 32
            return False

        await until(there, "the guest has its entropy from virtio-rng")

    @_in_class
    async def test_the_consoles_last_words_are_evidence(self, guest: Booted) -> None:
        await guest.ask("say", text="these are my last words")

        async def heard() -> bool:
            return any("these are my last words" in text for text in guest.vm.diagnostics().values())

        await until(heard, "diagnostics() has what the guest said on its console")

    @_in_class
    async def test_what_is_plugged_comes_and_goes(self, guest: Booted) -> None:
        """Each kind by the device manager, for two users: it goes with the second, and may come again."""
        for kind in KINDS:
            device = await guest.world.make(kind) if guest.can.can(kind, Op.HOT) else None
            if device is not None:
                await _comes_and_goes(guest, device)

    @_in_class
    async def test_a_disk_grows_in_the_guest(self, guest: Booted) -> None:
        if not guest.can.can(Kind.BLK, Op.RESIZE):
            pytest.skip(f"resize of a disk: {guest.can.why_not(Kind.BLK, Op.RESIZE)}")
        await _grows(guest, next(device for device in guest.cold if _is_plain(device)))
        if guest.can.can(Kind.BLK, Op.HOT):
            later = await guest.world.gear.make(Kind.BLK)
            await guest.plug(later)
            await _grows(guest, later)
            if guest.can.can(Kind.BLK, Op.UNPLUG):
                await guest.manager.try_remove_device(later.id, guest.vm)

    @_in_class
    async def test_vcpus_come_and_go(self, guest: Booted) -> None:
        if not guest.can.can(Kind.VCPU, Op.HOT):
            pytest.skip(f"hot-plug of a vCPU: {guest.can.why_not(Kind.VCPU, Op.HOT)}")
        first = await guest.ask("cpus")
        assert await guest.vm.resize_vcpu(first + 1) == first + 1
        await until(lambda: _has_cpus(guest, first + 1), f"{first + 1} vCPUs are online in the guest")
        assert len((await guest.vm.get_thread_ids()).vcpus) == first + 1
        if not guest.can.can(Kind.VCPU, Op.UNPLUG):
            with pytest.raises(UnsupportedByHypervisor):
                await guest.vm.resize_vcpu(first)
            return
        assert await guest.vm.resize_vcpu(first) == first
        await until(lambda: _has_cpus(guest, first), f"{first} vCPUs are left in the guest")
        assert len((await guest.vm.get_thread_ids()).vcpus) == first

    @_in_class
    async def test_memory_comes_and_goes(self, guest: Booted) -> None:
        if not guest.can.more_memory:
            pytest.skip(f"hot-plug of memory: {guest.can.why_not(Kind.DIMM, Op.HOT)}")
        base = (await guest.vm.hypervisor_config()).default_memory
        first = (await guest.ask("memory"))["total"]
        assert await guest.vm.resize_memory(base + _GROWTH) == base + _GROWTH
        least = first + _GROWTH - _LOST
        await _has_memory(guest, least, first + _GROWTH, f"the guest has {_GROWTH} MiB more")
        if not guest.can.less_memory:
            with pytest.raises(UnsupportedByHypervisor):
                await guest.vm.resize_memory(base)
            return
        left = await guest.vm.resize_memory(base)
        assert base <= left <= base + _GROWTH
        most = first + left - base
        await _has_memory(guest, most - _LOST, most, f"the guest has {left} MiB, as was said")

    @_in_class
    async def test_the_threads_that_it_names_are_its_vcpus(self, guest: Booted) -> None:
        threads = await guest.vm.get_thread_ids()
        before = await self._busy(guest, threads)
        await guest.ask("spin", seconds=1)
        assert await self._busy(guest, threads) - before > 0.2, (
            "the guest was busy, and these threads were not"
        )

    async def _busy(self, guest: Booted, threads: VcpuThreadIds) -> float:
        """Seconds of a CPU that these threads have had, by /proc."""
        pid = await guest.vm.get_vmm_master_tid()
        stats = [Path(f"/proc/{pid}/task/{thread}/stat").read_text() for thread in threads.vcpus.values()]
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")

    @_in_class
    async def test_metrics_are_those_of_proc(self, guest: Booted) -> None:
        """`cpu_seconds_total` and `resident_bytes`: the guest's memory once, whoever maps it."""
        pids = await guest.vm.get_pids()
        before = _cpu_seconds(pids)
        said = await guest.vm.get_hypervisor_metrics()
        assert all(isinstance(value, float) for value in said.values())
        assert before - 0.1 <= said["cpu_seconds_total"] <= _cpu_seconds(pids) + 0.1
        own = [process_memory(pid) for pid in pids]
        resident = sum(own[0]) + sum(each[0] for each in own[1:])
        assert abs(said["resident_bytes"] - resident) < resident / 8 + (4 << 20)
        await guest.ask("spin", seconds=1)
        later = await guest.vm.get_hypervisor_metrics()
        assert later["cpu_seconds_total"] > said["cpu_seconds_total"] + 0.2, "the guest was busy meanwhile"

    @_in_class
    async def test_a_paused_guest_stands_still(self, guest: Booted) -> None:
        """Its heart does not beat, and its vCPUs cost nothing; then it goes on where it was."""
        if not guest.can.pause:
            pytest.skip("this VMM does not pause")
        threads = await guest.vm.get_thread_ids()
        beats = await guest.ask("beats")
        await guest.vm.pause_vm()
        try:
            await guest.vm.check()
            before = await self._busy(guest, threads)
            await asyncio.sleep(_REST)  # nothing is sent meanwhile: vhost-device-vsock 0.3.0 may forget it
            busy = await self._busy(guest, threads) - before
        finally:
            await guest.vm.resume_vm()
        if self.subject.resumes_vsock:
            (await guest.world.ask()).close()  # it can be dialled again
        assert await guest.ask("beats") - beats < _REST / BEAT / 2, "its heart has beaten through the pause"
        assert busy < _REST / 4, f"its vCPUs were busy for {busy:g} s of a pause of {_REST:g} s"

    @pytest.mark.asyncio
    async def test_a_saved_vm_goes_on_where_it_was(self, world: World, tmp_path: Path) -> None:
        can = await (await world.prepare()).capabilities()
        if not (can.snapshot and can.restore):
            pytest.skip("this VMM does not save a VM, or does not begin with one that was")
        assert world.vm is not None
        vm = world.vm
        await vm.start_vm(self.subject.patience)
        world.pids.update(await vm.get_pids())
        await (await vm.get_agent_socket()).wait_ready(self.subject.patience)
        ask = await world.ask()
        await ask("keep", name="kept", text="in memory only")
        saved = tmp_path / "saved"
        saved.mkdir()
        await vm.save_vm(str(saved))
        if self.subject.resumes_vsock:  # a vsock of the VMM's own may have ended its connections
            ask = await world.ask()
        assert await ask("kept", name="kept") == "in memory only", "the VM that was saved goes on"
        await vm.stop_vm()
        async with World(self.subject, tmp_path / "other") as other:
            again = await other.restored(saved)
            await (await again.get_agent_socket()).wait_ready(self.subject.patience)
            assert await (await other.ask())("kept", name="kept") == "in memory only"


async def _comes_and_goes(guest: Booted, device: DeviceConfig) -> None:
    name, before = device.kind.value, await guest.count(device)
    for _ in range(2):
        await guest.plug(device)
        await until(lambda: _counts(guest, device, before + 1), f"the guest has the new {name}")
        await guest.plug(device)
        with pytest.raises(BugError):
            await guest.vm.add_device(device)
        if not guest.can.can(device.kind, Op.UNPLUG):
            with pytest.raises(UnsupportedByHypervisor):
                await guest.vm.remove_device(device.id)
            return
        await guest.manager.try_remove_device(device.id, guest.vm)
        assert await guest.count(device) == before + 1, "it has gone, while it had a user"
        await guest.manager.try_remove_device(device.id, guest.vm)
        await until(lambda: _counts(guest, device, before), f"the {name} has gone")


async def _grows(guest: Booted, device: DeviceConfig) -> None:
    await until(lambda: _has_size(guest, device, DISK_SIZE), f"{device.id} is there")
    await guest.manager.update_disk(guest.world.gear.resized(device).id, guest.vm)
    await until(lambda: _has_size(guest, device, 2 * DISK_SIZE), f"{device.id} has grown")


async def _is_where(guest: Booted, device: DeviceConfig, said: str, before: int = 0) -> None:
    """`before`: how many such the guest had before this one was plugged."""
    await until(lambda: _counts_above(guest, device, before), f"the guest has {device.id}")
    true = await guest.places(device)
    assert said in true, (
        f"{device.id} ({device.kind.value}) is at {true} in the guest, and was said at {said!r}"
    )


async def _is_shared(guest: Booted, device: ShareFsConfig) -> None:
    files: dict[str, str] = {}

    async def mounted() -> bool:
        with contextlib.suppress(GuestSaysError):  # its driver may be at it still
            files.update(await guest.ask("share", tag=device.tag, write="answer"))
        return bool(files)

    await until(mounted, f"the guest can mount {device.tag}")
    assert files["whose"] == Path(device.source, "whose").read_text()
    assert Path(device.source, "answer").read_text() == "from the guest\n"


def _is_plain(device: DeviceConfig) -> bool:
    return isinstance(device, BlockConfig) and device.kind is Kind.BLK and not device.read_only


async def _counts(guest: Booted, device: DeviceConfig, wanted: int) -> bool:
    return await guest.count(device) == wanted


async def _counts_above(guest: Booted, device: DeviceConfig, before: int) -> bool:
    return await guest.count(device) > before


async def _has_size(guest: Booted, device: DeviceConfig, size: int) -> bool:
    disk = await guest.disk(device)
    return disk is not None and disk["size"] == size


async def _has_cpus(guest: Booted, wanted: int) -> bool:
    return bool(await guest.ask("cpus", wanted=wanted) == wanted)


async def _has_memory(guest: Booted, least: int, most: int, what: str) -> None:
    seen: list[int] = []

    async def there() -> bool:
        seen.append((await guest.ask("memory"))["total"])
        return least <= seen[-1] <= most

    try:
        await until(there, what)
    except AssertionError as error:
        raise AssertionError(f"{error}: it has {seen[-1:]} of {least} to {most} MiB") from None
