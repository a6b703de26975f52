"""A guest with its agent, driven without the shim: containers by the agent's own calls.

What: `Guest` starts containers and execs in a VM that something else booted, and reads their streams.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from proto import agent_pb2 as agent
from proto import health_pb2 as health
from proto import oci_pb2 as oci
from ttrpc import Client, RpcError

__all__ = [
    "SHARED",
    "STREAM_PORT",
    "Connects",
    "Guest",
    "Running",
    "fill_share",
    "make_spec",
    "read_all",
    "read_some",
    "sandbox_request",
]

SHARED = "/run/kata-containers/shared/containers"
STREAM_PORT = 1029
APPLETS = (
    *("sh", "cat", "cp", "dd", "df", "echo", "env", "false", "grep", "head", "hostname", "id", "kill", "ls"),
    *("mkdir", "mount", "ps", "pwd", "readlink", "seq", "sleep", "stat", "stty", "tail", "test", "touch"),
    *("true", "uname", "wc", "yes"),
)
CAPABILITIES = ("CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID")
MOUNTS = (
    ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
    ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
    ("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
    ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
    ("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", "ro"]),
)


def make_spec(*args: str, terminal: bool = False) -> oci.Spec:
    """About what containerd's default spec is after the shim's translation."""
    spec = oci.Spec(Version="1.1.0", Hostname="box")
    spec.Process.Args.extend(args)
    spec.Process.Env.append("PATH=/bin")
    spec.Process.Cwd = "/"
    spec.Process.Terminal = terminal
    for kind in ("Bounding", "Effective", "Permitted"):
        getattr(spec.Process.Capabilities, kind).extend(CAPABILITIES)
    spec.Root.Path = f"{SHARED}/passthrough/busybox/rootfs"
    for destination, fstype, source, options in MOUNTS:
        spec.Mounts.add(destination=destination, type=fstype, source=source, options=options)
    for kind in ("pid", "ipc", "uts", "mount", "cgroup"):
        spec.Linux.Namespaces.add(Type=kind)
    spec.Linux.MaskedPaths.append("/proc/kcore")
    spec.Linux.ReadonlyPaths.append("/proc/sys")
    return spec


class Running:
    """A started process: its streams and its ids."""

    def __init__(
        self, guest: Guest, container: str, exec_id: str, streams: list[socket.socket | None]
    ) -> None:
        self.guest = guest
        self.id = container
        self.exec_id = exec_id
        self.stdin, self.stdout, self.stderr = streams

    async def send(self, data: bytes, *, end: bool = True) -> None:
        """Write to stdin, and end it."""
        assert self.stdin is not None
        loop = asyncio.get_running_loop()
        for at in range(0, len(data), 65536):
            part = data[at : at + 65536]
            await loop.sock_sendall(self.stdin, len(part).to_bytes(4, "big") + part)
        if end:
            await loop.sock_sendall(self.stdin, bytes(4))

    async def wait(self) -> int:
        """The exit code."""
        request = agent.WaitProcessRequest(container_id=self.id, exec_id=self.exec_id)
        answer: agent.WaitProcessResponse = await self.guest.agent.wait_process(request)
        return answer.status

    async def finish(self) -> tuple[int, bytes, bytes]:
        """(exit code, stdout, stderr), all read to their ends."""
        code, out, err = await asyncio.gather(self.wait(), read_all(self.stdout), read_all(self.stderr))
        return code, out, err

    def close(self) -> None:
        """Close the streams."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()


async def read_some(stream: socket.socket) -> bytes:
    """One frame; b"" is the end."""

    async def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = await asyncio.get_running_loop().sock_recv(stream, count - len(data))
            assert part, "the stream broke off"
            data += part
        return bytes(data)

    return await exactly(int.from_bytes(await exactly(4), "big"))


async def read_all(stream: socket.socket | None) -> bytes:
    """Everything, then close, as the host does."""
    if stream is None:
        return b""
    result = bytearray()
    async with asyncio.timeout(60):
        while part := await read_some(stream):
            result += part
    stream.close()
    return bytes(result)


class Connects(Protocol):
    """A VM whose vsock ports can be called."""

    async def connect(self, port: int) -> tuple[socket.socket, int]:
        """See `GuestVM.connect`."""
        ...


