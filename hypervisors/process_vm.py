"""What every driver does alike whose VM is one process of ours: `ProcessVm`, the base of their `Hypervisor`.

What: the start with its deadline and its errors, the stop, the wait, and what can be told of the processes.
A driver adds how it is prepared and launched (`_launch`), how it is asked to end (`_say_quit`), its devices.
Invariants: after a start that failed nothing runs; a stop ends a start under way; whoever waits is told once,
by `hypervisors.death`. What was acquired is released by the driver's `cleanup`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import structlog

from devices.child import Child, process_start_time
from devices.errors import BugError, HostError, HypervisorError, KataError
from devices.threads import look
from devices.undo import UndoLog
from devices.vsock import AgentChannel
from hypervisors.base import HypervisorState, VcpuThreadIds, VmExit
from hypervisors.config import SandboxSection
from hypervisors.death import GATHER, Death
from hypervisors.parts import VmParts
from hypervisors.vcpu_threads import vcpu_threads

if TYPE_CHECKING:  # who needs it has h11 loaded
    from hypervisors.http_api import HttpApi

__all__ = ["ProcessVm", "need_kvm", "to_its_end"]

# Seconds that a running VMM gets: to take the word, to end by it, and to end by SIGTERM.
_QUIT_TIMEOUT, _TERM_TIMEOUT = 0.3, 0.3
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

SectionT = TypeVar("SectionT", bound=SandboxSection)
PartsT = TypeVar("PartsT", bound=VmParts)
PartT = TypeVar("PartT")
AnswerT = TypeVar("AnswerT")

_log = structlog.get_logger("vmm")


class ProcessVm(Generic[SectionT, PartsT]):
    """See the module's docstring. `name`: of the section; `vmm`: for people. `vcpu`: how it names a vCPU's
    thread, with the number as a group, if it does."""

    name: ClassVar[str]
    vmm: ClassVar[str]
    adopts: ClassVar[bool] = False
    vcpu: ClassVar[re.Pattern[str]] = re.compile("(?!)")

    def __init__(
        self, section: SectionT, parts: PartsT, *, sandbox_id: str, state_dir: str, undo: UndoLog
    ) -> None:
        if not _ID.fullmatch(sandbox_id):
            raise BugError(f"{sandbox_id!r} is no sandbox id")
        self._section = section
        self._sandbox_id = sandbox_id
        self._state_dir = state_dir
        self._undo = undo
        self._netns: str | None = None
        self._parts = parts
        self._prepared = False  # set by `prepare_vm`
        self._death: Death | None = None  # from `start_vm` on
        self._starting: asyncio.Future[None] | None = None  # likewise; done when `start_vm` is

    async def _launch(self, timeout: float) -> None:
        """Start it. Raises KataError, TimeoutError; what was started until then is in the parts."""
        raise NotImplementedError  # pragma: no cover  (each driver has its own)

    async def _say_quit(self, timeout: float) -> None:
        """Ask a VMM that answers to end the VM. Raises KataError."""
        raise NotImplementedError  # pragma: no cover  (likewise)

    # --- the VM's life

    def _prepare(self, sandbox_id: str, netns: str | None) -> None:
        """What `prepare_vm` begins with."""
        if sandbox_id != self._sandbox_id:
            raise BugError(f"this VM was created for {self._sandbox_id}, not for {sandbox_id}")
        self._netns = netns

    async def start_vm(self, timeout: float) -> None:
        """See `Hypervisor.start_vm`."""
        if not self._prepared or self._death is not None:
            raise BugError("start_vm needs prepare_vm before it, and once")
        self._begin_death()
        self._starting = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._launch(timeout)
        except TimeoutError:
            await self._end()
            raise self._with_evidence(
                HypervisorError(f"{self.vmm} did not start within {timeout:g} s", code="DEADLINE_EXCEEDED")
            ) from None
        except KataError as error:
            stopped = self._death is not None and self._death.stopping
            await self._end()
            if stopped:  # what it met is only how the stop looked from here
                raise HypervisorError("the VM was stopped while it started", code="ABORTED") from error
            raise self._with_evidence(error) from None
        except BaseException:
            await self._end()
            raise
        finally:
            self._starting.set_result(None)
        assert self._parts.process is not None
        _log.info(f"{self.vmm} runs", pid=self._parts.process.pid, processes=self._parts.pids())

    def _begin_death(self) -> Death:
        self._death = Death(self._section, self._parts, vmm=self.vmm, name=self.name)
        self._parts.helpers.on_loss = self._death.lose
        return self._death

    async def wait_vm(self) -> VmExit:
        """See `Hypervisor.wait_vm`."""
        if self._death is None:
            raise BugError("wait_vm needs start_vm before it")
        return await asyncio.shield(self._death.ended)

    async def stop_vm(self) -> None:
        """See `Hypervisor.stop_vm`: by word, SIGTERM, SIGKILL, each with a deadline: a VMM that waits for a
        daemon which stands still takes no more than the last. A start under way fails first."""
        process = self._parts.process
        if self._death is not None:
            self._death.stopping = True
        if self._parts.answers and process is not None and process.alive:
            with contextlib.suppress(KataError):
                await self._say_quit(_QUIT_TIMEOUT)
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

    # --- knowledge

    async def disconnect(self) -> None:
        """See `Hypervisor.disconnect`."""
        if self._parts.api is not None:
            await self._parts.api.close()
            self._parts.api = None

    async def get_agent_socket(self) -> AgentChannel:
        """See `Hypervisor.get_agent_socket`."""
        if self._parts.channel is None:
            raise BugError("this VM has no vsock device")
        return self._parts.channel

    async def hypervisor_config(self) -> SectionT:
        """See `Hypervisor.hypervisor_config`."""
        return self._section

    async def get_thread_ids(self) -> VcpuThreadIds:
        """See `Hypervisor.get_thread_ids`."""
        return VcpuThreadIds(await look(vcpu_threads, self._process().pid, self.vcpu))

    async def save_state(self) -> HypervisorState:
        """See `Hypervisor.save_state`."""
        pid = self._process().pid
        with contextlib.suppress(ProcessLookupError):
            return HypervisorState(
                hypervisor=self.name,
                sandbox_id=self._sandbox_id,
                pid=pid,
                start=process_start_time(pid),
                accelerator=self._accelerator(),
                netns=self._netns or "",
                sockets=self._sockets(),
                processes=self._parts.helpers.processes(),
                unfit="" if self.adopts else f"VMs of {self.vmm} are not taken over",
            )
        raise HypervisorError("the VM does not run")

    async def get_pids(self) -> list[int]:
        """See `Hypervisor.get_pids`."""
        return self._parts.pids()

    async def get_vmm_master_tid(self) -> int:
        """See `Hypervisor.get_vmm_master_tid`."""
        return self._process().pid

    async def get_ns_path(self) -> str:
        """See `Hypervisor.get_ns_path`."""
        return f"/proc/{self._process().pid}/ns/net"

    async def get_jailer_root(self) -> str:
        """It has the host's root, or what its confinement leaves of it."""
        return ""

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """CPU seconds and resident bytes of the VMM and its daemons, from /proc.

        The guest's memory, which the daemons map too, counts once, with the VMM.
        """
        return self._parts.metrics()

    def diagnostics(self) -> dict[str, str]:
        """See `Hypervisor.diagnostics`."""
        return self._parts.diagnostics()

    # --- how it is done

    def _accelerator(self) -> str:
        return "kvm"

    def _sockets(self) -> dict[str, str]:
        """Of those that are told by `save_state`."""
        return {}

    async def _or_death(self, work: Coroutine[Any, Any, PartT]) -> PartT:
        """What `work`, a talk with the VMM, comes to; the reason of the VM's end if that comes first, or a
        moment later: a connection usually breaks before the death is noticed."""
        assert self._death is not None
        talking, ended = asyncio.create_task(work), self._death.ended
        waits: set[asyncio.Future[Any]] = {talking, ended}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            talking.cancel()
            await asyncio.wait({talking})
        error = None if talking.cancelled() else talking.exception()
        if isinstance(error, KataError) and error.code == "UNAVAILABLE":
            await asyncio.wait({ended}, timeout=GATHER)
        if ended.done():
            raise self._death.error(ended.result()) from error
        return talking.result()

    def _with_evidence(self, error: KataError) -> KataError:
        files = ((key, getattr(self._section, key)) for key in ("kernel", "initrd", "image"))
        guest = ", ".join(f"{key} = {path}" for key, path in files if path)
        hint = f"see {self.vmm}'s words; check [hypervisor.{self.name}]: {guest}"
        return error.with_context(phase="boot", hint=hint, details=self.diagnostics())

    def _process(self) -> Child:
        process = self._parts.process
        if process is None or not process.alive:  # its pid may be somebody else's by now
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return process

    def _api(self) -> HttpApi:
        self._process()
        return self._running(self._parts.api)

    def _running(self, part: PartT | None) -> PartT:
        if part is None:
            raise HypervisorError("the VM does not run", code="FAILED_PRECONDITION")
        return part


def need_kvm(vmm: str) -> None:
    """Raise HostError where a VMM without another accelerator cannot run."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise HostError(
            f"/dev/kvm cannot be opened, and {vmm} has no other accelerator",
            phase="vmm",
            hint="modprobe kvm_intel or kvm_amd; see kata-ctl check",
        )


async def to_its_end(call: asyncio.Task[AnswerT]) -> AnswerT:
    """Its answer. Who is cancelled waits for it all the same (it has a deadline): after half a request nobody
    would know what has become of it."""
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait({call})
        raise
