"""The task service of containerd, v2 and v3: protobuf messages to calls of the container manager.

What: `TaskService` has a method for each RPC of containerd.task.v2.Task. v3 is the same under
another package name; each request is answered with the class of the package it came from, so one
object serves both.
Why so thin: what the calls mean stands in `container_manager`, `container` and `process`; here is
only what they look like on the wire.
Invariants: State, Connect and Wait read the host's own books; they never ask the guest. Pids asks it, but
answers from the books alone if the guest does not within a second.
Errors are KataErrors whose code the ttrpc server puts into the reply.
Source: containerd's api/runtime/task/v2/shim.proto; facts/containerd-shim.md 1.9-1.12 and 3.1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import structlog
from google.protobuf import empty_pb2

from devices.errors import CallerError
from devices.threads import look
from proto import oci_pb2, runc_options_pb2, task_types_pb2, task_v2_pb2, task_v3_pb2
from shim.protocols import Exit
from shim.spec.documents import process_of, resources_of
from shim.spec.limits import fold_unified
from shim.spec.oci import Rest, process_from_json, resources_from_json
from shim.stdio.stdio import StdioSpec
from shim.tasks.container_manager import ContainerManager
from shim.tasks.process import Process, Status

__all__ = ["TaskService"]

_PACKAGES = {"containerd.task.v2": task_v2_pb2, "containerd.task.v3": task_v3_pb2}

_STATUS = {
    Status.CREATED: task_types_pb2.CREATED,
    Status.RUNNING: task_types_pb2.RUNNING,
    Status.PAUSED: task_types_pb2.PAUSED,
    Status.STOPPED: task_types_pb2.STOPPED,
    Status.DELETED: task_types_pb2.STOPPED,
}

_log = structlog.get_logger("task")

_MAX_WINDOW = 0xFFFF  # rows and columns are 16 bits wide in struct winsize


def _messages(request: Any) -> Any:
    """The module with the messages of the package that `request` belongs to."""
    return _PACKAGES[request.DESCRIPTOR.file.package]


def _exit_fields(response: Any, ended: Exit | None) -> Any:
    """Fill exit_status and exited_at in, which stay unset until the exit."""
    if ended is not None:
        response.exit_status = ended.status
        response.exited_at.FromNanoseconds(ended.at)
    return response


def _tell_dropped(what: str, strange: list[str], rest: Rest) -> None:
    if strange or rest.dropped:
        _log.info("not passed to the guest", process=what[:256], keys=[*strange, *rest.dropped][:50])


def _process(data: bytes) -> tuple[oci_pb2.Process, Rest, list[str]]:
    """An exec's process, of up to some megabytes: to be run beside the loop. Raises CallerError."""
    document, strange = process_of(data)
    return *process_from_json(document), strange


def _resources(data: bytes) -> tuple[oci_pb2.LinuxResources, Rest, list[str]]:
    """An update's resources, likewise."""
    document, strange = resources_of(data)
    return *resources_from_json(fold_unified(document)), strange


def _stdio(request: Any) -> StdioSpec:
    return StdioSpec(request.stdin, request.stdout, request.stderr, request.terminal)


