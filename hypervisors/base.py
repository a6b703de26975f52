"""What a hypervisor is to the rest of the shim: the mission's traits as Python protocols.

What: `Hypervisor` (one VM of one VMM), `HypervisorPlugin` (a kind of VMM), and the small types
that they exchange.
Why: the sandbox speaks to these, so a VMM can be added by a package of its own (design D3, D4).
Invariants:
- Life: `prepare_vm` -> `add_device` ... -> `start_vm` -> ... -> `stop_vm` -> `cleanup`. `stop_vm` and
  `cleanup` are idempotent and work at any point, after a failed `prepare_vm` or `start_vm` too.
- What a VMM cannot do its `capabilities` refuse, with a reason, and it raises UnsupportedByHypervisor.
- Every call ends: each has a deadline, and ends early when the VMM dies.
- A VM that outlived its process begins with `Adopting.adopt` instead, one that was saved with
  `Restoring.restore_vm` in the place of `start_vm`; both end as every other.
- As in the mission's trait all methods are coroutines, except `diagnostics`, which error paths use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from devices.config import DeviceConfig
from devices.errors import UnsupportedByHypervisor
from devices.kinds import YES, Kind, Op, Support
from devices.undo import Entry, UndoLog
from devices.vsock import AgentChannel

__all__ = [
    "Adopting",
    "Capabilities",
    "CheckResult",
    "Hosted",
    "Hypervisor",
    "HypervisorPlugin",
    "HypervisorState",
    "Restoring",
    "TemplatePlugin",
    "VcpuThreadIds",
    "VmExit",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What this VMM can do, as this VM is configured. `devices`: by kind; one that is missing is refused.

    `tap_by_name`: it opens the tap of a network card itself, by its name, instead of taking descriptors, as
    `tap_owner`, a user and a group.
    `snapshot`: `save_vm`; `restore`: a VM of it can begin with what was saved (`Restoring`).
    `hybrid_vsock`: vsock is a unix socket; `own_vsock`: which the VMM serves itself, without a daemon.
    `adopt`: its VMs can outlive the process that started them, and another one can take them over.
    """

    devices: Mapping[Kind, Support] = field(default_factory=dict)
    tap_by_name: bool = False
    tap_owner: tuple[int, int] = (0, 0)
    hybrid_vsock: bool = False
    own_vsock: bool = False
    pause: bool = False
    snapshot: bool = False
    restore: bool = False
    adopt: bool = False

    def why_not(self, kind: Kind, op: Op) -> str:
        """The reason why it cannot be done, "" if it can."""
        return self.devices.get(kind, Support()).reason(op)

    def can(self, kind: Kind, op: Op) -> bool:
        """Whether it can be done."""
        return self.why_not(kind, op) == YES

    def require(self, hypervisor: str, kind: Kind, op: Op) -> None:
        """Raise UnsupportedByHypervisor, with the reason, unless it can be done."""
        if reason := self.why_not(kind, op):
            raise UnsupportedByHypervisor(hypervisor, f"{op.value} of {kind.value}: {reason}")

    @property
    def more_memory(self) -> bool:
        """Whether memory can be plugged, in whichever way."""
        return self.can(Kind.DIMM, Op.HOT) or self.can(Kind.VIRTIO_MEM, Op.HOT)

    @property
    def less_memory(self) -> bool:
        """Whether memory can be given back, in whichever way."""
        return self.can(Kind.DIMM, Op.UNPLUG) or self.can(Kind.VIRTIO_MEM, Op.UNPLUG)


