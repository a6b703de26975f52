"""Who is under test: a plugin, a section of its configuration that boots here, and what breaks it.

What: `Subject`, which a plugin's test module makes one of, and `World`, one VM of it with its directories,
its undo log and the counts from before. Its guest has the probe as its first program (`conformance.guest`).
Why: the contract knows no VMM; all that differs between them is here.
Invariants: after `World.close` nothing of the VM is left, or it says what is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from conformance.gear import Gear
from conformance.guest import INIT, Asked, probed
from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.kinds import Kind, Op
from devices.undo import MemoryUndo
from hypervisors.base import Hypervisor, HypervisorPlugin, Restoring

__all__ = ["SANDBOX", "Subject", "World"]

SANDBOX = "conformance"


@dataclass(frozen=True)
class Subject:
    """`section`: the plugin's section, with a kernel and an image that boot our guest; it is adjusted and
    validated here. `breaks`: keys with which the section is valid, but the VMM ends right after its start,
    given a file that is no kernel. `resumes_vsock`: the guest can be dialled as soon as a pause is over.
    `patience`: seconds for a boot on a busy machine. `tap_by_name`: it opens a card's tap itself. `devices`:
    those of a usual VM, the root image first. `powers_off`: its guest can switch it off.
    """

    plugin: HypervisorPlugin[Any]
    section: Callable[[], Any]
    breaks: Callable[[Path], dict[str, Any]] = lambda path: {"kernel": str(path)}
    vsock_daemon: str = ""
    resumes_vsock: bool = True
    patience: float = 60.0
    tap_by_name: bool = False
    powers_off: bool = True

    def devices(self, section: Any, share: Path) -> Iterator[DeviceConfig]:
        """What the sandbox adds before the start, as far as this VMM has it."""
        if section.image:
            yield BlockConfig(id="image", path=section.image, read_only=True)
        yield VsockConfig(daemon=self.vsock_daemon)
        if self.plugin.capabilities.can(Kind.SHARE_FS, Op.COLD) and section.shared_fs != "none":
            yield ShareFsConfig(source=str(share))
        if self.plugin.capabilities.can(Kind.RNG, Op.COLD):
            yield RngConfig()
        yield ConsoleConfig()


@dataclass
class World:
    """One VM and all around it."""

    subject: Subject
    directory: Path
    undo: MemoryUndo = field(default_factory=MemoryUndo)
    vm: Hypervisor | None = None
    pids: set[int] = field(default_factory=set)
    before: list[str] = field(default_factory=list)
    gear: Gear = field(init=False)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What a test has left is asserted only if it got that far."""
        if kind is None:
            await self.close()
            return
        if self.vm is not None:
            await self.vm.cleanup()
        await self.gear.close()

    async def open(self) -> None:
        """Make the directories, and count what this process has."""
        for path in (self.state, self.share):
            path.mkdir(mode=0o700, parents=True)
        subject = self.subject
        self.gear = Gear(self.share, vsock_daemon=subject.vsock_daemon, tap_by_name=subject.tap_by_name)
        await asyncio.to_thread(int)  # the loop's own thread and descriptors exist from here on
        self.before = sorted(os.listdir("/proc/self/fd"))

    @property
    def state(self) -> Path:
        """The sandbox's directory. Its name is its own on this host, as a sandbox's is: a jail has it too."""
        return self.directory / f"vm-{zlib.crc32(str(self.directory).encode()):08x}"

    @property
    def share(self) -> Path:
        """A directory of the host."""
        return self.directory / "share"

    def create(self, **changes: Any) -> Hypervisor:
        """A VM that is not prepared."""
        plugin = self.subject.plugin
        section = dataclasses.replace(plugin.adjust_config(self.subject.section()), **changes)
        if section.image:
            section = dataclasses.replace(
                section, image=probed(section.image), kernel_params=f"{section.kernel_params} {INIT}".strip()
            )
        section = plugin.adjust_config(section)
        plugin.validate_config(section)
        self.vm = plugin.create(section, sandbox_id=SANDBOX, state_dir=str(self.state), undo=self.undo)
        return self.vm

    async def prepare(self, *, netns: str | None = None, **changes: Any) -> Hypervisor:
        """A VM with the usual devices."""
        vm = self.create(**changes)
        await vm.prepare_vm(SANDBOX, netns)
        for device in self.subject.devices(await vm.hypervisor_config(), self.share):
            await vm.add_device(device)
        return vm

    async def start(self, *, netns: str | None = None, **changes: Any) -> Hypervisor:
        """A VM whose vCPUs run; nobody waits for the guest."""
        vm = await self.prepare(netns=netns, **changes)
        await vm.start_vm(self.subject.patience)
        self.pids.update(await vm.get_pids())
        return vm

    async def boot(self, **changes: Any) -> Hypervisor:
        """A VM whose agent listens."""
        vm = await self.start(**changes)
        await (await vm.get_agent_socket()).wait_ready(self.subject.patience)
        return vm

    async def ask(self) -> Asked:
        """A connection to the probe in the guest of a VM that has booted; closed with all else."""
        assert self.vm is not None
        asked = await Asked.to(await self.vm.get_agent_socket(), self.subject.patience)
        self.gear.stack.callback(asked.close)
        return asked

    async def restored(self, saved: Path) -> Hypervisor:
        """A VM that goes on where the one went that `save_vm` has written into `saved`; its guest runs."""
        vm = self.create()
        await vm.prepare_vm(SANDBOX, None)
        for device in self.subject.devices(await vm.hypervisor_config(), self.share):
            if isinstance(device, VsockConfig):  # the guest has called home long ago
                await vm.add_device(dataclasses.replace(device, home_call=False))
            else:
                await vm.add_device(device)
        await cast("Restoring", vm).restore_vm(str(saved), self.subject.patience)
        self.pids.update(await vm.get_pids())
        return vm

    async def make(self, kind: Kind) -> DeviceConfig | None:
        """One of this kind; None where the host has nothing for it, which is told by a warning."""
        if missing := self.gear.missing(kind):
            if kind is not Kind.VFIO or os.environ.get("KATA_BENCH_HOST"):
                warnings.warn(f"{kind.value} is not tried: {missing}", stacklevel=2)
            return None
        return await self.gear.make(kind)

    async def close(self) -> None:
        """Release, twice, as a failed sandbox start does; nothing may be left."""
        if self.vm is not None:
            await self.vm.cleanup()
            await self.vm.cleanup()
            assert await self.vm.get_pids() == []
            assert isinstance(self.vm.diagnostics(), dict)
        await self.gear.close()
        left = {
            "undo log": self.undo.entries,
            "state directory": os.listdir(self.state),
            "processes": [pid for pid in self.pids if Path(f"/proc/{pid}").exists()],
            "descriptors": sorted(set(os.listdir("/proc/self/fd")) - set(self.before)),
        }
        assert not any(left.values()), left