class Guest:
    """One VM, its agent, and what the tests made in it."""

    def __init__(self, vm: Connects, client: Client) -> None:
        self.vm = vm
        self.agent: Any = client.stub(agent.DESCRIPTOR.services_by_name["AgentService"], default_timeout=60)
        self.health: Any = client.stub(health.DESCRIPTOR.services_by_name["Health"], default_timeout=60)
        self._streams = itertools.count(1)
        self._names = itertools.count(1)
        self._open_streams: list[socket.socket] = []

    async def stream(self) -> tuple[socket.socket, int]:
        """A new stdio connection, which has named itself."""
        number = next(self._streams)
        connection, _ = await self.vm.connect(STREAM_PORT)
        connection.send(number.to_bytes(4, "big"))
        self._open_streams.append(connection)
        return connection, number

    def close(self) -> None:
        """Close what the tests left open."""
        for connection in self._open_streams:
            connection.close()

    async def _open(self, wanted: Sequence[bool]) -> tuple[list[socket.socket | None], dict[str, Any]]:
        streams: list[socket.socket | None] = []
        ports: dict[str, Any] = {}
        for name, want in zip(("stdin", "stdout", "stderr"), wanted, strict=True):
            connection, number = await self.stream() if want else (None, 0)
            streams.append(connection)
            ports[f"{name}_port"] = number
        return streams, ports

    async def start(self, spec: oci.Spec, *, stdin: bool = False, **fields: Any) -> Running:
        """Create and start a container with all its streams; `fields` of CreateContainerRequest."""
        name = f"c{next(self._names)}"
        spec.Linux.CgroupsPath = spec.Linux.CgroupsPath or f"/test/{name}"
        streams, ports = await self._open((stdin, True, not spec.Process.Terminal))
        running = Running(self, name, "", streams)
        try:
            request = agent.CreateContainerRequest(container_id=name, OCI=spec, **ports, **fields)
            await self.agent.create_container(request)
            await self.agent.start_container(agent.StartContainerRequest(container_id=name))
        except RpcError:
            running.close()
            raise
        return running

    async def run(
        self, *args: str, spec: oci.Spec | None = None, stdin: bytes | None = None, **fields: Any
    ) -> tuple[int, bytes, bytes]:
        """A whole container: (exit code, stdout, stderr)."""
        running = await self.start(spec or make_spec(*args), stdin=stdin is not None, **fields)
        sending = running.send(stdin) if stdin is not None else asyncio.sleep(0)
        _, result = await asyncio.gather(sending, running.finish())
        running.close()
        await self.remove(running.id)
        return result

    async def exec(self, running: Running, *args: str, terminal: bool = False, **fields: Any) -> Running:
        """A further process in a container."""
        name = f"e{next(self._names)}"
        process = make_spec(*args, terminal=terminal).Process
        streams, ports = await self._open((terminal, True, not terminal))
        made = Running(self, running.id, name, streams)
        try:
            request = agent.ExecProcessRequest(
                container_id=running.id, exec_id=name, process=process, **ports, **fields
            )
            await self.agent.exec_process(request)
        except RpcError:
            made.close()
            raise
        return made

    async def signal(self, running: Running, number: int) -> None:
        """SignalProcess, to one process."""
        target = running.exec_id or running.id  # without one it would go to all of the container
        request = agent.SignalProcessRequest(container_id=running.id, exec_id=target, signal=number)
        await self.agent.signal_process(request)

    async def remove(self, name: str) -> None:
        """RemoveContainer."""
        await self.agent.remove_container(agent.RemoveContainerRequest(container_id=name))


def fill_share(share: Path) -> None:
    """One busybox root file system, where `make_spec` expects it."""
    rootfs = share / "passthrough/busybox/rootfs"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "run", "data"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", rootfs / "bin/busybox")
    for applet in APPLETS:
        (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (rootfs / "bin/notexec").write_text("text\n")


def sandbox_request() -> agent.CreateSandboxRequest:
    """What the shim sends."""
    storages = [
        agent.Storage(
            driver="virtio-fs",
            source="kataShared",
            fstype="virtiofs",
            options=["nodev"],
            mount_point=f"{SHARED}/",
        ),
        agent.Storage(
            driver="ephemeral",
            source="shm",
            fstype="tmpfs",
            options=["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"],
            mount_point="/run/kata-containers/sandbox/shm",
        ),
    ]
    return agent.CreateSandboxRequest(
        hostname="pod", sandbox_id="s1", dns=["nameserver 192.0.2.1"], storages=storages
    )