@dataclass(frozen=True, slots=True)
class VcpuThreadIds:
    """Host thread id of each vCPU, by vCPU index."""

    vcpus: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VmExit:
    """How a VM ended.

    `code`: the VMM's exit code, or minus the signal that killed it. `reason`: one sentence.
    `expected`: it ended because of `stop_vm`.
    """

    code: int
    reason: str
    stderr_tail: str = ""
    console_tail: str = ""
    expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorState:
    """Enough to find and judge the VM again, and to take it over: JSON-able, written to the sandbox's state
    file. `processes`: its daemons' pids, by device or name. `cid`: kernel vsock only, else 0. `unfit`: why it
    cannot be taken over, "" if it can."""

    hypervisor: str
    sandbox_id: str
    pid: int = 0
    start: int = 0  # the process's start time in clock ticks
    accelerator: str = ""
    netns: str = ""
    sockets: Mapping[str, str] = field(default_factory=dict)
    processes: Mapping[str, int] = field(default_factory=dict)
    cid: int = 0
    unfit: str = ""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of `kata-ctl check`."""

    name: str
    ok: bool
    text: str
    hint: str = ""


class Hypervisor(Protocol):
    """One VM. Its phases and invariants are in the module's docstring."""

    # --- the VM's life
    async def prepare_vm(self, id: str, netns: str | None) -> None:  # noqa: A002  (the mission's name)
        """Check and remember; `netns` is the path of the network namespace the VMM shall live in."""
        ...

    async def start_vm(self, timeout: float) -> None:
        """Start the VMM; return when it answers and its vCPUs run. The agent is waited for by the
        AgentChannel. Raises HypervisorError, HostError with the VMM's last words; then nothing runs."""
        ...

    async def stop_vm(self) -> None:
        """End the VM, the guest unasked, within a second. Idempotent."""
        ...

    async def wait_vm(self) -> VmExit:
        """Return when the VMM is gone. Any number of callers, any time after `start_vm`."""
        ...

    async def pause_vm(self) -> None: ...

    async def save_vm(self, path: str) -> None:
        """Write device state and memory to the directory `path`, which exists and is empty. A VM that runs is
        paused meanwhile."""
        ...

    async def resume_vm(self) -> None: ...

    # --- sizing
    async def resize_vcpu(self, count: int) -> int:
        """Have `count` vCPUs; returns how many there are afterwards."""
        ...

    async def resize_memory(self, mib: int) -> int:
        """Have `mib` MiB of memory; returns how much there is afterwards."""
        ...

    # --- devices
    async def add_device(self, device: DeviceConfig) -> str:
        """Plug it: before `start_vm` cold, later hot. Returns its guest PCI path ("03" or "02/00",
        slots in hexadecimal from the root), "" where the device has none."""
        ...

    async def remove_device(self, device_id: str) -> None: ...

    async def update_device(self, device: DeviceConfig) -> None: ...

    # --- knowledge
    async def get_agent_socket(self) -> AgentChannel:
        """The channel made for the VsockConfig that was added."""
        ...

    async def disconnect(self) -> None:
        """Let go of the VMM's control connection without ending the VM."""
        ...

    async def hypervisor_config(self) -> Any:
        """The section it was created from."""
        ...

    async def get_thread_ids(self) -> VcpuThreadIds: ...

    async def get_pids(self) -> list[int]:
        """All processes that belong to the VM: VMM first, then its daemons."""
        ...

    async def get_vmm_master_tid(self) -> int:
        """The VMM's pid."""
        ...

    async def get_ns_path(self) -> str:
        """The VMM's network namespace: /proc/PID/ns/net."""
        ...

    async def cleanup(self) -> None:
        """Release all that `prepare_vm`, `add_device` and `start_vm` acquired. Idempotent."""
        ...

    async def check(self) -> None:
        """Raise HypervisorError if the VMM does not answer now."""
        ...

    async def get_jailer_root(self) -> str:
        """The directory that the VMM sees as /; "" for the host's."""
        ...

    async def save_state(self) -> HypervisorState: ...

    async def capabilities(self) -> Capabilities: ...

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        """Numbers by name (Prometheus style) of the VMM's processes: `cpu_seconds_total`,
        `resident_bytes` (the guest's memory once, however many of them map it), and what else there is."""
        ...

    def diagnostics(self) -> dict[str, str]:
        """Evidence for an error's `details`: {"vmm stderr": tail, "guest console": tail, ...}; never
        fails, empty texts left out."""
        ...


class Adopting(Hypervisor, Protocol):
    """What a hypervisor whose capability `adopt` says so can do besides."""

    async def adopt(self, state: HypervisorState, processes: Mapping[int, Entry]) -> None:
        """Instead of `prepare_vm` and `start_vm`: take over the running VM that `save_state` of a process
        which is dead now described. `processes`: its processes in the undo log, by pid. It can be looked at,
        paused, stopped and cleaned up afterwards; devices and sizes stay as they are. Raises HypervisorError,
        HostError, with the VM as it was."""
        ...


class Restoring(Hypervisor, Protocol):
    """What a hypervisor whose capability `restore` says so can do besides."""

    async def restore_vm(self, path: str, timeout: float) -> None:
        """Instead of `start_vm`: the VM that `save_vm` wrote to the directory `path`, running on. Before it
        the devices are added that the saved VM had, by the same ids and in the same order; what is behind
        them may be at another place now. A VsockConfig has no `home_call`: the agent called home long ago.
        What is in the directory stays as it is. Raises as `start_vm`."""
        ...


class Hosted(Hypervisor, Protocol):
    """What a hypervisor whose section is a `HostedSection` can do besides."""

    async def for_pod(self, annotations: Mapping[str, str]) -> None:
        """Before `prepare_vm`: what the spec of the pod's first container says of the pod."""
        ...


SectionT = TypeVar("SectionT")


class HypervisorPlugin(Protocol[SectionT]):
    """A kind of VMM. Found by entry point `kata_shim.hypervisors`; see hypervisors.registry. It may have
    `seen_with` besides, a tuple of texts: the versions of the VMM that it was seen working with."""

    @property
    def name(self) -> str:
        """The name of its section: [hypervisor.NAME]."""
        ...

    @property
    def section(self) -> type[SectionT]:
        """A frozen dataclass: the schema of the section, defaults included; extends
        `hypervisors.config.SandboxSection` or `VhostUserSection`, which the sandbox reads."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """The most that this VMM can do here; one VM's own capabilities may be fewer, never more."""
        ...

    def adjust_config(self, section: SectionT) -> SectionT:
        """Fill in what was left to default and bring values into range. No I/O beyond this host's facts."""
        ...

    def validate_config(self, section: SectionT) -> None:
        """Raise ConfigError (with `key`, so that file and line are told) for a section, already adjusted,
        that cannot work."""
        ...

    def check(self) -> list[CheckResult]:
        """Can this host run it, and if not, why not. May take a second; never raises."""
        ...

    def create(self, section: SectionT, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> Hypervisor:
        """A VM that does not run yet. `state_dir` exists, is 0700 and belongs to this sandbox.

        `sandbox_id` is for people: another sandbox of this host may have the same, in another namespace or
        under another containerd. What must have a name of its own on the host (a jail, a cgroup) takes the
        last part of `state_dir`.
        """
        ...


class TemplatePlugin(HypervisorPlugin[SectionT], Protocol[SectionT]):
    """What a plugin has besides whose VMs can begin with a template (docs/templates.md): its section has the
    keys boot_to_be_template and memory_path; one VM with them can be saved, and others are `Restoring`."""

    def why_no_template(self, section: SectionT) -> str:
        """Why VMs of this section, adjusted and valid, cannot, "" if they can."""
        ...
