"""The events of one container, as containerd's clients know them.

What: a method for each topic, which makes the message and publishes it.
Why apart from the container: what an event looks like is containerd's, when it is told is the container's.
Invariants: nothing here waits; the order of the calls is the order of the events.
Source: containerd's api/events/task.proto; facts/containerd-shim.md 1.12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proto import events_pb2, mount_pb2
from shim.protocols import EventSink, Exit
from shim.stdio.stdio import StdioSpec
from shim.tasks.process import Process

__all__ = ["TaskEvents"]


class TaskEvents:
    """`pid` is what containerd shows for each process of the container: the VMM's."""

    def __init__(self, sink: EventSink, container_id: str, pid: int) -> None:
        self._sink = sink
        self._id = container_id
        self._pid = pid

    def created(self, bundle: str, rootfs: Sequence[mount_pb2.Mount], stdio: StdioSpec) -> None:
        """/tasks/create, with the mounts and streams of the request."""
        streams = events_pb2.TaskIO(
            stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, terminal=stdio.terminal
        )
        self._publish(
            "create", events_pb2.TaskCreate, bundle=bundle, rootfs=rootfs, io=streams, pid=self._pid
        )

    def started(self) -> None:
        """/tasks/start."""
        self._publish("start", events_pb2.TaskStart, pid=self._pid)

    def exec_added(self, exec_id: str) -> None:
        """/tasks/exec-added."""
        self._publish("exec-added", events_pb2.TaskExecAdded, exec_id=exec_id)

    def exec_started(self, exec_id: str) -> None:
        """/tasks/exec-started."""
        self._publish("exec-started", events_pb2.TaskExecStarted, exec_id=exec_id, pid=self._pid)

    def paused(self) -> None:
        """/tasks/paused."""
        self._publish("paused", events_pb2.TaskPaused)

    def resumed(self) -> None:
        """/tasks/resumed."""
        self._publish("resumed", events_pb2.TaskResumed)

    def killed_for_memory(self) -> None:
        """/tasks/oom."""
        self._publish("oom", events_pb2.TaskOOM)

    def exited(self, process: Process, ended: Exit) -> None:
        """/tasks/exit: its id is the exec's, or the container's once more."""
        self._publish("exit", events_pb2.TaskExit, ended, id=process.exec_id or self._id, pid=self._pid)

    def deleted(self, ended: Exit) -> None:
        """/tasks/delete."""
        self._publish("delete", events_pb2.TaskDelete, ended, pid=self._pid)

    def _publish(self, name: str, kind: Any, ended: Exit | None = None, **fields: Any) -> None:
        event = kind(container_id=self._id, **fields)
        if ended is not None:
            event.exit_status = ended.status
            event.exited_at.FromNanoseconds(ended.at)
        self._sink.publish(f"/tasks/{name}", event)
