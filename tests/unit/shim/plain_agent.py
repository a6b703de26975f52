"""An agent that speaks Kata's protocol and nothing else, over a real ttrpc connection.

What: `PlainAgent` serves AgentService and Health as Kata's own agent does: streams by ReadStdout, ReadStderr
and WriteStdin, exits by WaitProcess, which forgets the process, OOM by GetOOMEvent; no features, no ports, no
loopback service. `PlainProcess` is a process of it, whose program is the test.
Source: the agent of Kata 4.1.0, src/agent/src/rpc.rs, as read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from google.protobuf.empty_pb2 import Empty

from proto import agent_pb2, health_pb2
from ttrpc import CallContext, Code, RpcError, Server

__all__ = ["PlainAgent", "PlainProcess"]

_DRAIN = 0.05  # seconds; Kata: half of one


class PlainProcess:
    """One process: what it writes is read by calls, what it is sent is in `stdin`."""

    def __init__(self, *, terminal: bool) -> None:
        self.terminal = terminal
        self.started = asyncio.Event()
        self.stdin = bytearray()
        self.stdin_closed = asyncio.Event()
        self.window = (0, 0)
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._outputs = {"stdout": bytearray(), "stderr": bytearray()}
        self._changed = asyncio.Event()

    def write(self, data: bytes, stream: str = "stdout") -> None:
        """As the program in it."""
        self._outputs["stdout" if self.terminal else stream] += data
        self._changed.set()

    def exit(self, status: int) -> None:
        """As the program in it."""
        if not self.exited.done():
            self.exited.set_result(status)
            self._changed.set()

    async def read(self, stream: str, size: int) -> bytes:
        """Some bytes; after the exit and the last of them a terminal is broken, a pipe at its end."""
        held = self._outputs["stdout" if self.terminal else stream]
        while not held and not self.exited.done():
            self._changed.clear()
            await self._changed.wait()
        if not held:
            if self.terminal:
                raise RpcError(Code.INTERNAL, "I/O error (os error 5)")
            await asyncio.sleep(_DRAIN)
        data = bytes(held[:size])
        del held[:size]
        return data


class PlainAgent:
    """Use as an async context manager: gives the client's end of the connection."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, PlainProcess]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.oom: asyncio.Queue[str] = asyncio.Queue()
        self._called = asyncio.Condition()
        self._server = Server()
        for module, name in ((agent_pb2, "AgentService"), (health_pb2, "Health")):
            service = module.DESCRIPTOR.services_by_name[name]
            self._server.register(service, self)

    async def __aenter__(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # an abstract name of the kernel's choice
        listener.listen()
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(listener.getsockname())
        self._serving = asyncio.create_task(self._server.serve(listener))
        return ours

    async def __aexit__(self, *_error: object) -> None:
        await self._server.close(0)
        await self._serving

    def __getattr__(self, name: str) -> Any:
        """Every method that has no answer of its own here says nothing, as most of Kata's do."""

        async def empty(_ctx: CallContext, request: Any) -> Empty:
            await self._note(name, request)
            return Empty()

        if name.startswith("_"):
            raise AttributeError(name)
        return empty

    async def process(self, container_id: str, exec_id: str = "") -> PlainProcess:
        """The process, once it has been started."""
        async with self._called, asyncio.timeout(10):
            await self._called.wait_for(
                lambda: (exec_id or container_id) in self.containers.get(container_id, {})
            )
        process = self.containers[container_id][exec_id or container_id]
        await process.started.wait()
        return process

    async def _note(self, name: str, request: Any) -> None:
        async with self._called:
            self.calls.append((name, request))
            self._called.notify_all()

    def _find(self, request: Any) -> PlainProcess:
        if request.container_id not in self.containers:
            raise RpcError(Code.INVALID_ARGUMENT, "InvalidContainerId")
        name = request.exec_id or request.container_id
        if name not in self.containers[request.container_id]:
            missing = "InvalidExecId" if request.exec_id else "InitProcessNotFound"
            raise RpcError(Code.NOT_FOUND, missing)
        return self.containers[request.container_id][name]

    async def create_container(self, _ctx: CallContext, request: Any) -> Empty:
        process = PlainProcess(terminal=request.OCI.Process.Terminal)
        self.containers[request.container_id] = {request.container_id: process}
        await self._note("create_container", request)
        return Empty()

    async def start_container(self, _ctx: CallContext, request: Any) -> Empty:
        self.containers[request.container_id][request.container_id].started.set()
        await self._note("start_container", request)
        return Empty()

    async def remove_container(self, _ctx: CallContext, request: Any) -> Empty:
        self.containers.pop(request.container_id, None)
        await self._note("remove_container", request)
        return Empty()

    async def exec_process(self, _ctx: CallContext, request: Any) -> Empty:
        if request.process.Args[0] == "/nonexistent":
            raise RpcError(Code.INTERNAL, "No such file or directory (os error 2)")
        process = PlainProcess(terminal=request.process.Terminal)
        process.started.set()
        self.containers[request.container_id][request.exec_id] = process
        await self._note("exec_process", request)
        return Empty()

    async def signal_process(self, _ctx: CallContext, request: Any) -> Empty:
        """An empty exec id is everybody for SIGKILL, the init for every other signal."""
        await self._note("signal_process", request)
        if not request.exec_id and request.signal == 9:
            for process in self.containers[request.container_id].values():
                process.exit(128 + 9)
        else:
            self._find(request).exit(128 + request.signal)
        return Empty()

    async def wait_process(self, _ctx: CallContext, request: Any) -> Any:
        process = self._find(request)
        status = await asyncio.shield(process.exited)
        processes = self.containers.get(request.container_id, {})
        for name in [name for name, one in processes.items() if one is process]:
            del processes[name]
        await self._note("wait_process", request)
        return agent_pb2.WaitProcessResponse(status=status)

    async def read_stdout(self, _ctx: CallContext, request: Any) -> Any:
        data = await self._find(request).read("stdout", request.len)
        return agent_pb2.ReadStreamResponse(data=data)

    async def read_stderr(self, _ctx: CallContext, request: Any) -> Any:
        data = await self._find(request).read("stderr", request.len)
        return agent_pb2.ReadStreamResponse(data=data)

    async def write_stdin(self, _ctx: CallContext, request: Any) -> Any:
        process = self._find(request)
        if process.stdin_closed.is_set():
            raise RpcError(Code.INTERNAL, "cannot get writer")
        process.stdin += request.data
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    async def close_stdin(self, _ctx: CallContext, request: Any) -> Empty:
        self._find(request).stdin_closed.set()
        return Empty()

    async def tty_win_resize(self, _ctx: CallContext, request: Any) -> Empty:
        self._find(request).window = (request.row, request.column)
        return Empty()

    async def stats_container(self, _ctx: CallContext, request: Any) -> Any:
        if request.container_id not in self.containers:
            raise RpcError(Code.INVALID_ARGUMENT, "invalid container id")
        answer = agent_pb2.StatsContainerResponse()
        answer.cgroup_stats.memory_stats.usage.usage = 4096
        return answer

    async def get_oom_event(self, _ctx: CallContext, _request: Any) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            return agent_pb2.OOMEvent(container_id=await self.oom.get())
        raise RpcError(Code.CANCELLED, "the agent ends")

    async def get_guest_details(self, _ctx: CallContext, request: Any) -> Any:
        await self._note("get_guest_details", request)
        details = agent_pb2.AgentDetails(version="4.1.0", extra_features=["seccomp"])
        return agent_pb2.GuestDetailsResponse(agent_details=details)

    async def get_diagnostic_data(self, _ctx: CallContext, request: Any) -> Any:
        raise RpcError(Code.INVALID_ARGUMENT, f"unsupported diagnostic log_type: {request.log_type}")

    async def check(self, _ctx: CallContext, _request: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def version(self, _ctx: CallContext, _request: Any) -> Any:
        return health_pb2.VersionCheckResponse(grpc_version="0.0.1", agent_version="4.1.0")
