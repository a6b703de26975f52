"""One VM under QEMU: `Qemu` implements `hypervisors.base.Hypervisor`.

What: its start, its daemons (vsock, virtiofsd), its control connection; its death is `death`'s matter.
What it does as every other driver is `hypervisors.process_vm`'s.
Invariants:
- Daemons are started by `add_device`, so they get ready while the rest is prepared; their sockets are
  connected before QEMU starts and are inherited by it: QEMU finds nothing to wait for.
- What a method acquired is released by `cleanup`, whatever failed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Mapping

import structlog

from devices.child import thread_ids
from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    ProtectionConfig,
    VfioConfig,
)
from devices.errors import (
    BugError,
    CallerError,
    HostError,
    HypervisorError,
    UnsupportedByHypervisor,
)
from devices.kinds import Op
from devices.lines import Budget
from devices.port import PortChannel
from devices.threads import acquire, look
from devices.undo import Entry, UndoLog
from devices.users import User, parse_range, take
from devices.versions import Version, version_of
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds
from hypervisors.config import HypervisorConfig
from hypervisors.process_vm import ProcessVm
from hypervisors.qemu.abilities import abilities, why_not_restored
from hypervisors.qemu.adopt import saved, take_over
from hypervisors.qemu.cmdline import Plan
from hypervisors.qemu.confinement import check_readable, meeting_place, take_back_nodes
from hypervisors.qemu.disks import update_disk
from hypervisors.qemu.events import port_opened
from hypervisors.qemu.hotplug import Plugger
from hypervisors.qemu.kvm import Accelerator, choose_accelerator
from hypervisors.qemu.launch import launch
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.places import Places
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.prepare import CONSOLE, VHOST_VSOCK, close_memory, log_output, open_memory, prepare
from hypervisors.qemu.qmp import QmpClient, QmpEvent, sensible
from hypervisors.qemu.recipes import Placed
from hypervisors.qemu.sizing import Sizer

__all__ = ["VHOST_VSOCK", "Qemu"]

_NAME = "qemu"
_MEMORY, _STATE = "memory", "device_state"  # of a VM that was saved
_SAVE = 30.0  # seconds; it takes about 20 ms
_log = structlog.get_logger("qemu")


class Qemu(ProcessVm[HypervisorConfig, Parts]):
    """See the module's docstring and `hypervisors.base.Hypervisor`."""

    name = _NAME
    vmm = "QEMU"
    adopts = True

    def __init__(self, section: HypervisorConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        super().__init__(section, Parts(), sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)
        self._user: User | None = None  # from `prepare_vm` on, unless QEMU runs as root
        self._plan: Plan | None = None  # from `prepare_vm` on
        self._events = Budget(_NAME, "QMP events")
        self._places = Places(section)
        self._passed: set[str] = set()  # ids of the devices of VFIO, once they were here
        self._sizer: Sizer | None = None  # from `start_vm` on
        self._plugger: Plugger | None = None  # likewise

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`. Chooses accelerator and user, and knows QEMU's version then."""
        self._prepare(id, netns)
        section = self._section
        choice = choose_accelerator(section.accelerator)
        version = Version()
        with contextlib.suppress(HostError):  # one that cannot be run is told by the start
            version = await version_of(section.path, self._undo)
        plan = first_plan(section, choice.accelerator, self._sandbox_id, version.numbers)
        if section.rootless:
            check_readable(plan)
            users = parse_range(section.rootless_users)
            self._user = await acquire(take, self._undo, users, lost=self._have_user)
        os.makedirs(meeting_place(self._state_dir), exist_ok=True)
        os.chmod(meeting_place(self._state_dir), 0o711)  # noqa: S103  (QEMU's user passes through)
        self._plan = plan
        self._prepared = True
        _log.info("accelerator", name=choice.accelerator.value, reason=choice.reason, qemu=str(version))

    async def pause_vm(self) -> None:
        """See `Hypervisor.pause_vm`."""
        await self._qmp().execute("stop")

    async def resume_vm(self) -> None:
        """See `Hypervisor.resume_vm`."""
        await self._qmp().execute("cont")

    async def save_vm(self, path: str) -> None:
        """See `Hypervisor.save_vm`: ends the agent's connection, and writes `path`/device_state. The memory
        is in the section's memory_path, which is `path`/memory if `restore_vm` is to find it. Afterwards the
        VM stands still: what it would write would be written to what was saved."""
        if not self._section.boot_to_be_template:
            raise UnsupportedByHypervisor(
                _NAME, f"saving a VM (to {path}) whose memory is no file: boot_to_be_template is false"
            )
        from hypervisors.qemu.saving import save  # hardly any VM is saved

        qmp, channel = self._qmp(), self._parts.channel
        if isinstance(channel, PortChannel):
            # The guest opens its port anew once it has seen the end of the last connection, and QEMU tells.
            with qmp.expect(port_opened) as opened:
                channel.hang_up()
                try:
                    async with asyncio.timeout(_SAVE):
                        await opened
                except TimeoutError:
                    raise HypervisorError(
                        f"the guest did not let go of its port within {_SAVE:g} s",
                        phase="save",
                        code="DEADLINE_EXCEEDED",
                    ) from None
        await save(qmp, f"{path}/{_STATE}", _SAVE)

    async def restore_vm(self, path: str, timeout: float) -> None:
        """See `Restoring.restore_vm`. The memory is mapped privately: any number of VMs can begin so."""
        if self._plan is None:
            raise BugError("restore_vm needs prepare_vm before it")
        if reason := why_not_restored(self._section):
            raise UnsupportedByHypervisor(_NAME, f"beginning with a VM that was saved: {reason}")
        self._section = dataclasses.replace(
            self._section,
            boot_from_template=True,
            memory_path=f"{path}/{_MEMORY}",
            device_state_path=f"{path}/{_STATE}",
        )
        self._plan = dataclasses.replace(self._plan, section=self._section)
        await self.start_vm(timeout)

    # --- sizing

    async def resize_vcpu(self, count: int) -> int:
        """See `Hypervisor.resize_vcpu` and `hypervisors.qemu.sizing`."""
        return await self._running(self._sizer).resize_vcpu(count)

    async def resize_memory(self, mib: int) -> int:
        """See `Hypervisor.resize_memory` and `hypervisors.qemu.sizing`."""
        return await self._running(self._sizer).resize_memory(mib)

    # --- devices

    async def add_device(self, device: DeviceConfig) -> str:
        """See `Hypervisor.add_device`. Starts the device's daemon; once the VM runs see `hotplug`."""
        if any(placed.device.id == device.id for placed in self._parts.placed):
            raise BugError(f"there is a device {device.id} already")
        hot = self._death is not None
        (await self.capabilities()).require(_NAME, device.kind, Op.HOT if hot else Op.COLD)
        if hot:
            return await self._add_hot(device)
        if isinstance(device, ConsoleConfig | ProtectionConfig):  # on no bus
            self._parts.placed.append(await self._ready(device))
            return ""
        at, guest_path = self._places.allocate(device, self._parts.placed)
        try:
            self._parts.placed.append(dataclasses.replace(await self._ready(device), at=at))
        except BaseException:
            self._places.release(device.id)
            raise
        return guest_path

    async def _add_hot(self, device: DeviceConfig) -> str:
        plugger, helpers = self._running(self._plugger), self._parts.helpers
        if plugger.has(device.id):
            raise BugError(f"there is a device {device.id} already")
        with helpers.unsettled(device.id):
            placed = await self._ready(device)
            helper = helpers.of(device.id)
            try:
                path = await plugger.add(placed)
            except BaseException:
                await helpers.end(device.id)
                raise
            finally:
                self._parts.let_go(device.id)
        if helper is not None:
            helper.handed_over()
        return path

    async def _ready(self, device: DeviceConfig) -> Placed:
        assert self._plan is not None
        if isinstance(device, VfioConfig):
            from hypervisors.qemu.vfio import let_in  # few VMs have such a device

            self._passed.add(device.id)
            await let_in(device, self._parts, self._plan, len(self._passed), undo=self._undo, user=self._uid)
        return await prepare(
            self._parts,
            device,
            state_dir=self._state_dir,
            undo=self._undo,
            user=self._uid,
            debug=self._section.enable_debug,
            tcg=self._plan.accelerator is Accelerator.TCG,
        )

    async def remove_device(self, device_id: str) -> None:
        """What was hot-plugged; before `start_vm` whatever is no part of the VM itself."""
        helpers = self._parts.helpers
        if self._plugger is not None and device_id in self._plugger:
            if (placed := self._plugger.placed(device_id)) is not None:
                (await self.capabilities()).require(_NAME, placed.device.kind, Op.UNPLUG)
            with helpers.unsettled(device_id):
                try:
                    await self._plugger.remove(device_id)
                finally:
                    if not self._plugger.present(device_id):
                        await helpers.end(device_id)
            if (
                placed is not None
                and isinstance(placed.device, VfioConfig)
                and self._parts.process is not None
            ):
                await acquire(take_back_nodes, self._parts.process.pid, placed.device)
            return
        placed = next((one for one in self._parts.placed if one.device.id == device_id), None)
        served = helpers.of(device_id) is not None
        if self._death is not None or placed is None or (placed.fd >= 0 and not served):
            raise UnsupportedByHypervisor(_NAME, f"removing device {device_id}")
        self._parts.placed.remove(placed)
        self._parts.let_go(device_id)
        self._places.release(device_id)
        await helpers.end(device_id)

    async def update_device(self, device: DeviceConfig) -> None:
        """A plugged disk has another size, or other limits."""
        hot = self._plugger.placed(device.id) if self._plugger is not None else None
        cold = next((one for one in self._parts.placed if one.device.id == device.id), None)
        placed = hot or cold
        if not isinstance(device, BlockConfig):
            raise UnsupportedByHypervisor(_NAME, f"changing device {device.id}")
        if placed is None or not isinstance(placed.device, BlockConfig):
            raise CallerError(f"no disk {device.id} is plugged", code="NOT_FOUND")
        (await self.capabilities()).require(_NAME, placed.device.kind, Op.RESIZE)
        await update_disk(self._qmp(), placed.device, device)
        changed = dataclasses.replace(placed, device=device)
        if hot is not None and self._plugger is not None:
            self._plugger.changed(changed)
        elif cold is not None:
            self._parts.placed[self._parts.placed.index(cold)] = changed

    # --- knowledge

    async def disconnect(self) -> None:
        """See `Hypervisor.disconnect`."""
        if self._parts.qmp is not None:
            await self._parts.qmp.close()
            self._parts.qmp = None

    async def get_thread_ids(self) -> VcpuThreadIds:
        """See `Hypervisor.get_thread_ids`. QEMU tells the numbers that they have in its pid namespace,
        also of those that the guest keeps offline, which are none yet."""
        sizer = self._running(self._sizer)
        cpus = await self._qmp().execute("query-cpus-fast")
        try:
            known = await look(thread_ids, self._process().pid)
        except ProcessLookupError:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION") from None
        with sensible("query-cpus-fast"):
            numbers = {int(cpu["cpu-index"]): int(cpu["thread-id"]) for cpu in cpus}
            return VcpuThreadIds(
                {index: known[thread] for index, thread in numbers.items() if sizer.is_granted(index)}
            )

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`."""
        await self.stop_vm()
        await self._parts.close()
        for name in ("qmp.sock", CONSOLE):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._state_dir}/{name}")
        with contextlib.suppress(OSError):
            os.rmdir(meeting_place(self._state_dir))
        if self._user is not None:
            user, self._user = self._user, None
            await self._undo.release(user.entry)

    async def check(self) -> None:
        """See `Hypervisor.check`."""
        status = await self._qmp().execute("query-status")
        if not isinstance(status, dict) or status.get("status") not in ("running", "paused"):
            raise HypervisorError(f"the VM does not run: {status!r:.100}")

    async def save_state(self) -> HypervisorState:
        """See `Hypervisor.save_state`."""
        return saved(await super().save_state(), self._parts, self._state_dir)

    def _accelerator(self) -> str:
        return self._plan.accelerator.value if self._plan else ""

    async def adopt(self, state: HypervisorState, processes: Mapping[int, Entry]) -> None:
        """See `Adopting.adopt` and `hypervisors.qemu.adopt`."""
        if self._plan is not None:
            raise BugError("adopt comes instead of prepare_vm")
        self._netns = state.netns or None
        self._plan = first_plan(self._section, Accelerator(state.accelerator), self._sandbox_id)
        parts = self._parts
        await take_over(
            state,
            parts,
            processes,
            undo=self._undo,
            debug=self._section.enable_debug,
            on_event=self._on_event,
        )
        self._begin_death().begin(f"watch {self._sandbox_id}")
        _log.info("QEMU is taken over", pid=state.pid, daemons=dict(state.processes))

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        if self._plan is None:
            raise BugError("capabilities needs prepare_vm before it")
        return Capabilities(
            devices=abilities(self._section, self._plan),
            hybrid_vsock=not os.path.exists(VHOST_VSOCK),
            pause=True,
            snapshot=self._section.boot_to_be_template,
            restore=not why_not_restored(self._section),
            adopt=True,
        )

    # --- how it is done

    async def _say_quit(self, timeout: float) -> None:
        await self._qmp().execute("quit", timeout=timeout)

    async def _launch(self, timeout: float) -> None:
        assert self._plan is not None
        assert self._death is not None
        places = self._places
        plan = dataclasses.replace(self._plan, scsi=places.controller)
        plan = self._plan = with_ports(plan, places.topology)
        section = self._section
        memory = await acquire(open_memory, section, lost=close_memory)
        try:
            await launch(
                dataclasses.replace(plan, memory=memory),
                self._parts,
                self._death,
                undo=self._undo,
                netns=self._netns,
                user=self._uid,
                state_dir=self._state_dir,
                qmp_path=f"{self._state_dir}/qmp.sock",
                timeout=timeout,
                on_event=self._on_event,
                on_output=log_output(_NAME),
            )
        finally:
            close_memory(memory)
        assert self._parts.qmp is not None
        if section.boot_from_template:
            from hypervisors.qemu.saving import load

            await load(self._parts.qmp, section.device_state_path, timeout)
        self._sizer = Sizer(plan, self._parts.qmp)
        self._plugger = Plugger(
            self._parts.qmp,
            places.topology,
            self._section.hotplug_timeout,
            luns=places.luns,
            scsi=plan.scsi is not None,
        )

    def _on_event(self, event: QmpEvent) -> None:
        if self._events.take():
            _log.debug("QMP event", event_name=str(event["event"])[:50], data=repr(event.get("data"))[:200])
        data = event.get("data")
        if (
            self._death is not None
            and event["event"] == "SHUTDOWN"
            and isinstance(data, dict)
            and data.get("guest")
        ):
            self._death.guest_ends(str(data.get("reason")))

    @property
    def _uid(self) -> int:
        return self._user.id if self._user is not None else 0

    def _have_user(self, user: User) -> None:
        """Nobody waits for it any more; `cleanup` gives it back."""
        self._user = user

    def _qmp(self) -> QmpClient:
        return self._running(self._parts.qmp)
