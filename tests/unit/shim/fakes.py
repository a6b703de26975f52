"""A guest without a VM: a `Sandbox` and an `AgentClient` whose processes are played by the test.

Each process of the guest is a `GuestProcess`: the test writes its output, reads its stdin and lets
it exit. Streams are real socket pairs, so what is copied and when it ends is what the shim really
does. The agent answers illegal requests with the errors of the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import any_pb2

from devices.errors import CallerError, GuestError
from devices.frames import END, FRAME_MAX, FrameReader
from devices.undo import MemoryUndo
from proto import agent_pb2, oci_pb2, task_v2_pb2
from shim.api.task_service import TaskService
from shim.protocols import GuestContainer, HostUsage, RootfsMount
from shim.protocols import GuestProcess as InGuest
from shim.spec.documents import load_spec
from shim.spec.limits import Size, wanted
from shim.tasks.container_manager import ContainerManager
from ttrpc import snake_case

__all__ = [
    "VMM_PID",
    "FakeAgent",
    "FakeRuntime",
    "FakeSandbox",
    "GuestProcess",
    "Recorder",
    "TaskClient",
    "make_bundle",
    "open_descriptors",
]

VMM_PID = 4242


def make_bundle(directory: Path, spec: Mapping[str, Any] | None = None) -> str:
    """A bundle with a config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(spec or {"process": {"args": ["true"]}}))
    return str(directory)


class Recorder:
    """An EventSink that keeps what was published."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def publish(self, topic: str, event: Any) -> None:
        self.events.append((topic.removeprefix("/tasks/"), event))

    @property
    def topics(self) -> list[str]:
        return [topic for topic, _ in self.events]

    def of(self, topic: str) -> list[Any]:
        return [event for name, event in self.events if name == topic]


@dataclass(eq=False)
class GuestProcess:
    """One process in the guest. `stdin`, `stdout` and `stderr` are the guest's socket ends, if any."""

    container_id: str
    exec_id: str
    ports: tuple[int, int, int]
    spec: Any
    streams: list[socket.socket | None] = field(default_factory=list)
    running: bool = False
    window: tuple[int, int] | None = None
    windows: list[tuple[int, int]] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    ignores: set[int] = field(default_factory=set)
    pieces: dict[str, asyncio.Queue[bytes]] = field(
        default_factory=lambda: {"stdout": asyncio.Queue(), "stderr": asyncio.Queue()}
    )
    written: bytearray = field(default_factory=bytearray)
    stdin_closed: bool = False
    exited: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def stdin(self) -> socket.socket:
        stream = self.streams[0]
        assert stream is not None
        return stream

    async def write(self, data: bytes, stream: int = 1) -> None:
        """Direct mode: output in frames; returns when all of it is in the connection."""
        sock = self.streams[stream]
        assert sock is not None
        for start in range(0, len(data), FRAME_MAX):
            piece = data[start : start + FRAME_MAX]
            frame = len(piece).to_bytes(4, "big") + piece
            await asyncio.get_running_loop().sock_sendall(sock, frame)

    async def read_stdin(self) -> bytes:
        """Direct mode: all of stdin until its end is said."""
        data, frames = bytearray(), FrameReader()
        while not frames.ended:
            piece = await asyncio.get_running_loop().sock_recv(self.stdin, FRAME_MAX)
            assert piece, "stdin was cut off"
            for payload in frames.payloads(memoryview(piece)):
                data += payload
        return bytes(data)

    def end_output(self) -> None:
        """The end of stdout and stderr, after what was written so far."""
        for sock in self.streams[1:]:
            if sock is not None and sock.fileno() >= 0:
                with contextlib.suppress(OSError):  # the host has gone, or does not read
                    sock.send(END)
        for queue in self.pieces.values():
            queue.put_nowait(b"")

    def exit(self, status: int, *, keep_streams: bool = False) -> None:
        """End, closing the output unless a background process is to hold it."""
        if not self.exited.done():
            self.exited.set_result(status)
        if not keep_streams:
            self.end_output()


