"""One VM under Cloud Hypervisor: `CloudHypervisor` implements `hypervisors.base.Hypervisor`.

What: its process, its API, its devices; `recipes` has what it is told, `sizing` how it grows, `saved` how a
saved VM begins. What it does as every other driver is `hypervisors.process_vm`'s.
Invariants:
- Order: process, ping, vm.create with all that can be in it, cards with their descriptors, vm.boot. What was
  not created whole is never booted: the process ends with the first call that fails.
- A device has gone when the event says so; a second request for it is never sent.
- A guest that resets has ended: Cloud Hypervisor would boot the VM again in the same process.
- What a method acquired is released by `cleanup`, whatever failed in between.
Source: Cloud Hypervisor 53.0, as seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from devices.child import Child
from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    ShareFsConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VsockConfig,
)
from devices.console import Console
from devices.disk_size import disk_size
from devices.errors import BugError, CallerError, HypervisorError, UnsupportedByHypervisor
from devices.kinds import Op
from devices.lines import Budget, LineLog
from devices.rendezvous import connect_now, listen
from devices.share_fs import Virtiofsd
from devices.threads import acquire, look
from devices.undo import UndoLog
from devices.vsock import HybridVsock
from hypervisors.base import Capabilities
from hypervisors.cloud_hypervisor import recipes, saved
from hypervisors.cloud_hypervisor.abilities import abilities
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.confinement import confinement
from hypervisors.cloud_hypervisor.events import Events
from hypervisors.cloud_hypervisor.sizing import Sizer
from hypervisors.http_api import HttpApi
from hypervisors.parts import VmParts
from hypervisors.process_vm import ProcessVm, need_kvm, to_its_end

__all__ = ["CloudHypervisor"]

_CALL = 20.0  # seconds for one call of the API, whose one thread may wait for a guest or a daemon
_SAVE = 120.0  # for one that takes as long as the VM's memory takes to be written or read
_API, _VSOCK = "clh.sock", "vsock.sock"  # in the state directory
_BDF = re.compile(r"0000:00:([01][0-9a-f])\.0")
_UNSET = (1 << 64) - 1  # a counter that has not counted
_SLOTS = 32
_FAILED = "VCPU generated error"

_log = structlog.get_logger("clh")


@dataclass(slots=True)
class Parts(VmParts):
    """`devices`: all that is plugged, by id. `sockets`: of their back ends, likewise. `leaving`: those that
    were told to go."""

    events: Events | None = None
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)

    def words(self) -> dict[str, str]:
        """It says on stderr only what it does not answer."""
        return {"vmm refused": self.api.refusal if self.api is not None else ""}

    def drain(self) -> None:
        """What `VmParts.drain` does, and the events."""
        VmParts.drain(self)  # no super(): a dataclass with slots is made anew
        if self.events is not None:
            self.events.read()


class CloudHypervisor(ProcessVm[ClhConfig, Parts]):
    """See the module's docstring and `hypervisors.base.Restoring`."""

    name = "clh"
    vmm = "Cloud Hypervisor"
    vcpu = re.compile(r"vcpu(\d+)")

    def __init__(self, section: ClhConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        super().__init__(section, Parts(), sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)
        self._able = abilities(section)
        self._saved = ""  # the directory that `restore_vm` begins with
        self._sizer: Sizer | None = None  # from the start on
        self._plugging = asyncio.Lock()
        self._events = Budget(self.name, "events")

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`."""
        self._prepare(id, netns)
        need_kvm(self.vmm)
        self._prepared = True

    async def restore_vm(self, path: str, timeout: float) -> None:
        """See `Restoring.restore_vm`."""
        if not self._able.restore:
            raise UnsupportedByHypervisor(
                self.name, "restoring a VM that shares directories, or with landlock"
            )
        self._saved = path
        await self.start_vm(timeout)

    async def pause_vm(self) -> None:
        """See `Hypervisor.pause_vm`."""
        await self._put("vm.pause")

    async def resume_vm(self) -> None:
        """See `Hypervisor.resume_vm`."""
        await self._put("vm.resume")

    async def save_vm(self, path: str) -> None:
        """See `Hypervisor.save_vm`."""
        if not self._able.snapshot:
            raise UnsupportedByHypervisor(self.name, "saving a VM that shares directories, or with landlock")
        running = (await self._info()).get("state") == "Running"
        if running:
            await self.pause_vm()
        try:
            await self._put("vm.snapshot", {"destination_url": f"file://{path}"}, timeout=_SAVE)
        finally:
            if running:
                await self.resume_vm()

    # --- sizing

    async def resize_vcpu(self, count: int) -> int:
        """See `Hypervisor.resize_vcpu`."""
        return await self._running(self._sizer).resize_vcpu(count)

    async def resize_memory(self, mib: int) -> int:
        """See `Hypervisor.resize_memory`."""
        return await self._running(self._sizer).resize_memory(mib)

    # --- devices

    async def add_device(self, device: DeviceConfig) -> str:
        """See `Hypervisor.add_device`: all of them are on the one bus."""
        parts, hot = self._parts, self._death is not None
        if not self._prepared:
            raise BugError("add_device needs prepare_vm before it")
        self._able.require(self.name, device.kind, Op.HOT if hot else Op.COLD)
        async with self._plugging:
            if device.id in parts.devices:
                raise BugError(f"there is a device {device.id} already")
            recipes.plug(device, self._section)  # refused before anything is started
            if isinstance(device, BlockConfig):
                device = replace(device, size=await look(disk_size, device.path))
            with parts.helpers.unsettled(device.id):
                try:
                    await self._serve(device)
                    path = await self._add_hot(device) if hot else self._place(device)
                except BaseException:
                    await self._unserve(device.id)
                    raise
            parts.devices[device.id] = device
            return path

    def _place(self, device: DeviceConfig) -> str:
        """A slot of its own, unless it is on no bus."""
        if isinstance(device, ConsoleConfig):
            return ""
        taken = set(self._parts.slots.values())
        free = next((slot for slot in range(1, _SLOTS) if slot not in taken), 0)
        if not free:
            raise HypervisorError(f"no slot for device {device.id}: the bus has {_SLOTS}", phase="devices")
        self._parts.slots[device.id] = free
        return f"{free:02x}"

    async def _add_hot(self, device: DeviceConfig) -> str:
        call, _, body = recipes.plug(device, self._section, self._parts.sockets.get(device.id, ""))
        plugging = asyncio.create_task(self._put(call, body, fds=_fds(device)))
        try:
            answer = await to_its_end(plugging)
        except asyncio.CancelledError:  # nobody wants it any more, and it may have come
            if not plugging.cancelled() and plugging.exception() is None:
                with contextlib.suppress(HypervisorError):
                    await self._take_out(device.id)
            raise
        bdf = answer.get("bdf") if isinstance(answer, dict) else None
        match = _BDF.fullmatch(bdf) if isinstance(bdf, str) else None
        if match is None:
            await self._take_out(device.id)
            raise HypervisorError(f"Cloud Hypervisor plugged {device.id} at no address: {answer!r:.100}")
        return match[1]

    async def _serve(self, device: DeviceConfig) -> None:
        """Start, or meet, who serves it from outside; the channel and the console are here for good."""
        parts, path = self._parts, f"{self._state_dir}/{device.id}.sock"
        match device:
            case ShareFsConfig():
                daemon = await Virtiofsd.start(
                    device, self._state_dir, self._undo, self._log("virtiofsd"), at_path=True
                )
                parts.helpers.add(device, daemon)
                parts.sockets[device.id] = daemon.path
            case VhostUserBlkConfig() | VhostUserNetConfig():
                from devices.vhost_relay import Relay  # few VMs have such a device

                parts.helpers.add(device, Relay.start(device.path, path))
                parts.sockets[device.id] = path
            case VsockConfig():
                path = parts.sockets[device.id] = f"{self._state_dir}/{_VSOCK}"
                parts.channel = HybridVsock(
                    path, home_call=device.home_call, tells_port=True, diagnostics=parts.diagnostics
                )
            case ConsoleConfig():
                parts.console = Console(self._log("console") if self._section.enable_debug else None)
            case _:
                pass

    async def _unserve(self, device_id: str) -> None:
        parts = self._parts
        parts.slots.pop(device_id, None)
        await parts.helpers.end(device_id)
        if path := parts.sockets.pop(device_id, ""):
            _unlink(path)

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
                    await self._take_out(device_id)
                del parts.devices[device_id]
                await self._unserve(device_id)

    async def _take_out(self, device_id: str) -> None:
        parts, events = self._parts, self._running(self._parts.events)
        gone = events.removal(device_id)
        if device_id not in parts.leaving:
            parts.leaving.add(device_id)
            try:
                await to_its_end(asyncio.create_task(self._put("vm.remove-device", {"id": device_id})))
            except HypervisorError as error:
                if error.code != "DEADLINE_EXCEEDED":  # else it may be told still
                    parts.leaving.discard(device_id)
                raise
        limit = self._section.hotplug_timeout
        assert self._death is not None
        ends: set[asyncio.Future[Any]] = {gone, self._death.ended}
        await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            self._process()  # or it is the VM that has gone
            raise HypervisorError(
                f"the guest did not let go of {device_id} within {limit:g} s",
                phase="devices",
                hint="raise hotplug_timeout, or see whether the guest uses it still",
                code="DEADLINE_EXCEEDED",
            )
        parts.leaving.discard(device_id)
        events.forget(device_id)

    async def update_device(self, device: DeviceConfig) -> None:
        """A plugged disk has another size."""
        old = self._parts.devices.get(device.id)
        if not isinstance(device, BlockConfig):
            raise UnsupportedByHypervisor(self.name, f"changing device {device.id}")
        if not isinstance(old, BlockConfig):
            raise CallerError(f"no disk {device.id} is plugged", code="NOT_FOUND")
        self._able.require(self.name, device.kind, Op.RESIZE)
        if device.options.limits != old.options.limits:
            raise UnsupportedByHypervisor(self.name, f"other limits of the plugged disk {device.id}")
        size = device.size or await look(disk_size, device.path)
        if size % 512 or size < old.size:
            why = f"disk {device.id} has {old.size} bytes and cannot have {size}"
            raise CallerError(why, phase="devices")
        await self._put("vm.resize-disk", {"id": device.id, "desired_size": size})
        self._parts.devices[device.id] = replace(device, size=size)

    # --- knowledge

    async def check(self) -> None:
        """See `Hypervisor.check`."""
        state = (await self._info()).get("state")
        if state not in ("Running", "Paused"):
            raise HypervisorError(f"the VM does not run: {state!r:.100}")

    def _sockets(self) -> dict[str, str]:
        return {"api": f"{self._state_dir}/{_API}", "vsock": f"{self._state_dir}/{_VSOCK}"}

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        if not self._prepared:
            raise BugError("capabilities needs prepare_vm before it")
        return self._able

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """See `Hypervisor.get_hypervisor_metrics`: Cloud Hypervisor's counters of disks and cards too."""
        found = self._parts.metrics()
        counters = await self._api().get("/api/v1/vm.counters", timeout=_CALL)
        for device_id, values in counters.items() if isinstance(counters, dict) else ():
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, int) and value != _UNSET:
                    found[f"{device_id}_{name}"] = float(value)
        return found

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`."""
        await self.stop_vm()
        parts = self._parts
        await parts.close()
        if parts.events is not None:
            parts.events.close()
        for path in [f"{self._state_dir}/{_API}", *parts.sockets.values()]:
            _unlink(path)

    # --- how it is done

    async def _launch(self, timeout: float) -> None:
        parts, section = self._parts, self._section
        assert self._death is not None
        path = f"{self._state_dir}/{_API}"
        with contextlib.ExitStack() as ours:
            listener = ours.enter_context(listen(path))
            parts.api = HttpApi(self.vmm, connect_now(path), path)  # in the backlog before there is a VMM
            reader, writer = os.pipe2(os.O_CLOEXEC)
            ours.callback(os.close, writer)
            parts.events = Events(reader, self._on_event)
            if self._death.stopping:
                raise HypervisorError("the VM was stopped before Cloud Hypervisor ran", code="ABORTED")
            parts.process = await Child.spawn(
                recipes.arguments(section, api=listener.fileno(), events=writer),
                name="cloud-hypervisor",
                undo=self._undo,
                confinement=confinement(section, self._netns),
                pass_fds=[listener.fileno(), writer],
                stdout=parts.console.guest_end if parts.console is not None else -1,
                on_output=self._log(self.name),
            )
        if parts.console is not None:
            parts.console.handed_over()
        self._death.begin(f"watch {self._sandbox_id}")
        await self._or_death(self._begin(timeout))

    async def _begin(self, timeout: float) -> None:
        """The VM, whole or not at all."""
        parts, section = self._parts, self._section
        await self._api().get("/api/v1/vmm.ping", timeout=timeout)
        parts.answers = True
        cards = [one for one in parts.devices.values() if isinstance(one, NetworkConfig)]
        if self._saved:
            sources = (self._saved, self._state_dir, parts.devices, parts.sockets)
            try:
                body, fds = await acquire(saved.restoring, *sources)
                if section.restore_on_demand:
                    body["memory_restore_mode"] = "OnDemand"
                await self._put("vm.restore", body, timeout=timeout, fds=fds)
            finally:
                await look(saved.forget, self._state_dir)
        else:
            await self._put("vm.create", self._configuration(), timeout=timeout)
            for card in cards:
                call, _, body = recipes.plug(card, section)
                slot = {"pci_device_id": parts.slots[card.id]}
                await self._put(call, body | slot, timeout=timeout, fds=card.tap_fds)
            await self._put("vm.boot", timeout=timeout)
        parts.helpers.handed_over()
        self._sizer = Sizer(section, self._put, self._info, self.get_thread_ids)

    def _configuration(self) -> dict[str, Any]:
        parts, section = self._parts, self._section
        console = parts.console is not None
        home_port = parts.channel.home_port if parts.channel is not None else 0
        words = recipes.command_line(section, console=console, home_port=home_port)
        made = recipes.machine(section, words, console=console, folder=self._state_dir)
        for device in parts.devices.values():
            _, key, body = recipes.plug(device, section, parts.sockets.get(device.id, ""))
            body |= {"pci_device_id": parts.slots.get(device.id, 0)}
            if key in ("vsock", "rng", "balloon"):
                made[key] = body
            elif key:
                made.setdefault(key, []).append(body)
        return made

    def _on_event(self, name: str, device_id: str) -> None:
        if self._events.take():
            _log.debug("event", event_name=name, device=device_id)
        death, process = self._death, self._parts.process
        if death is None or process is None or death.stopping:
            return
        if name == "vm/rebooting":
            death.guest_ends("reset")
            process.send_signal(signal.SIGKILL)
        elif name == "vmm/shutdown" and process.alive:
            asyncio.get_running_loop().call_soon(self._judge)  # when its words have been read too
        elif name == "vmm/shutdown":
            self._judge()

    def _judge(self) -> None:
        """It ends in good order, with code 0, even if a vCPU failed."""
        words = self._parts.process.stderr_tail() if self._parts.process is not None else ""
        if self._death is None or self._death.stopping:
            return
        if _FAILED in words:
            self._death.ends("Cloud Hypervisor could not run a vCPU any more (see its words)")
        else:
            self._death.guest_ends("power-off, or SIGTERM")

    def _log(self, name: str) -> Callable[[bytes], None]:
        return LineLog(name, lambda line: _log.debug("says", source=name, line=line)).write

    async def _say_quit(self, timeout: float) -> None:
        await self._put("vmm.shutdown", timeout=timeout)

    async def _info(self) -> dict[str, Any]:
        info = await self._api().get("/api/v1/vm.info", timeout=_CALL)
        if not isinstance(info, dict):
            raise HypervisorError(f"Cloud Hypervisor tells nothing of the VM: {info!r:.100}")
        return info

    async def _put(self, call: str, body: Any = None, *, timeout: float = 0.0, fds: Any = ()) -> Any:
        return await self._api().put(f"/api/v1/{call}", body, timeout=timeout or _CALL, fds=fds)


def _fds(device: DeviceConfig) -> tuple[int, ...]:
    return device.tap_fds if isinstance(device, NetworkConfig) else ()


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
