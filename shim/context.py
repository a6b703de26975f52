"""What the daemon hands to the service it runs, and what it expects back.

Why: `daemon` (process, sockets, events, journal) and `runtime` (containers, sandbox) meet here and
only here, so each can be tested with a stand-in for the other.
Invariants: the context never changes after it was made. `shutdown` may be called from anywhere on
the loop, any number of times; it only asks, and the daemon then does what `daemon` documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from devices.undo import UndoLog
from shim.protocols import EventSink
from ttrpc import Server

__all__ = ["DaemonContext", "ShimService"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonContext:
    """Facts of one daemon: one daemon serves one sandbox.

    `id` is the container that `start` was called for and `sandbox_id` the one whose VM this is;
    they are the same but for callers that group containers in their own way. `bundle` is the
    absolute path of that container's bundle. `address` is the shim's own ("unix:///run/...").
    `publish_binary` is containerd's path. `config_path` is the configuration that the options of
    `start` name, empty if they name none. `state_dir` exists, 0700: /run/kata/<sandbox_id>.
    `runtime_class` is "fc" for io.containerd.kata-fc.v2, "" for io.containerd.kata.v2: see
    `shim.config.find`.
    `host_mounts` is a descriptor of the mount namespace that the shim was started in, None if it is in it.
    """

    namespace: str
    id: str
    sandbox_id: str
    bundle: str
    address: str
    publish_binary: str
    config_path: str
    state_dir: str
    debug: bool
    events: EventSink
    undo: UndoLog
    shutdown: Callable[[], None]
    runtime_class: str = ""
    host_mounts: int | None = None


class ShimService(Protocol):
    """What `shim.runtime.build_service(context)` returns."""

    def register(self, server: Server) -> None:
        """Register what containerd calls: containerd.task.v2.Task and .v3.Task, and the Sandbox service."""
        ...

    @property
    def idle(self) -> bool:
        """Whether no container exists or is being created: a shim that nobody would miss."""
        ...

    async def close(self) -> None:
        """Stop whatever still runs (containers, VM). Idempotent; bounded (seconds), raises nothing."""
        ...