class FakeAgent:
    """An AgentClient. `before[NAME]` is awaited at the beginning of each call of that name."""

    def __init__(self, sandbox: FakeSandbox) -> None:
        self._sandbox = sandbox
        self.processes: dict[tuple[str, str], GuestProcess] = {}
        self.containers: dict[str, GuestContainer] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        self.paused: set[str] = set()
        self.resources: list[Any] = []
        self.beyond: list[Mapping[str, Any]] = []  # of each exec and update
        self.stats = agent_pb2.StatsContainerResponse()
        self.stats_of: dict[str, agent_pb2.StatsContainerResponse] = {}
        self.children = 0  # processes of each container that the host did not start

    async def _enter(self, name: str, container_id: str, exec_id: str = "") -> None:
        self.calls.append((name, container_id, exec_id))
        if name in self.before:
            await self.before[name]()
        await asyncio.sleep(0)
        if self._sandbox.gone:
            raise GuestError("the connection to the agent ended", code="UNAVAILABLE")

    async def _while_alive(self, waiting: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait([task, self._sandbox.down], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise GuestError("the connection to the agent ended", code="UNAVAILABLE")
            return task.result()
        finally:
            if task is not waiting:
                task.cancel()

    def process(self, container_id: str, exec_id: str = "") -> GuestProcess:
        try:
            return self.processes[container_id, exec_id]
        except KeyError:
            raise CallerError("no such process", code="NOT_FOUND") from None

    def _add(self, container_id: str, exec_id: str, ports: tuple[int, int, int], spec: Any) -> GuestProcess:
        if (container_id, exec_id) in self.processes:
            raise CallerError("already exists", code="ALREADY_EXISTS")
        process = GuestProcess(container_id, exec_id, ports, spec)
        if any(ports):
            process.streams = [self._sandbox.streams.pop(port) if port else None for port in ports]
        self.processes[container_id, exec_id] = process
        return process

    async def create_container(
        self, container_id: str, guest: GuestContainer, *, ports: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        await self._enter("create_container", container_id)
        self._add(container_id, "", ports, guest.spec)
        self.containers[container_id] = guest

    async def start_container(self, container_id: str) -> None:
        await self._enter("start_container", container_id)
        process = self.process(container_id)
        if process.exited.done():
            raise GuestError("cannot start a container that has stopped")
        process.running = True

    async def remove_container(self, container_id: str) -> None:
        await self._enter("remove_container", container_id)
        if container_id not in self.containers:
            raise CallerError("no such container", code="NOT_FOUND")
        del self.containers[container_id]
        for key in [key for key in self.processes if key[0] == container_id]:
            self.processes.pop(key).exit(137)

    async def exec_process(
        self,
        container_id: str,
        exec_id: str,
        process: oci_pb2.Process,
        *,
        ports: tuple[int, int, int] = (0, 0, 0),
        beyond: Mapping[str, Any] | None = None,
    ) -> None:
        self.beyond.append(beyond or {})
        await self._enter("exec_process", container_id, exec_id)
        if self.process(container_id).exited.done():
            raise GuestError("the container has stopped")
        if list(process.Args) == ["missing"]:
            raise GuestError("exec: missing: executable file not found in $PATH", code="NOT_FOUND")
        self._add(container_id, exec_id, ports, process).running = True

    async def signal_process(self, container_id: str, exec_id: str, signal: int) -> None:
        """Without an exec id to everyone, with the container's own id to its init alone."""
        await self._enter("signal_process", container_id, exec_id)
        init = self.process(container_id)
        one = init if exec_id in ("", container_id) else self.process(container_id, exec_id)
        if one.exited.done():
            raise CallerError("no such process", code="NOT_FOUND")
        everyone = [process for key, process in self.processes.items() if key[0] == container_id]
        for process in [one] if exec_id else everyone:
            process.signals.append(signal)
            if signal and signal not in process.ignores:
                process.exit(128 + signal)
        if init.exited.done():
            self.end_execs(container_id, 137)

    def end_execs(self, container_id: str, status: int) -> None:
        """The end of a pid namespace."""
        for (container, exec_id), process in self.processes.items():
            if container == container_id and exec_id:
                process.exit(status)

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        await self._enter("wait_process", container_id, exec_id)
        status: int = await self._while_alive(self.process(container_id, exec_id).exited)
        return status

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int:
        await self._enter("write_stdin", container_id, exec_id)
        taken = data[: 16 << 10]  # like a pipe, not always all of it
        self.process(container_id, exec_id).written += taken
        return len(taken)

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        await self._enter("close_stdin", container_id, exec_id)
        self.process(container_id, exec_id).stdin_closed = True

    async def _read(self, container_id: str, exec_id: str, stream: str, size: int) -> bytes:
        await self._enter(f"read_{stream}", container_id, exec_id)
        piece: bytes = await self._while_alive(self.process(container_id, exec_id).pieces[stream].get())
        assert len(piece) <= size
        return piece

    async def read_stdout(self, container_id: str, exec_id: str, size: int) -> bytes:
        return await self._read(container_id, exec_id, "stdout", size)

    async def read_stderr(self, container_id: str, exec_id: str, size: int) -> bytes:
        return await self._read(container_id, exec_id, "stderr", size)

    async def reattach(self, container_id: str, exec_id: str, ports: tuple[int, int, int]) -> None:
        await self._enter("reattach", container_id, exec_id)
        process = self.process(container_id, exec_id)
        process.streams = [self._sandbox.streams.pop(port) if port else None for port in ports]
        if process.exited.done():
            process.end_output()

    async def tty_win_resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        await self._enter("tty_win_resize", container_id, exec_id)
        self.process(container_id, exec_id).windows.append((rows, columns))

    async def pause_container(self, container_id: str) -> None:
        await self._enter("pause_container", container_id)
        self.paused.add(container_id)

    async def resume_container(self, container_id: str) -> None:
        await self._enter("resume_container", container_id)
        self.paused.discard(container_id)

    async def stats_container(self, container_id: str) -> agent_pb2.StatsContainerResponse:
        await self._enter("stats_container", container_id)
        answer = agent_pb2.StatsContainerResponse()
        answer.CopyFrom(self.stats_of.get(container_id, self.stats))
        return answer

    async def list_processes(self, container_id: str) -> list[InGuest]:
        await self._enter("list_processes", container_id)
        known = [
            key[1] for key, process in self.processes.items() if key[0] == container_id and process.running
        ]
        return [InGuest(pid, exec_id) for pid, exec_id in enumerate([*known, *[None] * self.children], 7)]

    async def update_container(
        self,
        container_id: str,
        resources: oci_pb2.LinuxResources,
        *,
        beyond: Mapping[str, Any] | None = None,
    ) -> None:
        self.beyond.append(beyond or {})
        await self._enter("update_container", container_id)
        self.resources.append(resources)


class FakeSandbox:
    """A Sandbox. `fail[NAME]` is raised by the method of that name; `before[NAME]` is awaited in it."""

    def __init__(self, sandbox_id: str, *, direct: bool = True) -> None:
        self._id = sandbox_id
        self._direct = direct
        loop = asyncio.get_running_loop()
        self._died: asyncio.Future[str] = loop.create_future()
        self.down: asyncio.Future[None] = loop.create_future()
        self._agent = FakeAgent(self)
        self._ports = itertools.count(5000)
        self.streams: dict[int, socket.socket] = {}
        self.opened: list[socket.socket] = []
        self.prepared: set[str] = set()
        self.started = False
        self.stopped = False
        self.log: list[str] = []
        self.phases: list[tuple[str, str, float, float]] = []
        self.sizes: list[tuple[str, Size]] = []
        self.pod = False
        self.kill_limit = 60.0
        self.unresponsive = False
        self.doubts: list[str] = []
        self.usage = HostUsage()
        self.fail: dict[str, Exception] = {}
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}

    @property
    def id(self) -> str:
        return self._id

    @property
    def agent(self) -> FakeAgent:
        return self._agent

    @property
    def vmm_pid(self) -> int:
        assert self.started
        return VMM_PID

    def mark(self, phase: str, id: str, start: float, end: float) -> None:  # noqa: A002
        self.phases.append((phase, id, start, end))

    @property
    def died(self) -> asyncio.Future[str]:
        return self._died

    @property
    def direct_stdio(self) -> bool:
        return self._direct

    @property
    def gone(self) -> bool:
        return self.down.done()

    async def _enter(self, name: str) -> None:
        self.log.append(name)
        if name in self.before:
            await self.before[name]()
        await asyncio.sleep(0)
        if name in self.fail:
            raise self.fail[name]

    async def start(self) -> None:
        await self._enter("start")
        self.started = True

    async def prepare_container(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], rootfs: Sequence[RootfsMount]
    ) -> GuestContainer:
        self.prepared.add(container_id)
        await self._enter("prepare_container")
        return GuestContainer(spec=oci_pb2.Spec())

    async def container_starting(self, container_id: str) -> None:
        pass

    async def container_started(self, container_id: str) -> None:
        await asyncio.sleep(0)

    async def release_container(self, container_id: str) -> None:
        await self._enter("release_container")
        self.prepared.discard(container_id)

    @property
    def is_pod(self) -> bool:
        return self.pod

    async def host_usage(self) -> HostUsage:
        await self._enter("host_usage")
        return self.usage

    async def resize(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        await self._enter("resize")
        self.sizes.append((container_id, wanted(resources)))

    async def open_stream(self) -> tuple[socket.socket, int]:
        await self._enter("open_stream")
        host, guest = socket.socketpair()
        host.setblocking(False)
        guest.setblocking(False)
        port = next(self._ports)
        self.streams[port] = guest
        self.opened.append(guest)
        return host, port

    async def stop(self) -> None:
        await self._enter("stop")
        self.stopped = True
        self._end()

    def doubt(self, why: str) -> None:
        self.doubts.append(why)
        self.unresponsive = True

    def die(self, reason: str = "killed by signal 9") -> None:
        """The VM goes without anybody having asked."""
        self._died.set_result(reason)
        self._end()

    def _end(self) -> None:
        if not self.down.done():
            self.down.set_result(None)
        self.close()

    def close(self) -> None:
        """The guest's descriptors."""
        for sock in self.opened:
            sock.close()


class FakeRuntime:
    """A Runtime with one sandbox at a time, made by the first container or named by `pod`."""

    def __init__(self, *, pod: str = "", direct: bool = True) -> None:
        self._pod = pod
        self._direct = direct
        self.sandbox: FakeSandbox | None = None
        self.sandboxes: list[FakeSandbox] = []
        self.prepare: Callable[[FakeSandbox], None] = lambda _: None

    async def load_spec(self, bundle: str) -> dict[str, Any]:
        return load_spec(bundle)[0]

    async def sandbox_for(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], options: any_pb2.Any
    ) -> FakeSandbox:
        if self.sandbox is None or self.sandbox.stopped:
            self.sandbox = FakeSandbox(self._pod or container_id, direct=self._direct)
            self.sandbox.pod = bool(self._pod)
            self.sandboxes.append(self.sandbox)
            self.prepare(self.sandbox)
        return self.sandbox

    def close(self) -> None:
        for sandbox in self.sandboxes:
            sandbox.close()


def open_descriptors() -> set[int]:
    """The descriptors of this process, without the one that lists them."""
    return {int(name) for name in os.listdir("/proc/self/fd")}


class TaskClient:
    """The service as a client sees it: one method per RPC, requests made from keywords.

    `await client.exec(id="c", exec_id="e", args=["sh"])` and the like; a refused call raises its
    KataError, whose `code` is what goes on the wire.
    """

    def __init__(self, directory: Path, *, pod: str = "", direct: bool = True, messages: Any = task_v2_pb2):
        self.directory = directory
        self.runtime = FakeRuntime(pod=pod, direct=direct)
        self.events = Recorder()
        self.undo = MemoryUndo()
        self.manager = ContainerManager(self.runtime, self.events, namespace="default", undo=self.undo)
        self.shutdowns = 0
        self.shut_down = asyncio.Event()
        self.service = TaskService(self.manager, self._shut_down)
        self.messages = messages

    def _shut_down(self) -> None:
        self.shutdowns += 1
        self.shut_down.set()

    @property
    def sandbox(self) -> FakeSandbox:
        assert self.runtime.sandbox is not None
        return self.runtime.sandbox

    @property
    def agent(self) -> FakeAgent:
        return self.sandbox.agent

    def guest(self, container_id: str = "c", exec_id: str = "") -> GuestProcess:
        return self.agent.process(container_id, exec_id)

    async def call(self, rpc: str, **fields: Any) -> Any:
        method = task_v2_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name[rpc]
        request = getattr(self.messages, method.input_type.name)(**fields)
        return await getattr(self.service, snake_case(rpc))(None, request)

    async def create(self, container_id: str = "c", **fields: Any) -> Any:
        bundle = make_bundle(self.directory / container_id)
        return await self.call("Create", id=container_id, bundle=bundle, **fields)

    async def exec(self, container_id: str = "c", exec_id: str = "e", **fields: Any) -> Any:
        process = {"args": fields.pop("args", ["sh"]), "cwd": "/"}
        spec = any_pb2.Any(type_url="types.containerd.io/opencontainers/runtime-spec/1/Process")
        spec.value = json.dumps(process).encode()
        return await self.call("Exec", id=container_id, exec_id=exec_id, spec=spec, **fields)

    async def start(self, container_id: str = "c", exec_id: str = "") -> Any:
        return await self.call("Start", id=container_id, exec_id=exec_id)

    async def state(self, container_id: str = "c", exec_id: str = "") -> Any:
        return await self.call("State", id=container_id, exec_id=exec_id)

    async def wait(self, container_id: str = "c", exec_id: str = "") -> Any:
        return await self.call("Wait", id=container_id, exec_id=exec_id)

    async def kill(
        self, container_id: str = "c", exec_id: str = "", signal: int = 9, everyone: bool = False
    ) -> Any:
        return await self.call("Kill", id=container_id, exec_id=exec_id, signal=signal, all=everyone)

    async def delete(self, container_id: str = "c", exec_id: str = "") -> Any:
        return await self.call("Delete", id=container_id, exec_id=exec_id)

    async def close(self) -> None:
        await self.manager.close()
        self.runtime.close()
