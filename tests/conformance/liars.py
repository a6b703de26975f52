"""Drivers that lie: each is QEMU's with one answer that is not true, and the test that must find it out.

What: `LIES`, by name. `Liar` passes everything on to the real VM; each of its kinds says what it lies in.
Why: a suite that asks the driver believes it (one that lied in everything passed the earlier one, 16 of 16).
Who writes a test for a promise adds the liar that it catches.
Invariants: a liar lies in one thing and is plausible in it: right types, right errors, right order of calls.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.subject import Subject
from devices.config import BlockConfig, DeviceConfig, ShareFsConfig, VsockConfig
from devices.kinds import YES, Kind, Support
from devices.undo import MemoryUndo, UndoLog
from hypervisors.base import Capabilities, VcpuThreadIds, VmExit
from hypervisors.qemu.plugin import plugin
from tests.conformance.test_qemu import qemu_subject

__all__ = ["LIES", "Liar", "Lie"]


class Liar:
    """One VM whose driver lies, by what its kinds override; this one does not."""

    snapshot = False

    def __init__(self, real: Any, scratch: str) -> None:
        self.real = real
        self.scratch = scratch
        self.runs = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    async def start_vm(self, timeout: float) -> None:
        await self.real.start_vm(timeout)
        self.runs = True

    @classmethod
    def most(cls, real: Capabilities) -> Capabilities:
        """What the plugin says that it can."""
        return real


class _OneAddress(Liar):
    async def add_device(self, device: DeviceConfig) -> str:
        said: str = await self.real.add_device(device)
        return "02" if device.kind in (Kind.BLK, Kind.NET, Kind.SHARE_FS) else said


class _Writable(Liar):
    """What is read-only is a copy that can be written, so that not even the file tells."""

    async def add_device(self, device: DeviceConfig) -> str:
        if isinstance(device, BlockConfig) and device.kind is Kind.BLK and device.read_only:
            copy = f"{self.scratch}/{device.id}"
            shutil.copyfile(device.path, copy)
            os.chmod(copy, 0o666)
            device = dataclasses.replace(device, path=copy, read_only=False)
        said: str = await self.real.add_device(device)
        return said


class _AnotherDirectory(Liar):
    async def add_device(self, device: DeviceConfig) -> str:
        if isinstance(device, ShareFsConfig):
            Path(self.scratch, "whose").write_text("somebody else's")
            device = dataclasses.replace(device, source=self.scratch)
        said: str = await self.real.add_device(device)
        return said


class _AnotherTag(Liar):
    async def add_device(self, device: DeviceConfig) -> str:
        if isinstance(device, ShareFsConfig):
            device = dataclasses.replace(device, tag="another")
        said: str = await self.real.add_device(device)
        return said


class _NoPause(Liar):
    async def pause_vm(self) -> None:
        await self.real.check()

    resume_vm = pause_vm


class _NoMemory(Liar):
    async def resize_memory(self, mib: int) -> int:
        return mib


class _NoVcpus(Liar):
    """Threads and count are as they should be; the guest has one."""

    count = 1

    async def capabilities(self) -> Capabilities:
        real: Capabilities = await self.real.capabilities()
        return dataclasses.replace(
            real, devices={**real.devices, Kind.VCPU: Support(cold=YES, hot=YES, unplug=YES)}
        )

    async def resize_vcpu(self, count: int) -> int:
        self.count = count
        return count

    async def get_thread_ids(self) -> VcpuThreadIds:
        real: VcpuThreadIds = await self.real.get_thread_ids()
        return VcpuThreadIds(dict.fromkeys(range(self.count), real.vcpus[0]))


class _LessMemory(Liar):
    """The VM has less than its section says."""

    async def hypervisor_config(self) -> Any:
        section = await self.real.hypervisor_config()
        return dataclasses.replace(section, default_memory=section.default_memory + 64)

    async def resize_memory(self, mib: int) -> int:
        grown: int = await self.real.resize_memory(mib - 64)
        return grown + 64


class _FewerVcpus(Liar):
    async def hypervisor_config(self) -> Any:
        return dataclasses.replace(await self.real.hypervisor_config(), default_vcpus=2.0)


class _AnotherThread(Liar):
    async def get_thread_ids(self) -> VcpuThreadIds:
        real: VcpuThreadIds = await self.real.get_thread_ids()
        return VcpuThreadIds(dict.fromkeys(real.vcpus, await self.real.get_vmm_master_tid()))


class _NoSize(Liar):
    async def update_device(self, device: DeviceConfig) -> None:
        await self.real.check()


class _NoUnplug(Liar):
    async def remove_device(self, device_id: str) -> None:
        if not self.runs or not device_id.startswith("blk-"):
            await self.real.remove_device(device_id)


class _NoSnapshot(Liar):
    """Files of the right names and sizes; a VM that is "restored" from them is a new one."""

    async def capabilities(self) -> Capabilities:
        return self.most(await self.real.capabilities())

    @classmethod
    def most(cls, real: Capabilities) -> Capabilities:
        return dataclasses.replace(real, snapshot=True, restore=True)

    async def save_vm(self, path: str) -> None:
        await self.real.check()
        Path(path, "device_state").write_bytes(b"{}")
        with open(f"{path}/memory", "wb") as file:
            file.truncate(256 << 20)

    async def add_device(self, device: DeviceConfig) -> str:
        if isinstance(device, VsockConfig):  # a new guest calls home
            device = dataclasses.replace(device, home_call=True)
        said: str = await self.real.add_device(device)
        return said

    async def restore_vm(self, path: str, timeout: float) -> None:
        await self.real.start_vm(timeout)


class _CheckAsksNobody(Liar):
    async def check(self) -> None:
        await self.real.get_vmm_master_tid()


class _FixedMetrics(Liar):
    async def get_hypervisor_metrics(self) -> dict[str, float]:
        return {"cpu_seconds_total": 1.0, "resident_bytes": float(128 << 20)}


class _NoConsole(Liar):
    def diagnostics(self) -> dict[str, str]:
        real: dict[str, str] = self.real.diagnostics()
        return {name: text for name, text in real.items() if name != "guest console"}


class _Exits(Liar):
    async def wait_vm(self) -> VmExit:
        real: VmExit = await self.real.wait_vm()
        return dataclasses.replace(real, reason="qemu exited with 0") if "guest" in real.reason else real


class _ItWasQemu(Liar):
    async def wait_vm(self) -> VmExit:
        real: VmExit = await self.real.wait_vm()
        return dataclasses.replace(real, reason=real.reason.replace("virtiofsd", "qemu"))


class _NoJournal(Liar):
    """What it acquires is written down nowhere."""


@dataclass(frozen=True)
class LyingPlugin:
    """QEMU's, whose VMs are of this kind. Another process can have it (pickle)."""

    kind: type[Liar]
    name: str = plugin.name
    section: type[Any] = plugin.section

    @property
    def capabilities(self) -> Capabilities:
        return self.kind.most(plugin.capabilities)

    def adjust_config(self, section: Any) -> Any:
        return plugin.adjust_config(section)

    def validate_config(self, section: Any) -> None:
        plugin.validate_config(section)

    def check(self) -> list[Any]:
        return plugin.check()

    def create(self, section: Any, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> Any:
        log = MemoryUndo() if self.kind is _NoJournal else undo
        real = plugin.create(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=log)
        scratch = tempfile.mkdtemp(prefix="liar-", dir=os.path.dirname(state_dir))
        os.chmod(scratch, 0o755)
        return self.kind(real, scratch)


@dataclass(frozen=True)
class Lie:
    """`test`: the one that finds it out, and `says` what it says then. `later`: the lie is in what a VM does
    once it runs, so that it may be told of one that was started honestly. `changes`: of its section."""

    kind: type[Liar]
    test: str
    says: str = ""
    later: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        """For the suite."""
        honest = qemu_subject(accelerator="tcg", block_device_driver="virtio-pmem", **self.changes)
        return dataclasses.replace(honest, plugin=LyingPlugin(self.kind))


_SHARE = "test_a_share_is_the_directory_it_was_made_of"
LIES = {
    "one address for all": Lie(
        _OneAddress,
        "test_the_guest_finds_each_device_at_the_address_that_was_said",
        r"is at \[.*\] in the guest, and was said at '02'",
        later=True,
    ),
    "every disk writable": Lie(
        _Writable, "test_what_is_read_only_cannot_be_written", "has written to .*, which is read-only"
    ),
    "another directory shared": Lie(_AnotherDirectory, _SHARE, "somebody else's", later=True),
    "another tag": Lie(_AnotherTag, _SHARE, "still not: the guest can mount", later=True),
    "no pause": Lie(_NoPause, "test_a_paused_guest_stands_still", "has beaten through the pause", later=True),
    "no more memory": Lie(
        _NoMemory, "test_memory_comes_and_goes", "still not: the guest has 128 MiB more", later=True
    ),
    "less memory": Lie(
        _LessMemory, "test_the_guest_counts_the_memory_it_was_given", "MiB in the guest", later=True
    ),
    "no more vCPUs": Lie(
        _NoVcpus,
        "test_vcpus_come_and_go",
        "still not: 2 vCPUs are online",
        changes={"default_maxvcpus": 1},
    ),
    "fewer vCPUs": Lie(_FewerVcpus, "test_the_guest_counts_the_vcpus_it_was_given", "1 == 2", later=True),
    "threads of something else": Lie(
        _AnotherThread, "test_the_threads_that_it_names_are_its_vcpus", "these threads were not", later=True
    ),
    "no disk grows": Lie(_NoSize, "test_a_disk_grows_in_the_guest", "still not: .* has grown", later=True),
    "no disk goes": Lie(
        _NoUnplug, "test_what_is_plugged_comes_and_goes", "still not: the virtio-blk has gone", later=True
    ),
    "a snapshot of nothing": Lie(_NoSnapshot, "test_a_saved_vm_goes_on_where_it_was", "== 'in memory only'"),
    "check asks nobody": Lie(_CheckAsksNobody, "test_check_asks_the_vmm", "content with a VMM that stands"),
    "fixed metrics": Lie(_FixedMetrics, "test_metrics_are_those_of_proc", later=True),
    "a silent console": Lie(
        _NoConsole,
        "test_the_consoles_last_words_are_evidence",
        "has what the guest said",
        later=True,
    ),
    "every end an exit": Lie(_Exits, "test_the_guests_own_end_is_told_as_what_it_is"),
    "it was QEMU": Lie(_ItWasQemu, "test_a_daemons_death_is_the_vms_and_is_told_by_its_name"),
    "no journal": Lie(
        _NoJournal,
        "test_of_a_killed_driver_nothing_is_left_but_what_its_journal_undoes",
        "each stands in the journal",
    ),
}
