"""Stands in for shim.runtime in daemons that tests start: a Task service with no VM behind it.

A container may have a helper process and a mount, which are journalled like a VMM and a share.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import Any

from google.protobuf.empty_pb2 import Empty

from devices.syscalls import mount
from proto import events_pb2, task_v2_pb2, task_v3_pb2
from shim.protocols import DaemonContext
from shim.state.procfs import start_time
from ttrpc import Code, RpcError, Server


class Stub:
    """Containers are names; Create with a bundle ending in "+helper" starts a process and mounts a tmpfs."""

    def __init__(self, context: DaemonContext) -> None:
        self.context = context
        self.containers: dict[str, subprocess.Popen[bytes] | None] = {}

    def register(self, server: Server) -> None:
        for package in (task_v2_pb2, task_v3_pb2):  # of the same form
            server.register(package.DESCRIPTOR.services_by_name["Task"], self)

    @property
    def idle(self) -> bool:
        return not self.containers

    async def close(self) -> None:
        await asyncio.sleep(float(os.environ.get("STUB_CLOSE_SECONDS", "0")))

    async def create(self, _: Any, request: Any) -> Any:
        helper = None
        if request.stdin == "helper":
            undo = self.context.undo
            target = os.path.join(self.context.state_dir, "mnt")
            undo.record("dir", path=target)
            os.mkdir(target)
            undo.record("mount", path=target)
            mount("t", target, "tmpfs", 0, "")
            entry = undo.record("process", name="helper")
            helper = subprocess.Popen(["sleep", "1000"])
            undo.update(entry, pid=helper.pid, start=start_time(helper.pid))
        self.containers[request.id] = helper
        event = events_pb2.TaskCreate(container_id=request.id, bundle=request.bundle, pid=os.getpid())
        self.context.events.publish("/tasks/create", event)
        return task_v2_pb2.CreateTaskResponse(pid=helper.pid if helper else os.getpid())

    async def connect(self, _: Any, request: Any) -> Any:
        package = task_v3_pb2 if isinstance(request, task_v3_pb2.ConnectRequest) else task_v2_pb2
        return package.ConnectResponse(shim_pid=os.getpid())

    async def state(self, _: Any, request: Any) -> Any:
        if request.id not in self.containers:
            raise RpcError(Code.NOT_FOUND, "no such container")
        return task_v2_pb2.StateResponse(id=request.id, pid=os.getpid())

    async def delete(self, _: Any, request: Any) -> Any:
        if request.id not in self.containers:
            raise RpcError(Code.NOT_FOUND, "no such container")
        del self.containers[request.id]
        self.context.events.publish("/tasks/delete", events_pb2.TaskDelete(container_id=request.id))
        return task_v2_pb2.DeleteResponse(pid=os.getpid())

    async def shutdown(self, _: Any, request: Any) -> Any:
        if not self.containers:
            self.context.shutdown()
        return Empty()


def build_service(context: DaemonContext) -> Stub:
    return Stub(context)