class TaskService:
    """The RPCs. `shutdown` is called once, after Shutdown, when no container is left; it only asks."""

    def __init__(self, manager: ContainerManager, shutdown: Callable[[], None]) -> None:
        self._manager = manager
        self._shutdown = shutdown

    async def state(self, _ctx: object, request: Any) -> Any:
        """Where a process is; from the host's books, within any deadline."""
        container = self._manager.get(request.id)
        process = container.process(request.exec_id)
        spec = process.stdio_spec
        response = _messages(request).StateResponse(
            id=request.exec_id or request.id,
            exec_id=request.exec_id,
            bundle=container.bundle,
            pid=self._pid(process, container.pid),
            status=_STATUS[process.status],
            stdin=spec.stdin,
            stdout=spec.stdout,
            stderr=spec.stderr,
            terminal=spec.terminal,
        )
        return _exit_fields(response, process.exit)

    @staticmethod
    def _pid(process: Process, pid: int) -> int:
        """An exec that does not run yet has no pid."""
        return 0 if process.exec_id and process.status is Status.CREATED else pid

    async def create(self, _ctx: object, request: Any) -> Any:
        """Create a container, and with the first one the VM."""
        if request.checkpoint:
            raise CallerError("checkpoints are not supported: not implemented", code="UNIMPLEMENTED")
        pid = await self._manager.create(
            request.id, request.bundle, request.rootfs, _stdio(request), request.options
        )
        return _messages(request).CreateTaskResponse(pid=pid)

    async def start(self, _ctx: object, request: Any) -> Any:
        """Run a created process."""
        return _messages(request).StartResponse(pid=await self._manager.start(request.id, request.exec_id))

    async def delete(self, _ctx: object, request: Any) -> Any:
        """Forget a process that has ended."""
        container = self._manager.get(request.id)
        pid = self._pid(container.process(request.exec_id), container.pid)
        ended = await self._manager.delete(request.id, request.exec_id)
        return _exit_fields(_messages(request).DeleteResponse(pid=pid), ended)

    async def pids(self, _ctx: object, request: Any) -> Any:
        """Its processes in the guest, each with the VMM's pid: a guest's pid would name somebody else's
        process to whoever signals or lists it on the host. Those of Exec say whose they are. Never empty:
        containerd 1.7 takes a shim that answers with none for leaked."""
        container = self._manager.get(request.id)
        response = _messages(request).PidsResponse()
        for exec_id in await self._manager.processes(request.id):
            entry = response.processes.add(pid=container.pid)
            if exec_id:
                details = runc_options_pb2.ProcessDetails(exec_id=exec_id)
                entry.info.type_url = details.DESCRIPTOR.full_name
                entry.info.value = details.SerializeToString()
        return response

    async def pause(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Freeze a container."""
        await self._manager.pause(request.id)
        return empty_pb2.Empty()

    async def resume(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Thaw it."""
        await self._manager.resume(request.id)
        return empty_pb2.Empty()

    async def checkpoint(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Not possible: the state of a container is inside a VM."""
        self._manager.get(request.id)
        raise CallerError("checkpoints are not supported: not implemented", code="UNIMPLEMENTED")

    async def kill(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Send a signal to one process, or to all of a container."""
        container = self._manager.get(request.id)
        await container.kill(request.exec_id, request.signal, everyone=request.all)
        return empty_pb2.Empty()

    async def exec(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Remember a further process, which Start then runs."""
        self._manager.get(request.id)
        process, rest, strange = await look(_process, request.spec.value)
        _tell_dropped(f"{request.id}/{request.exec_id}", strange, rest)
        await self._manager.add_exec(
            request.id, request.exec_id, process, _stdio(request), beyond=rest.beyond
        )
        return empty_pb2.Empty()

    async def resize_pty(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Set a terminal's size; may come before Start, and without a terminal it does nothing."""
        if max(request.width, request.height) > _MAX_WINDOW:
            raise CallerError("a terminal has at most 65535 rows and columns", code="INVALID_ARGUMENT")
        container = self._manager.get(request.id)
        await container.resize(request.exec_id, request.height, request.width)
        return empty_pb2.Empty()

    async def close_io(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """End a process's stdin after what was written to it; may come before Start."""
        container = self._manager.get(request.id)
        container.process(request.exec_id)
        if request.stdin:
            container.end_input(request.exec_id)
        return empty_pb2.Empty()

    async def update(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """Change a container's limits."""
        self._manager.get(request.id)
        resources, rest, strange = await look(_resources, request.resources.value)
        _tell_dropped(request.id, strange, rest)
        await self._manager.update(request.id, resources, beyond=rest.beyond)
        return empty_pb2.Empty()

    async def wait(self, _ctx: object, request: Any) -> Any:
        """Answer when the process has ended; at once if it has."""
        ended = await self._manager.get(request.id).wait(request.exec_id)
        return _exit_fields(_messages(request).WaitResponse(), ended)

    async def stats(self, _ctx: object, request: Any) -> Any:
        """What the container uses, in the form of the host's cgroup version."""
        return _messages(request).StatsResponse(stats=await self._manager.stats(request.id))

    async def connect(self, _ctx: object, request: Any) -> Any:
        """Who serves this container. containerd asks when it finds a bundle at its start: one that was killed
        before its Create has nobody who sends that again, and NOT_FOUND makes it clean up; with an answer it
        would hold the id for a task that never comes. In a pod that lives there is one, without a task's pid:
        containerd 1.7 asks there for a container that it is about to create."""
        container = self._manager.containers.get(request.id)
        if self._manager.idle:
            self._manager.get(request.id)
        return _messages(request).ConnectResponse(
            shim_pid=os.getpid(), task_pid=0 if container is None else container.pid
        )

    async def shutdown(self, _ctx: object, request: Any) -> empty_pb2.Empty:
        """End the shim if no container is left; else it stays, and that is no error."""
        self._manager.when_idle(request.id, self._shutdown)
        return empty_pb2.Empty()
