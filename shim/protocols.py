"""The seams inside the shim: what daemon, runtime, task service, container and sandbox know of each other.

Why: each layer knows the one below by its protocol, so a test can stand a model in for a whole VM,
and nothing imports upwards. Values that two wings speak of (`Exit`, `Deadlines`) stand here too.
Invariants: coroutines either do their work or raise a `KataError`; none of them hangs: each has a
deadline of its own underneath. A `DaemonContext` never changes after it was made.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from devices.undo import Entry, UndoLog
from proto import agent_pb2, oci_pb2
from ttrpc import Server

__all__ = [
    "VM_DEATH",
    "AgentClient",
    "DaemonContext",
    "Deadlines",
    "EventSink",
    "Exit",
    "GuestContainer",
    "GuestProcess",
    "HostUsage",
    "RootfsMount",
    "Sandbox",
    "ShimService",
    "Takeover",
]

VM_DEATH = 255
"""Exit status of a process whose end nobody saw, because its VM died: what containerd itself uses."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: `status` 0..255 (128 + n for signal n), `at` in ns of the host's clock."""

    status: int
    at: int

    @classmethod
    def now(cls, status: int) -> Exit:
        """An exit at this moment. A status out of range is the guest's mistake: cut to eight bits."""
        return cls(status & 0xFF, time.time_ns())


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds, from [agent.kata]: until the guest is up, for a call to it, for one that only asks or that
    ends something, and from a SIGKILL to the exit."""

    boot: float = 60.0
    request: float = 30.0
    stop: float = 5.0
    kill: float = 10.0


@dataclass(frozen=True, slots=True)
class RootfsMount:
    """One mount of CreateTaskRequest.rootfs (containerd.types.Mount)."""

    type: str
    source: str
    target: str
    options: Sequence[str]


@dataclass(frozen=True, slots=True)
class GuestContainer:
    """What CreateContainer needs besides the ids: all of it in guest terms."""

    spec: oci_pb2.Spec
    storages: Sequence[agent_pb2.Storage] = ()
    devices: Sequence[agent_pb2.Device] = ()
    sandbox_pidns: bool = False
    #: What of the OCI spec Kata's protocol has no field for (`shim.spec.oci_fields.BEYOND`), in OCI's shape.
    beyond: Mapping[str, Any] = field(default_factory=dict)
    #: Paths in the guest, and what its user calls what is there: for errors.
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """A process of a container: its pid in the guest, and its exec id ("" the init's), None for others."""

    pid: int
    exec_id: str | None = None


@dataclass(frozen=True, slots=True)
class HostUsage:
    """What the VMM and its daemons use on the host: CPU time in ns, resident memory in bytes."""

    cpu: int = 0
    memory: int = 0


class AgentClient(Protocol):
    """Kata's agent, one coroutine per RPC that the shim sends.

    Each call raises GuestError (or CallerError with the agent's code NOT_FOUND, ...) and never
    outlives its deadline, except those that wait for the guest by nature: wait_process,
    read_stdout, read_stderr, write_stdin. When the VM dies every call ends with GuestError.
    """

    async def create_container(
        self, container_id: str, guest: GuestContainer, *, ports: tuple[int, int, int] = (0, 0, 0)
    ) -> None: ...
    async def start_container(self, container_id: str) -> None: ...
    async def remove_container(self, container_id: str) -> None: ...
    async def exec_process(
        self,
        container_id: str,
        exec_id: str,
        process: oci_pb2.Process,
        *,
        ports: tuple[int, int, int] = (0, 0, 0),
        beyond: Mapping[str, Any] = ...,
    ) -> None: ...
    async def signal_process(self, container_id: str, exec_id: str, signal: int) -> None: ...
    async def wait_process(self, container_id: str, exec_id: str) -> int: ...
    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int: ...
    async def close_stdin(self, container_id: str, exec_id: str) -> None: ...
    async def read_stdout(self, container_id: str, exec_id: str, size: int) -> bytes: ...
    async def read_stderr(self, container_id: str, exec_id: str, size: int) -> bytes: ...
    async def tty_win_resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None: ...
    async def reattach(self, container_id: str, exec_id: str, ports: tuple[int, int, int]) -> None: ...
    async def pause_container(self, container_id: str) -> None: ...
    async def resume_container(self, container_id: str) -> None: ...
    async def stats_container(self, container_id: str) -> agent_pb2.StatsContainerResponse: ...
    async def list_processes(self, container_id: str) -> Sequence[GuestProcess]: ...
    async def update_container(
        self, container_id: str, resources: oci_pb2.LinuxResources, *, beyond: Mapping[str, Any] = ...
    ) -> None: ...


class Sandbox(Protocol):
    """One VM with its agent, shared directory and host resources."""

    @property
    def id(self) -> str: ...

    @property
    def agent(self) -> AgentClient:
        """Only after `start`."""
        ...

    @property
    def vmm_pid(self) -> int:
        """The VMM's pid on the host; what containerd shows as the task's pid."""
        ...

    @property
    def died(self) -> asyncio.Future[str]:
        """Resolves to the reason when the VM is gone without our asking."""
        ...

    @property
    def kill_limit(self) -> float:
        """Seconds from a SIGKILL to the exit that is told of it, at most."""
        ...

    @property
    def unresponsive(self) -> bool:
        """Whether its guest is known not to answer: nobody is to wait for it for long."""
        ...

    def doubt(self, why: str) -> None:
        """The guest did not do something in time: it is unresponsive until it answers when asked."""
        ...

    def mark(self, phase: str, id: str, start: float, end: float) -> None:  # noqa: A002
        """A phase for `kata-ctl trace`; `start` and `end` as time.monotonic() gives them. Costs nothing."""
        ...

    @property
    def direct_stdio(self) -> bool:
        """Whether the agent takes stdio on vsock connections of its own (design D7)."""
        ...

    async def start(self) -> None:
        """Boot the VM to a ready agent and CreateSandbox. Idempotent; concurrent callers wait."""
        ...

    async def prepare_container(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], rootfs: Sequence[RootfsMount]
    ) -> GuestContainer:
        """Mount the root file system and volumes into the share; translate the spec for the guest."""
        ...

    async def container_starting(self, container_id: str) -> None:
        """Its init process is about to run: have the network that somebody made since its creation."""
        ...

    async def container_started(self, container_id: str) -> None:
        """Its init process runs now. Never fails."""
        ...

    async def release_container(self, container_id: str) -> None:
        """Undo `prepare_container`. Idempotent; unknown ids are fine; works with a dead VM."""
        ...

    async def resize(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """Have room for a container with these limits, before the guest is told of them.

        Raises CallerError FAILED_PRECONDITION, with nothing changed, if the VM cannot be that large.
        """
        ...

    @property
    def is_pod(self) -> bool:
        """Whether its own container is a pod's sandbox container, not a single one."""
        ...

    async def host_usage(self) -> HostUsage:
        """Of the whole VM, what runs in the guest included."""
        ...

    async def open_stream(self) -> tuple[socket.socket, int]:
        """A new stdio connection to the agent: a connected non-blocking socket and its host port."""
        ...

    async def stop(self) -> None:
        """Stop the VM and release everything that the sandbox acquired. Idempotent."""
        ...


class EventSink(Protocol):
    """Where task events go, in order. `publish` queues and never blocks."""

    def publish(self, topic: str, event: Any) -> None:
        """`topic` such as "/tasks/create"; `event` a message of proto.events_pb2."""
        ...


@dataclass(frozen=True, slots=True)
class Takeover:
    """What a dead shim has left: what it wrote down last (a `shim.state.recoveryfile.Saved`), and what it had
    acquired and we can release now."""

    saved: Any
    entries: Callable[[], Sequence[Entry]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonContext:
    """What the daemon hands to the service it runs: one daemon serves one sandbox.

    `id` is the container that `start` was called for and `sandbox_id` the one whose VM this is;
    they are the same but for callers that group containers in their own way. `bundle` is the
    absolute path of that container's bundle. `address` is the shim's own ("unix:///run/...").
    `publish_binary` is containerd's path. `config_path` is the configuration that the options of
    `start` name, empty if they name none. `containerd` is the path of its gRPC socket: with namespace and
    sandbox id it makes the identity, and `key` stands for that on the host (`shim.state.identity`). What is
    the host's and this sandbox's alone is named by the key; `alias` is the name that Kata's tools may use:
    the sandbox id, or the key where another sandbox of this host has that id. `state_dir` exists, 0700;
    `share_dir` does not yet.
    `runtime_class` is "fc" for io.containerd.kata-fc.v2, "" for io.containerd.kata.v2: see
    `shim.config.find`.
    `host_mounts` is a descriptor of the mount namespace that the shim was started in, None if it is in it.
    `placed`: whoever started the shim named the cgroup that it is in.
    `takeover`: the sandbox is there already, and its shim is dead.
    """

    namespace: str
    id: str
    sandbox_id: str
    containerd: str
    key: str
    alias: str
    bundle: str
    address: str
    publish_binary: str
    config_path: str
    state_dir: str
    share_dir: str
    debug: bool
    events: EventSink
    undo: UndoLog
    shutdown: Callable[[], None]
    runtime_class: str = ""
    host_mounts: int | None = None
    placed: bool = False
    takeover: Takeover | None = None


class ShimService(Protocol):
    """What `shim.runtime.build_service(context)` returns.

    `DaemonContext.shutdown` may be called from anywhere on the loop, any number of times; it only asks, and
    the daemon then does what `shim.launch.daemon` documents.
    """

    def register(self, server: Server) -> None:
        """Register what containerd calls: containerd.task.v2.Task and .v3.Task, and the Sandbox service."""
        ...

    @property
    def idle(self) -> bool:
        """Whether no container exists or is being created: a shim that nobody would miss."""
        ...

    async def take_over(self) -> None:
        """With `DaemonContext.takeover`, before anybody is served: have VM and processes back. Raises
        KataError, with the VM as it was."""
        ...

    async def close(self) -> None:
        """Stop whatever still runs (containers, VM). Idempotent; bounded (seconds), raises nothing."""
        ...
