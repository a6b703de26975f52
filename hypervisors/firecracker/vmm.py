"""One VM under Firecracker: `Firecracker` implements `hypervisors.base.Hypervisor`.

What: its process (jailed or not), its API; `drives` has its disks, `hypervisors.process_vm` what is alike.
Invariants:
- Order: process, logger and metrics, machine, devices, InstanceStart; from a snapshot: process, logger and
  metrics, load.
- It is stopped by SIGKILL: it knows no quit, keeps nothing that would want flushing, and has no handler for
  SIGTERM, which the first process of a pid namespace never gets then.
- What a method acquired is released by `cleanup`, whatever failed in between; what is lent into the jail is
  taken back by `remove_device` too.
Source: Firecracker's API, v1.12.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat

from devices.child import Child
from devices.config import (
    BlockConfig,
    BlockOptions,
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    VsockConfig,
)
from devices.console import Console
from devices.errors import BugError, HostError, HypervisorError, UnsupportedByHypervisor
from devices.kinds import Op
from devices.rendezvous import connect_when_listening
from devices.threads import acquire
from devices.undo import UndoLog
from devices.users import User, parse_range, take
from devices.vsock import HybridVsock
from hypervisors.base import Capabilities
from hypervisors.firecracker import boot
from hypervisors.firecracker.abilities import abilities
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.confinement import jailer_confinement, plain_confinement
from hypervisors.firecracker.drives import EMPTY, Drives, disk_path
from hypervisors.firecracker.host import cgroup_paths, remove_cgroup
from hypervisors.firecracker.jail import JAIL_BASE, Den, jail_id
from hypervisors.firecracker.parts import CALL, SNAPSHOT, Parts, configure, load
from hypervisors.firecracker.report import LOG, METRICS
from hypervisors.http_api import HttpApi
from hypervisors.process_vm import ProcessVm, need_kvm

__all__ = ["Firecracker"]

_NAME = "firecracker"
_STATE, _MEMORY = "device_state", "memory"  # files of a saved VM
_EMPTY_SIZE = 4096  # bytes: the least that a page-sized read finds


class Firecracker(ProcessVm[FirecrackerConfig, Parts]):
    """See the module's docstring and `hypervisors.base.Restoring`."""

    name = _NAME
    vmm = "Firecracker"
    vcpu = re.compile(r"fc_vcpu (\d+)")

    def __init__(self, section: FirecrackerConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        super().__init__(section, Parts(), sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)
        self._user: User | None = None  # from `prepare_vm` on, if it has one of its own
        self._saved: tuple[str, str] | None = None  # the files of a snapshot that it begins with
        self._releasing = asyncio.Lock()

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`. Makes the jail."""
        self._prepare(id, netns)
        if self._parts.den is not None:
            raise BugError("prepare_vm was called twice")
        need_kvm(self.vmm)
        section = self._section
        if section.jailer_path and section.rootless and not section.jailer_uid:
            users = parse_range(section.rootless_users)
            self._user = await acquire(take, self._undo, users, lost=self._have_user)
        self._parts.den = await acquire(self._open_den)
        self._prepared = True

    async def start_vm(self, timeout: float) -> None:
        """See `Hypervisor.start_vm`."""
        section = self._section
        if section.boot_from_template:
            self._saved = (section.device_state_path, section.memory_path)
        await super().start_vm(timeout)

    async def restore_vm(self, path: str, timeout: float) -> None:
        """See `Restoring.restore_vm`."""
        self._saved = (f"{path}/{_STATE}", f"{path}/{_MEMORY}")
        await super().start_vm(timeout)

    async def pause_vm(self) -> None:
        """See `Hypervisor.pause_vm`."""
        await self._api().patch("/vm", {"state": "Paused"}, timeout=CALL)

    async def resume_vm(self) -> None:
        """See `Hypervisor.resume_vm`."""
        await self._api().patch("/vm", {"state": "Resumed"}, timeout=CALL)

    async def save_vm(self, path: str) -> None:
        """See `Hypervisor.save_vm`: writes `path`/device_state and `path`/memory; a running VM is paused
        meanwhile. `boot_from_template` with both loads it."""
        den, api = self._den(), self._api()
        info = await api.get("/", timeout=CALL)
        running = isinstance(info, dict) and info.get("state") == "Running"
        if running:
            await self.pause_vm()
        try:
            if den.jailed:
                await acquire(os.chown, path, den.uid, den.gid)
            inside = await acquire(den.lend, path, "snapshot", read_only=False)
            body = {
                "snapshot_type": "Full",
                "snapshot_path": f"{inside}/{_STATE}",
                "mem_file_path": f"{inside}/{_MEMORY}",
            }
            await api.put("/snapshot/create", body, timeout=SNAPSHOT)
        except OSError as error:
            raise HostError(
                f"cannot save the VM to {path}: {error.strerror or error}", phase="save"
            ) from error
        finally:
            await acquire(den.take_back, "snapshot")
            if running:
                await self.resume_vm()

    # --- sizing

    async def resize_vcpu(self, count: int) -> int:
        """Firecracker cannot."""
        raise UnsupportedByHypervisor(_NAME, f"changing the number of vCPUs of a running VM (to {count})")

    async def resize_memory(self, mib: int) -> int:
        """Firecracker cannot."""
        raise UnsupportedByHypervisor(_NAME, f"changing the memory of a running VM (to {mib} MiB)")

    # --- devices

    async def add_device(self, device: DeviceConfig) -> str:
        """See `Hypervisor.add_device`. A disk's address is its name in the guest, "/dev/vdb". Before
        `start_vm` every kind that Firecracker has, later disks only."""
        hot = self._death is not None
        (await self.capabilities()).require(_NAME, device.kind, Op.HOT if hot else Op.COLD)
        if any(one.id == device.id for one in self._parts.cold) or self._has(device.id):
            raise BugError(f"there is a device {device.id} already")
        if isinstance(device, BlockConfig) and device.options != BlockOptions():
            raise UnsupportedByHypervisor(_NAME, "options of a single disk, such as limits")
        if hot:
            assert isinstance(device, BlockConfig)  # by its capabilities
            return await self._drives().fill(device, self._api())
        if isinstance(device, NetworkConfig) and not device.tap:
            raise UnsupportedByHypervisor(_NAME, "a network card without the name of its tap device")
        if isinstance(device, VsockConfig):
            self._parts.channel = HybridVsock(
                self._den().path(boot.VSOCK),
                # A loaded VM called home long ago.
                home_call=device.home_call and not self._section.boot_from_template,
                tells_port=True,
                diagnostics=self.diagnostics,
            )
            if self._parts.channel.home_port and self._den().jailed:
                home = self._den().path(f"{boot.VSOCK}_{self._parts.channel.home_port}")
                os.chown(
                    home, self._den().uid, self._den().gid, follow_symlinks=False
                )  # to connect is to write
        if isinstance(device, ConsoleConfig):
            say = self._parts.report.on_console if self._section.enable_debug else None
            self._parts.console = Console(say)
        self._parts.cold.append(device)
        disks = sum(isinstance(one, BlockConfig) for one in self._parts.cold)
        return disk_path(disks - 1) if isinstance(device, BlockConfig) else ""

    async def remove_device(self, device_id: str) -> None:
        """Before `start_vm` whatever was added, later disks that were plugged since."""
        if self._death is None:
            known = next((one for one in self._parts.cold if one.id == device_id), None)
            if known is None or isinstance(known, VsockConfig):
                raise UnsupportedByHypervisor(_NAME, f"removing device {device_id}")
            self._parts.cold.remove(known)
            return
        if not await self._drives().empty(device_id, self._api()):
            raise UnsupportedByHypervisor(_NAME, f"removing device {device_id}")

    async def update_device(self, device: DeviceConfig) -> None:
        """A plugged disk whose file has another size now: the guest is told."""
        if not isinstance(device, BlockConfig) or not await self._drives().announce(device, self._api()):
            raise UnsupportedByHypervisor(_NAME, f"changing device {device.id}")

    # --- knowledge

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`."""
        async with self._releasing:
            await self._release()

    async def _release(self) -> None:
        await self.stop_vm()
        parts = self._parts
        await parts.close()
        parts.report.close()
        while parts.cgroups:
            entry = parts.cgroups.pop()
            await acquire(remove_cgroup, str(entry.facts["path"]))
            self._undo.forget(entry)
        if parts.den is not None:
            await acquire(_remove_files, parts.den)
        if self._user is not None:
            user, self._user = self._user, None
            await self._undo.release(user.entry)

    async def check(self) -> None:
        """See `Hypervisor.check`."""
        info = await self._api().get("/", timeout=CALL)
        if not isinstance(info, dict) or info.get("state") not in ("Running", "Paused"):
            raise HypervisorError(f"the VM does not run: {info!r:.100}")

    async def get_jailer_root(self) -> str:
        """See `Hypervisor.get_jailer_root`."""
        den = self._parts.den
        return den.root if den is not None and den.jailed else ""

    def _sockets(self) -> dict[str, str]:
        return {"api": self._den().path(boot.API_SOCKET), "vsock": self._den().path(boot.VSOCK)}

    async def capabilities(self) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        return Capabilities(
            devices=abilities(self._section.block_device_slots),
            tap_by_name=True,
            tap_owner=self._owner,
            hybrid_vsock=True,
            own_vsock=True,
            pause=True,
            snapshot=True,
            restore=True,
        )

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """See `Hypervisor.get_hypervisor_metrics`: Firecracker's own counters too."""
        return await self._parts.report.metrics(self._api(), self._process().pid)

    # --- how it is done

    def _open_den(self) -> Den:
        if not self._section.jailer_path:
            return Den.plain(self._state_dir, self._undo)
        uid, gid = self._owner
        return Den.jail(jail_id(self._state_dir), self._section.path, self._undo, uid=uid, gid=gid)

    @property
    def _owner(self) -> tuple[int, int]:
        """The user and group of the jailed Firecracker."""
        if self._user is not None:
            return self._user.id, self._user.id
        return self._section.jailer_uid, self._section.jailer_gid

    def _have_user(self, user: User) -> None:
        """Nobody waits for it any more; `cleanup` gives it back."""
        self._user = user

    async def _launch(self, timeout: float) -> None:
        try:
            await self._spawn(timeout)
            talk = load(self._parts, self._section, *self._saved) if self._saved else None
            await self._or_death(talk or configure(self._parts, self._section))
        except OSError as error:
            raise HostError(f"cannot prepare Firecracker's files: {error}", phase="vmm") from error

    async def _spawn(self, timeout: float) -> None:
        """Firecracker up to an answering API, log and metrics flowing. Raises KataError, OSError."""
        den, parts, section = self._den(), self._parts, self._section
        await acquire(self._make_files, den)
        parts.report.open(den)
        jail = jail_id(self._state_dir) if den.jailed else ""
        confinement = (jailer_confinement if jail else plain_confinement)(self._netns)
        version = 2 if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else 1
        if jail and section.jailer_cgroups:
            for path in cgroup_paths(section, jail, version):
                parts.cgroups.append(self._undo.record("cgroup", path=path))
        self._check_stopping()
        parts.process = await Child.spawn(
            boot.arguments(
                section,
                jail=jail,
                base=JAIL_BASE,
                owner=self._owner,
                cgroups=version,
            ),
            name=_NAME,
            undo=self._undo,
            confinement=confinement,
            cwd=None if jail else den.root,
            stdout=parts.console.guest_end if parts.console is not None else -1,
        )
        if parts.console is not None:
            parts.console.handed_over()
        assert self._death is not None
        self._death.begin(f"watch {self._sandbox_id}")
        self._check_stopping()  # who stopped us saw no process
        sock = await connect_when_listening(den.path(boot.API_SOCKET), parts.process, timeout)
        parts.api = HttpApi("Firecracker", sock)
        level = "Debug" if section.enable_debug else "Warn"
        logger = {"log_path": LOG, "level": level, "show_level": True}
        await parts.api.put("/logger", logger, timeout=CALL)
        await parts.api.put("/metrics", {"metrics_path": METRICS}, timeout=CALL)

    def _check_stopping(self) -> None:
        if self._death is not None and self._death.stopping:
            raise HypervisorError("the VM was stopped before Firecracker ran", code="ABORTED")

    def _make_files(self, den: Den) -> None:
        den.make_fifo(LOG)
        den.make_fifo(METRICS)
        den.make_file(EMPTY, _EMPTY_SIZE)

    def _has(self, device_id: str) -> bool:
        return self._parts.drives is not None and self._parts.drives.has(device_id)

    def _den(self) -> Den:
        if self._parts.den is None:
            raise BugError("the VM was not prepared")
        return self._parts.den

    def _drives(self) -> Drives:
        if self._parts.drives is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return self._parts.drives


def _remove_files(den: Den) -> None:
    """What Firecracker and we put into the den; then the den."""
    for name in (boot.API_SOCKET, boot.VSOCK):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(den.path(name)).st_mode):
                os.unlink(den.path(name))
    den.close()
