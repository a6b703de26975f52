"""One VM under Dragonball: `Dragonball` implements `hypervisors.base.Hypervisor`.

What: the process around the library (docs/dragonball.md), the talk with it, its devices; `recipes` has what
it is told. What it does as every other driver is `hypervisors.process_vm`'s.
Invariants:
- Order: process, greeting, machine, boot source, devices, start, what serves the shared directory. The
  process ends with the first action that fails.
- All that is plugged before the start is told at the start, so it can be taken back until then.
- A disk's address is its name in the guest, the first letter that is free; what is plugged later needs the
  upcall server of the guest's kernel, which is waited for.
- What a method acquired is released by `cleanup`, whatever failed in between.
Source: the library of Kata 4.1.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from devices.child import Child
from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    ShareFsConfig,
    VhostUserBlkConfig,
    VsockConfig,
)
from devices.console import Console
from devices.errors import BugError, HostError, HypervisorError, UnsupportedByHypervisor
from devices.kinds import Op
from devices.lines import Budget, LineLog
from devices.plain import plain
from devices.rendezvous import connect_now, listen
from devices.threads import look
from devices.undo import UndoLog
from devices.vsock import HybridVsock
from hypervisors.base import Capabilities
from hypervisors.dragonball import recipes
from hypervisors.dragonball.abilities import abilities
from hypervisors.dragonball.config import DragonballConfig
from hypervisors.dragonball.confinement import confinement, meeting_place
from hypervisors.dragonball.talk import Talk
from hypervisors.parts import VmParts
from hypervisors.process_vm import ProcessVm, need_kvm, to_its_end

__all__ = ["Dragonball"]

_CALL = 20.0  # seconds for an action that waits for nobody
_SAVE = 120.0  # for one that takes as long as the VM's memory takes to be written
_API, _VSOCK = "api.sock", "vsock.sock"  # in the meeting place
_STATE, _MEMORY = "state.json", "memory"  # what `save_vm` writes
_PLACES = 16  # that our kernel's tables have for devices
_DISK = "InsertBlockDevice"  # what has been inserted so can be removed
_LETTERS = string.ascii_lowercase
_FIRST_TRY, _LAST_TRY = 0.02, 0.5  # seconds between two plugs, until the upcall server is there

_log = structlog.get_logger("dragonball")


@dataclass(slots=True)
class Parts(VmParts):
    """`devices`: all that is plugged, by id, in order. `disks`: the letters of those that are disks."""

    orderly: str = "the guest ended the VM"
    talk: Talk | None = None
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    disks: dict[str, str] = field(default_factory=dict)

    def words(self) -> dict[str, str]:
        """It says on stderr only what it does not answer."""
        return {"vmm refused": self.talk.refusal if self.talk is not None else ""}

    def drain(self) -> None:
        """What `VmParts.drain` does, and the events."""
        VmParts.drain(self)  # no super(): a dataclass with slots is made anew
        if self.talk is not None:
            self.talk.read()


class Dragonball(ProcessVm[DragonballConfig, Parts]):
    """See the module's docstring and `hypervisors.base.Restoring`."""

    name = "dragonball"
    vmm = "Dragonball"
    vcpu = re.compile(r"db_vcpu(\d+)")

    def __init__(self, section: DragonballConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        super().__init__(section, Parts(), sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)
        self._able = abilities(section)
        self._place = meeting_place(state_dir)
        self._saved = ""  # the directory that `restore_vm` begins with
        self._plugging = asyncio.Lock()
        self._events = Budget(self.name, "events")

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`."""
        self._prepare(id, netns)
        need_kvm(self.vmm)
        os.makedirs(self._place, exist_ok=True)
        self._prepared = True

    async def restore_vm(self, path: str, timeout: float) -> None:
        """See `Restoring.restore_vm`."""
        self._require_saving()
        self._saved = path
        await self.start_vm(timeout)

    async def pause_vm(self) -> None:
        """See `Hypervisor.pause_vm`."""
        await self._ask("PauseMicroVm")

    async def resume_vm(self) -> None:
        """See `Hypervisor.resume_vm`."""
        await self._ask("ResumeMicroVm")

    async def save_vm(self, path: str) -> None:
        """See `Hypervisor.save_vm`. Dragonball pauses a VM that runs, and has it run on."""
        self._require_saving()
        await self._ask("SaveMicrovm", _files(path), timeout=_SAVE)

    def _require_saving(self) -> None:
        if not self._able.snapshot:
            raise UnsupportedByHypervisor(self.name, "saving or restoring a VM that shares directories")

    # --- sizing

    async def resize_vcpu(self, count: int) -> int:
        """Not used here."""
        raise UnsupportedByHypervisor(self.name, f"changing the number of vCPUs of a VM (to {count})")

    async def resize_memory(self, mib: int) -> int:
        """Not used here."""
        raise UnsupportedByHypervisor(self.name, f"changing the memory of a VM (to {mib} MiB)")

    # --- devices

    async def add_device(self, device: DeviceConfig) -> str:
        """See `Hypervisor.add_device`. A disk's address is its name in the guest, "/dev/vdb"."""
        parts, hot = self._parts, self._death is not None
        if not self._prepared:
            raise BugError("add_device needs prepare_vm before it")
        self._able.require(self.name, device.kind, Op.HOT if hot else Op.COLD)
        async with self._plugging:
            if device.id in parts.devices:
                raise BugError(f"there is a device {device.id} already")
            if len(parts.devices) >= _PLACES:
                raise HypervisorError(
                    f"no place for device {device.id}: a VM has {_PLACES}",
                    phase="devices",
                    code="RESOURCE_EXHAUSTED",
                )
            # What cannot be is refused before anything is done.
            action = recipes.plug(device, self._section, self._socket(device))
            with parts.helpers.unsettled(device.id):
                try:
                    self._serve(device)
                    if hot and action is not None:
                        await self._plug(device.id, *action)
                except BaseException:
                    await parts.helpers.end(device.id)
                    raise
            parts.devices[device.id] = device
            if not isinstance(device, BlockConfig | VhostUserBlkConfig):
                return ""
            letter = next(letter for letter in _LETTERS if letter not in parts.disks.values())
            parts.disks[device.id] = letter
            return f"/dev/vd{letter}"

    async def _plug(self, device_id: str, name: str, fields: Any) -> None:
        """Until the guest's upcall server is there; then until the guest has it."""
        limit, pause = self._section.hotplug_timeout, _FIRST_TRY
        loop = asyncio.get_running_loop()
        end = loop.time() + limit
        while True:
            plugging = asyncio.create_task(self._ask(name, fields, timeout=limit + _CALL))
            try:
                await to_its_end(plugging)
                return
            except UnsupportedByHypervisor:
                if loop.time() > end:
                    raise
            except asyncio.CancelledError:  # nobody wants it any more, and it may have come
                if name == _DISK and not plugging.cancelled() and plugging.exception() is None:
                    with contextlib.suppress(HypervisorError):
                        await self._take_out(device_id)
                raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_TRY)

    def _serve(self, device: DeviceConfig) -> None:
        """Meet who serves it from outside; the channel and the console are here for good."""
        parts = self._parts
        match device:
            case VhostUserBlkConfig():
                from devices.vhost_relay import Relay  # few VMs have such a device

                parts.helpers.add(device, Relay.start(device.path, self._socket(device)))
            case VsockConfig():
                parts.channel = HybridVsock(
                    self._socket(device),
                    home_call=device.home_call,
                    tells_port=True,
                    diagnostics=parts.diagnostics,
                )
            case ConsoleConfig():
                parts.console = Console(self._log("console") if self._section.enable_debug else None)
            case _:
                pass

    def _socket(self, device: DeviceConfig) -> str:
        return f"{self._place}/{_VSOCK if isinstance(device, VsockConfig) else f'{device.id}.sock'}"

    async def remove_device(self, device_id: str) -> None:
        """See `Hypervisor.remove_device`: it is gone when the guest has let go."""
        parts = self._parts
        device = parts.devices.get(device_id)
        if device is None:
            raise UnsupportedByHypervisor(self.name, f"removing device {device_id}, which is not there")
        if self._death is not None:
            self._able.require(self.name, device.kind, Op.UNPLUG)
        elif isinstance(device, VsockConfig | ConsoleConfig):
            raise UnsupportedByHypervisor(self.name, f"removing device {device_id}")
        async with self._plugging:
            with parts.helpers.unsettled(device_id):
                if self._death is not None:
                    await to_its_end(asyncio.create_task(self._take_out(device_id)))
                parts.devices.pop(device_id, None)
                parts.disks.pop(device_id, None)
                await parts.helpers.end(device_id)

    async def _take_out(self, device_id: str) -> None:
        await self._ask("PrepareRemoveBlockDevice", device_id, timeout=self._section.hotplug_timeout)
        await self._ask("RemoveBlockDevice", device_id)

    async def update_device(self, device: DeviceConfig) -> None:
        """Dragonball has no way to."""
        raise UnsupportedByHypervisor(self.name, f"changing device {device.id}")

    # --- knowledge

    async def check(self) -> None:
        """See `Hypervisor.check`."""
        info = await self._ask("GetInstanceInfo")
        state = info.get("state") if isinstance(info, dict) else info
        if state not in ("Running", "Paused"):
            raise HypervisorError(f"the VM does not run: {state!r:.100}")

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        if not self._prepared:
            raise BugError("capabilities needs prepare_vm before it")
        return self._able

    async def disconnect(self) -> None:
        """See `Hypervisor.disconnect`."""
        if self._parts.talk is not None:
            await self._parts.talk.close()

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`."""
        await self.stop_vm()
        await self._parts.close()
        await self.disconnect()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._place):  # sockets: ours, and those that Dragonball leaves
                os.unlink(f"{self._place}/{name}")
            os.rmdir(self._place)

    # --- how it is done

    async def _launch(self, timeout: float) -> None:
        parts, section = self._parts, self._section
        assert self._death is not None
        path = f"{self._place}/{_API}"
        try:
            with contextlib.ExitStack() as ours:
                listener = ours.enter_context(listen(path))
                parts.talk = Talk(connect_now(path), self._on_event)  # in the backlog before there is a VMM
                devices = tuple(parts.devices.values())
                confined = await look(self._confinement, devices)
                if self._death.stopping:
                    raise HypervisorError("the VM was stopped before Dragonball ran", code="ABORTED")
                parts.process = await Child.spawn(
                    recipes.arguments(section, api=listener.fileno()),
                    name=self.name,
                    undo=self._undo,
                    confinement=confined,
                    pass_fds=[listener.fileno()],
                    stdout=parts.console.guest_end if parts.console is not None else -1,
                    on_output=self._log(self.name),
                )
        except OSError as error:
            raise HostError(f"cannot start Dragonball: {error}", phase="vmm") from error
        if parts.console is not None:
            parts.console.handed_over()
        self._death.begin(f"watch {self._sandbox_id}")
        await self._or_death(self._begin(timeout))

    def _confinement(self, devices: tuple[DeviceConfig, ...]) -> Any:
        return confinement(self._section, devices, netns=self._netns, state_dir=self._state_dir)

    async def _begin(self, timeout: float) -> None:
        """The VM, whole or not at all."""
        parts, section = self._parts, self._section
        await self._running(parts.talk).hello(timeout)
        parts.answers = True
        home_port = parts.channel.home_port if parts.channel is not None else 0
        words = recipes.command_line(section, console=parts.console is not None, home_port=home_port)
        await self._ask(*recipes.machine(section))
        await self._ask(*recipes.boot_source(section, words))
        for device in parts.devices.values():
            if (action := recipes.plug(device, section, self._socket(device))) is not None:
                await self._ask(*action)
        if self._saved:
            await self._ask("StartMicroVmFromSnapshot", _files(self._saved), timeout=timeout)
            await self._ask("ResumeMicroVm")  # or its vsock does not answer
        else:
            await self._ask("StartMicroVm", timeout=timeout)
        for device in parts.devices.values():
            if isinstance(device, ShareFsConfig):
                await self._ask(*recipes.mount(device))
        parts.helpers.handed_over()

    def _on_event(self, content: Mapping[str, Any]) -> None:
        name, death = content["event"], self._death
        if self._events.take():
            _log.debug("event", content=f"{content!r:.200}")
        if death is None or death.stopping:
            return
        reason = plain(f"{content.get('reason')}")[:100]
        if name == "panic":
            death.ends(f"Dragonball panicked: {plain(str(content.get('message')))[:200]}")
        elif name == "exit" and reason == "reset":
            death.guest_ends("reset")
        elif name == "exit":
            death.ends(f"Dragonball ended the VM ({reason})")

    def _log(self, name: str) -> Callable[[bytes], None]:
        return LineLog(name, lambda line: _log.debug("says", source=name, line=line)).write

    def _sockets(self) -> dict[str, str]:
        return {"api": f"{self._place}/{_API}", "vsock": f"{self._place}/{_VSOCK}"}

    async def _say_quit(self, timeout: float) -> None:
        await self._ask("ShutdownMicroVm", timeout=timeout)

    async def _ask(self, name: str, fields: Any = None, *, timeout: float = _CALL) -> Any:
        self._process()
        return await self._running(self._parts.talk).ask(name, fields, timeout=timeout)


def _files(path: str) -> dict[str, str]:
    return {"state_path": f"{path}/{_STATE}", "mem_path": f"{path}/{_MEMORY}"}
