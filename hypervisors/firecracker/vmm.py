"""One VM under Firecracker: `Firecracker` implements `hypervisors.base.Hypervisor`.

What: its process (jailed or not), its API, its death; `drives` has its disks.
Invariants:
- Order: process, logger and metrics, machine, devices, InstanceStart; from a snapshot: process, logger and
  metrics, load.
- `_ended` resolves once, after Firecracker is reaped.
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

import structlog

from devices.child import Child, process_start_time
from devices.config import (
    BlockConfig,
    BlockOptions,
    DeviceConfig,
    NetworkConfig,
    VsockConfig,
)
from devices.errors import BugError, HostError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.kinds import Op
from devices.rendezvous import connect_when_listening
from devices.threads import acquire, look
from devices.undo import UndoLog
from devices.users import User, parse_range, take
from devices.vsock import AgentChannel, HybridVsock
from hypervisors.base import Capabilities, HypervisorState, VcpuThreadIds, VmExit
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
from hypervisors.vcpu_threads import vcpu_threads

__all__ = ["Firecracker"]

_NAME = "firecracker"
_STATE, _MEMORY = "device_state", "memory"  # files of a saved VM
_EMPTY_SIZE = 4096  # bytes: the least that a page-sized read finds
_VCPU = re.compile(r"fc_vcpu (\d+)")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

_log = structlog.get_logger(_NAME)


class Firecracker:
    """See the module's docstring and `hypervisors.base.Hypervisor`."""

    def __init__(self, section: FirecrackerConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> None:
        if not _ID.fullmatch(sandbox_id):
            raise BugError(f"{sandbox_id!r} is no sandbox id")
        self._section = section
        self._sandbox_id = sandbox_id
        self._state_dir = state_dir
        self._undo = undo
        self._netns: str | None = None
        self._user: User | None = None  # from `prepare_vm` on, if it has one of its own
        self._parts = Parts()
        self._stopping = False
        self._ended: asyncio.Future[VmExit] | None = None
        self._starting: asyncio.Future[None] | None = None  # from `start_vm` on; done when that is
        self._watcher: asyncio.Task[None] | None = None
        self._releasing = asyncio.Lock()

    # --- the VM's life

    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """See `Hypervisor.prepare_vm`. Makes the jail."""
        if id != self._sandbox_id:
            raise BugError(f"this VM was created for {self._sandbox_id}, not for {id}")
        if self._parts.den is not None:
            raise BugError("prepare_vm was called twice")
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            raise HostError(
                "/dev/kvm cannot be opened, and Firecracker has no other accelerator",
                phase="vmm",
                hint="modprobe kvm_intel or kvm_amd; see kata-ctl check",
            )
        self._netns = netns
        section = self._section
        if section.jailer_path and section.rootless and not section.jailer_uid:
            users = parse_range(section.rootless_users)
            self._user = await acquire(take, self._undo, users, lost=self._have_user)
        self._parts.den = await acquire(self._open_den)

    async def start_vm(self, timeout: float) -> None:
        """See `Hypervisor.start_vm`."""
        section = self._section
        if section.boot_from_template:
            await self._start(timeout, section.device_state_path, section.memory_path)
        else:
            await self._start(timeout)

    async def restore_vm(self, path: str, timeout: float) -> None:
        """See `Restoring.restore_vm`."""
        await self._start(timeout, f"{path}/{_STATE}", f"{path}/{_MEMORY}")

    async def _start(self, timeout: float, *saved: str) -> None:
        """`saved`: the two files of a snapshot, where it begins with that."""
        if self._parts.den is None or self._ended is not None:
            raise BugError("start_vm needs prepare_vm before it, and once")
        self._ended = asyncio.get_running_loop().create_future()
        self._starting = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._spawn(timeout)
                if saved:
                    await load(self._parts, self._section, *saved)
                else:
                    await configure(self._parts, self._section)
        except TimeoutError:
            await self._end()
            raise self._with_evidence(
                HypervisorError(f"Firecracker did not start within {timeout:g} s", code="DEADLINE_EXCEEDED")
            ) from None
        except KataError as error:
            stopped = self._stopping
            await self._end()
            if stopped:  # what it met is only how the stop looked from here
                raise HypervisorError("the VM was stopped while it started", code="ABORTED") from error
            raise self._with_evidence(error) from None
        except OSError as error:
            await self._end()
            raise self._with_evidence(
                HostError(f"cannot prepare Firecracker's files: {error}", phase="vmm")
            ) from error
        except BaseException:
            await self._end()
            raise
        finally:
            self._starting.set_result(None)
        _log.info("Firecracker runs", pid=self._process().pid, jail=self._parts.den.jailed)

    async def wait_vm(self) -> VmExit:
        """See `Hypervisor.wait_vm`."""
        if self._ended is None:
            raise BugError("wait_vm needs start_vm before it")
        return await asyncio.shield(self._ended)

    async def stop_vm(self) -> None:
        """See `Hypervisor.stop_vm`: SIGKILL, for Firecracker knows no quit, keeps nothing that would want
        flushing, and has no handler for SIGTERM: the first process of a pid namespace never gets it then. A
        start under way fails first."""
        await self._end()
        if self._starting is not None:
            await asyncio.wait({self._starting})

    async def _end(self) -> None:
        self._stopping = self._ended is not None
        if self._parts.process is not None:
            await self._parts.process.kill()
        if self._watcher is not None:
            await asyncio.wait({self._watcher})
        elif self._ended is not None and not self._ended.done():
            self._settle(VmExit(-9, "Firecracker was never started", expected=True))

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
        hot = self._ended is not None
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
        self._parts.cold.append(device)
        disks = sum(isinstance(one, BlockConfig) for one in self._parts.cold)
        return disk_path(disks - 1) if isinstance(device, BlockConfig) else ""

    async def remove_device(self, device_id: str) -> None:
        """Before `start_vm` whatever was added, later disks that were plugged since."""
        if self._ended is None:
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

    async def get_agent_socket(self) -> AgentChannel:
        """See `Hypervisor.get_agent_socket`."""
        if self._parts.channel is None:
            raise BugError("this VM has no vsock device")
        return self._parts.channel

    async def disconnect(self) -> None:
        """See `Hypervisor.disconnect`."""
        if self._parts.api is not None:
            await self._parts.api.close()
            self._parts.api = None

    async def hypervisor_config(self) -> FirecrackerConfig:
        """See `Hypervisor.hypervisor_config`."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """See `Hypervisor.get_thread_ids`: Firecracker names its threads `fc_vcpu N`."""
        return VcpuThreadIds(await look(vcpu_threads, self._process().pid, _VCPU))

    async def get_pids(self) -> list[int]:
        """See `Hypervisor.get_pids`."""
        process = self._parts.process
        return [process.pid] if process is not None and process.alive else []

    async def get_vmm_master_tid(self) -> int:
        """See `Hypervisor.get_vmm_master_tid`."""
        return self._process().pid

    async def get_ns_path(self) -> str:
        """See `Hypervisor.get_ns_path`."""
        return f"/proc/{self._process().pid}/ns/net"

    async def cleanup(self) -> None:
        """See `Hypervisor.cleanup`."""
        async with self._releasing:
            await self._release()

    async def _release(self) -> None:
        await self.stop_vm()
        parts = self._parts
        if parts.channel is not None:
            await parts.channel.close()
        if parts.api is not None:
            await parts.api.close()
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

    async def save_state(self) -> HypervisorState:
        """See `Hypervisor.save_state`."""
        process = self._process()
        with contextlib.suppress(ProcessLookupError):
            return HypervisorState(
                hypervisor=_NAME,
                sandbox_id=self._sandbox_id,
                pid=process.pid,
                start=process_start_time(process.pid),
                accelerator="kvm",
                netns=self._netns or "",
                sockets={"api": self._den().path(boot.API_SOCKET), "vsock": self._den().path(boot.VSOCK)},
            )
        raise HypervisorError("the VM does not run")

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

    def diagnostics(self) -> dict[str, str]:
        """See `Hypervisor.diagnostics`."""
        return self._parts.report.diagnostics()

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
            on_output=parts.report.on_console if section.enable_debug else None,
        )
        parts.report.process = parts.process
        self._watcher = asyncio.create_task(self._watch(parts.process), name=f"watch {self._sandbox_id}")
        self._check_stopping()  # who stopped us saw no process
        sock = await connect_when_listening(den.path(boot.API_SOCKET), parts.process, timeout)
        parts.api = HttpApi("Firecracker", sock)
        level = "Debug" if section.enable_debug else "Warn"
        logger = {"log_path": LOG, "level": level, "show_level": True}
        await parts.api.put("/logger", logger, timeout=CALL)
        await parts.api.put("/metrics", {"metrics_path": METRICS}, timeout=CALL)

    def _check_stopping(self) -> None:
        if self._stopping:
            raise HypervisorError("the VM was stopped before Firecracker ran", code="ABORTED")

    def _make_files(self, den: Den) -> None:
        den.make_fifo(LOG)
        den.make_fifo(METRICS)
        den.make_file(EMPTY, _EMPTY_SIZE)

    def _has(self, device_id: str) -> bool:
        return self._parts.drives is not None and self._parts.drives.has(device_id)

    async def _watch(self, process: Child) -> None:
        """Wait for the end, tell everybody."""
        code = await process.wait()
        reason = f"{_NAME} {process.describe()}"
        if code == 0:
            reason = "the guest ended the VM"
        ended = VmExit(
            code=code,
            reason="the VM was stopped" if self._stopping else reason,
            stderr_tail=self._parts.report.log_tail,
            console_tail=self._parts.report.console_tail,
            expected=self._stopping,
        )
        if not self._stopping:
            _log.error("the VM died", reason=reason, log=ended.stderr_tail)
        self._settle(ended)

    def _settle(self, ended: VmExit) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(ended)
        if self._parts.channel is not None:
            self._parts.channel.fail(
                lambda: HypervisorError(
                    f"the VM is gone: {ended.reason}", phase="boot", details=self.diagnostics()
                )
            )

    def _with_evidence(self, error: KataError) -> KataError:
        section = self._section
        files = ", ".join(f"{key} = {getattr(section, key)}" for key in ("kernel", "initrd", "image"))
        hint = f"see Firecracker's words; check [hypervisor.firecracker]: {files}"
        return error.with_context(phase="boot", hint=hint, details=self.diagnostics())

    def _den(self) -> Den:
        if self._parts.den is None:
            raise BugError("the VM was not prepared")
        return self._parts.den

    def _drives(self) -> Drives:
        if self._parts.drives is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return self._parts.drives

    def _process(self) -> Child:
        process = self._parts.process
        if process is None or not process.alive:  # its pid may be somebody else's by now
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return process

    def _api(self) -> HttpApi:
        if self._parts.api is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return self._parts.api


def _remove_files(den: Den) -> None:
    """What Firecracker and we put into the den; then the den."""
    for name in (boot.API_SOCKET, boot.VSOCK):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(den.path(name)).st_mode):
                os.unlink(den.path(name))
    den.close()
