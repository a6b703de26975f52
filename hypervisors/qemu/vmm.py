"""One VM under QEMU: `Qemu` implements `hypervisors.base.Hypervisor`.

What: its start, its daemons (vsock, virtiofsd), its control connection; its death is `death`'s matter.
Why one class: the mission's trait is one, and the parts are started and released in one order.
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
import re
import signal
from collections.abc import Mapping
from typing import TypeVar

import structlog

from devices.child import Child, process_start_time, thread_ids
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
    KataError,
    UnsupportedByHypervisor,
)
from devices.kinds import Op
from devices.lines import Budget
from devices.threads import acquire, look
from devices.undo import Entry, UndoLog
from devices.users import User, parse_range, take
from devices.versions import Version, version_of
from devices.vsock import AgentChannel
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.abilities import abilities
from hypervisors.qemu.adopt import saved, take_over
from hypervisors.qemu.cmdline import Plan
from hypervisors.qemu.confinement import check_readable, meeting_place, take_back_nodes
from hypervisors.qemu.death import Death
from hypervisors.qemu.disks import update_disk
from hypervisors.qemu.hotplug import Plugger
from hypervisors.qemu.kvm import Accelerator, choose_accelerator
from hypervisors.qemu.launch import launch
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.places import Places
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.prepare import CONSOLE, VHOST_VSOCK, log_output, prepare
from hypervisors.qemu.qmp import QmpClient, QmpEvent, sensible
from hypervisors.qemu.recipes import Placed
from hypervisors.qemu.sizing import Sizer

__all__ = ["VHOST_VSOCK", "Qemu"]

_NAME = "qemu"
# Seconds that a running QEMU gets to flush its images: to take `quit`, to end by it, and to end by SIGTERM.
_QUIT_TIMEOUT, _TERM_TIMEOUT = 0.3, 0.3
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

_Part = TypeVar("_Part")

_log = structlog.get_logger("qemu")


class Qemu:
    """See the module's docstring and `hypervisors.base.Hypervisor`."""

    def __init__(self, section: HypervisorConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        if not _ID.fullmatch(sandbox_id):
            raise BugError(f"{sandbox_id!r} is no sandbox id")
        self._section = section
        self._sandbox_id = sandbox_id
        self._state_dir = state_dir
        self._undo = undo
        self._netns: str | None = None
        self._user: User | None = None  # from `prepare_vm` on, unless QEMU runs as root
        self._plan: Plan | None = None  # from `prepare_vm` on
        self._parts = Parts()
        self._events = Budget(_NAME, "QMP events")
        self._places = Places(section)
        self._passed: set[str] = set()  # ids of the devices of VFIO, once they were here
        self._sizer: Sizer | None = None  # from `start_vm` on
        self._plugger: Plugger | None = None  # likewise
        self._death: Death | None = None  # from `start_vm` on
        self._starting: asyncio.Future[None] | None = None  # likewise; done when `start_vm` is

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`. Chooses accelerator and user, and knows QEMU's version then."""
        if id != self._sandbox_id:
            raise BugError(f"this VM was created for {self._sandbox_id}, not for {id}")
        self._netns = netns
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
        _log.info("accelerator", name=choice.accelerator.value, reason=choice.reason, qemu=str(version))

    async def start_vm(self, timeout: float) -> None:
        """See `Hypervisor.start_vm`."""
        if self._plan is None or self._death is not None:
            raise BugError("start_vm needs prepare_vm before it, and once")
        parts = self._parts
        self._death = Death(self._section, parts)
        parts.helpers.on_loss = self._death.lose
        self._starting = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._launch(timeout)
        except TimeoutError:
            await self._end()
            raise self._with_evidence(
                HypervisorError(f"QEMU did not start within {timeout:g} s", code="DEADLINE_EXCEEDED")
            ) from None
        except KataError as error:
            stopped = self._death.stopping
            await self._end()
            if stopped:  # what it met is only how the stop looked from here
                raise HypervisorError("the VM was stopped while it started", code="ABORTED") from error
            raise self._with_evidence(error) from None
        except BaseException:
            await self._end()
            raise
        finally:
            self._starting.set_result(None)
        assert parts.process is not None
        _log.info("QEMU runs", pid=parts.process.pid, daemons=[child.pid for child in parts.daemons])

    async def wait_vm(self) -> VmExit:
        """See `Hypervisor.wait_vm`."""
        if self._death is None:
            raise BugError("wait_vm needs start_vm before it")
        return await asyncio.shield(self._death.ended)

    async def stop_vm(self) -> None:
        """See `Hypervisor.stop_vm`: `quit`, SIGTERM, SIGKILL, each with a deadline: a QEMU that waits for a
        daemon which stands still takes no more than the last. A start under way fails first."""
        process = self._parts.process
        if self._death is not None:
            self._death.stopping = True
        if self._parts.qmp is not None and process is not None and process.alive:
            with contextlib.suppress(KataError):
                await self._parts.qmp.execute("quit", timeout=_QUIT_TIMEOUT)
            with contextlib.suppress(TimeoutError):
                await process.wait(_QUIT_TIMEOUT)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await process.wait(_TERM_TIMEOUT)
        await self._end()
        if self._starting is not None:
            await asyncio.wait({self._starting})

    async def _end(self) -> None:
        """Without a word: SIGKILL."""
        if self._death is not None:
            self._death.stopping = True
        try:
            if self._parts.process is not None:
                await self._parts.process.kill()
        except KataError as error:  # the kernel holds it: its end will not be seen, and is told all the same
            if self._death is not None:
                self._death.lose(error.cause)
            raise
        finally:
            if self._death is not None:
                await self._death.told()

    async def pause_vm(self) -> None:
        """See `Hypervisor.pause_vm`."""
        await self._qmp().execute("stop")

    async def resume_vm(self) -> None:
        """See `Hypervisor.resume_vm`."""
        await self._qmp().execute("cont")

    async def save_vm(self, path: str) -> None:
        """Not yet: templates need a VM without vhost-user devices."""
        raise UnsupportedByHypervisor(_NAME, f"saving a VM (to {path})")

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
            self._parts.placed.append(await self._prepare(device))
            return ""
        at, guest_path = self._places.allocate(device, self._parts.placed)
        try:
            self._parts.placed.append(dataclasses.replace(await self._prepare(device), at=at))
        except BaseException:
            self._places.release(device.id)
            raise
        return guest_path

    async def _add_hot(self, device: DeviceConfig) -> str:
        plugger, helpers = self._running(self._plugger), self._parts.helpers
        if plugger.has(device.id):
            raise BugError(f"there is a device {device.id} already")
        with helpers.unsettled(device.id):
            placed = await self._prepare(device)
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

    async def _prepare(self, device: DeviceConfig) -> Placed:
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

    async def get_agent_socket(self) -> AgentChannel:
        """See `Hypervisor.get_agent_socket`."""
        if self._parts.channel is None:
            raise BugError("this VM has no vsock device")
        return self._parts.channel

    async def disconnect(self) -> None:
        """See `Hypervisor.disconnect`."""
        if self._parts.qmp is not None:
            await self._parts.qmp.close()
            self._parts.qmp = None

    async def hypervisor_config(self) -> HypervisorConfig:
        """See `Hypervisor.hypervisor_config`."""
        return self._section

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

    async def get_pids(self) -> list[int]:
        """See `Hypervisor.get_pids`."""
        return self._parts.pids()

    async def get_vmm_master_tid(self) -> int:
        """See `Hypervisor.get_vmm_master_tid`."""
        return self._process().pid

    async def get_ns_path(self) -> str:
        """See `Hypervisor.get_ns_path`."""
        return f"/proc/{self._process().pid}/ns/net"

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

    async def get_jailer_root(self) -> str:
        """QEMU sees the host's root."""
        return ""

    async def save_state(self) -> HypervisorState:
        """See `Hypervisor.save_state`."""
        process = self._process()
        with contextlib.suppress(ProcessLookupError):
            state = HypervisorState(
                hypervisor=_NAME,
                sandbox_id=self._sandbox_id,
                pid=process.pid,
                start=process_start_time(process.pid),
                accelerator=self._plan.accelerator.value if self._plan else "",
                netns=self._netns or "",
            )
            return saved(state, self._parts, self._state_dir)
        raise HypervisorError("the VM does not run")

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
        self._death = Death(self._section, parts)
        parts.helpers.on_loss = self._death.lose
        self._death.begin(f"watch {self._sandbox_id}")
        _log.info("QEMU is taken over", pid=state.pid, daemons=dict(state.processes))

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        if self._plan is None:
            raise BugError("capabilities needs prepare_vm before it")
        return Capabilities(
            devices=abilities(self._section, self._plan),
            hybrid_vsock=not os.path.exists(VHOST_VSOCK),
            pause=True,
            adopt=True,
        )

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """CPU seconds and resident bytes of QEMU and its daemons, from /proc.

        The guest's memory, which the daemons map too, counts once, with QEMU.
        """
        return self._parts.metrics()

    def diagnostics(self) -> dict[str, str]:
        """See `Hypervisor.diagnostics`."""
        return self._parts.diagnostics()

    # --- how it is done

    async def _launch(self, timeout: float) -> None:
        assert self._plan is not None
        assert self._death is not None
        places = self._places
        plan = dataclasses.replace(self._plan, scsi=places.controller)
        plan = self._plan = with_ports(plan, places.topology)
        await launch(
            plan,
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
        assert self._parts.qmp is not None
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
        if self._death is not None:
            self._death.see(event)

    def _with_evidence(self, error: KataError) -> KataError:
        return error.with_context(phase="boot", details=self.diagnostics())

    @property
    def _uid(self) -> int:
        return self._user.id if self._user is not None else 0

    def _have_user(self, user: User) -> None:
        """Nobody waits for it any more; `cleanup` gives it back."""
        self._user = user

    def _process(self) -> Child:
        process = self._parts.process
        if process is None or not process.alive:  # its pid may be somebody else's by now
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return process

    def _running(self, part: _Part | None) -> _Part:
        if part is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return part

    def _qmp(self) -> QmpClient:
        return self._running(self._parts.qmp)
