"""containerd's gRPC API, as a client other than `ctr` uses it: one's own FIFOs, terminals, events.

What: `Api` creates tasks and execs whose stdio are FIFOs of ours, so that a test sees every byte and
every event in order; `ctr` drops what is still in the pipe when it deletes a task (containerd 1.6.20,
fixed in 1.6.22), and can neither resize at will nor subscribe.
How: the messages come from testing/proto, compiled when they are first used; no generated files.
Invariants: each call has a deadline; `close()` removes the FIFOs and ends the reader threads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import select
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc_tools
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

__all__ = ["Api", "Event", "Stdio", "Task", "message", "method"]

_PROTO = Path(__file__).parent / "proto"
_EVENTS = "containerd.services.events.v1.Events"
_MARK = "/testing/subscribed"


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    well_known = os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")
    with tempfile.NamedTemporaryFile(suffix=".pb") as out:
        code = protoc.main(
            [
                "protoc", f"-I{_PROTO}", f"-I{well_known}", "--include_imports",
                f"--descriptor_set_out={out.name}", *sorted(str(p) for p in _PROTO.glob("*.proto")),
            ]
        )  # fmt: skip
        if code:
            raise RuntimeError("the test protos do not compile")
        files = descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


def message(name: str) -> Any:
    """The class of the message with this full name."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


def method(service: str, name: str) -> tuple[str, Any, Any]:
    """(path, class of the request, class of the response) of a gRPC method."""
    described = _pool().FindServiceByName(service).methods_by_name[name]
    return (
        f"/{service}/{name}",
        message_factory.GetMessageClass(described.input_type),
        message_factory.GetMessageClass(described.output_type),
    )


class Event(tuple[str, Any]):  # noqa: SLOT001  (a tuple with slots can have no attribute)
    """(topic, message) of one event, and the `namespace` that it is of."""

    namespace: str = ""


class Stdio:
    """Three FIFOs. What a process writes is gathered by a thread; stdin is written by `write`.

    Like containerd's own clients we open all of them at once; of stdin the open ends when the shim reads.
    `wait_for` waits until a stream holds some bytes; `finish` until the writers are gone.
    """

    def __init__(self, directory: Path, *, terminal: bool = False, stdin: bool = True) -> None:
        directory.mkdir(mode=0o700, parents=True)
        self.directory = directory
        self.terminal = terminal
        self.stdin = str(directory / "stdin") if stdin else ""
        self.stdout = str(directory / "stdout")
        self.stderr = "" if terminal else str(directory / "stderr")
        self._condition = threading.Condition()
        self._data: dict[str, bytearray] = {}
        self._open: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._stdin_fd: int | None = None
        self._stdin_opening: threading.Thread | None = None
        self._stop_read, self._stop_write = os.pipe()
        for path in filter(None, (self.stdin, self.stdout, self.stderr)):
            os.mkfifo(path, 0o600)
        for path in filter(None, (self.stdout, self.stderr)):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self._data[path] = bytearray()
            self._open.add(path)
            thread = threading.Thread(target=self._gather, args=(path, fd), daemon=True)
            thread.start()
            self._threads.append(thread)
        if self.stdin:
            self._stdin_opening = threading.Thread(target=self._open_stdin, daemon=True)
            self._stdin_opening.start()

    def _open_stdin(self) -> None:
        fd = os.open(self.stdin, os.O_WRONLY)
        os.set_blocking(fd, False)
        self._stdin_fd = fd

    def _gather(self, path: str, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if self._stop_read in ready:
                    return
                try:
                    data = os.read(fd, 1 << 20)
                except BlockingIOError:
                    continue
                if not data:
                    # A FIFO without a writer yet does not poll readable on Linux, so this is its end.
                    return
                with self._condition:
                    self._data[path] += data
                    self._condition.notify_all()
        finally:
            os.close(fd)
            with self._condition:
                self._open.discard(path)
                self._condition.notify_all()

    @property
    def out(self) -> bytes:
        """What came through stdout so far."""
        with self._condition:
            return bytes(self._data[self.stdout])

    @property
    def err(self) -> bytes:
        """What came through stderr so far."""
        with self._condition:
            return bytes(self._data.get(self.stderr, b""))

    def wait_for(self, needle: bytes, timeout: float = 20, *, after: int = 0) -> bytes:
        """All of stdout once it holds `needle` behind offset `after`. Raises TimeoutError."""
        with self._condition:
            found = self._condition.wait_for(
                lambda: self._data[self.stdout].find(needle, after) >= 0, timeout
            )
            if not found:
                raise TimeoutError(f"no {needle!r} in {bytes(self._data[self.stdout][-2000:])!r}")
            return bytes(self._data[self.stdout])

    def finish(self, timeout: float = 30) -> tuple[bytes, bytes]:
        """(stdout, stderr) once their writers have closed them. Raises TimeoutError."""
        with self._condition:
            if not self._condition.wait_for(lambda: not self._open, timeout):
                raise TimeoutError(f"still open after {timeout} s: {sorted(self._open)}")
        return self.out, self.err

    def write(self, data: bytes, timeout: float = 60) -> None:
        """Write all of `data` to stdin, waiting for a reader and for room."""
        deadline = time.monotonic() + timeout
        if self._stdin_opening is not None:
            self._stdin_opening.join(timeout)
        while self._stdin_fd is None:
            try:
                self._stdin_fd = os.open(self.stdin, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # ENXIO: nobody reads yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        view = memoryview(data)
        while view:
            _, ready, _ = select.select([], [self._stdin_fd], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{len(view)} of {len(data)} bytes of stdin were not taken")
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._stdin_fd, view[: 1 << 16]) :]

    def detach_stdin(self) -> None:
        """Close our end of stdin, as a client that goes away does. No end of file for the process."""
        if self._stdin_opening is not None and self._stdin_opening.is_alive():
            os.close(os.open(self.stdin, os.O_RDONLY | os.O_NONBLOCK))  # lets it out of its open
            self._stdin_opening.join(10)
        self._stdin_opening = None
        if self._stdin_fd is not None:
            os.close(self._stdin_fd)
            self._stdin_fd = None

    def close(self) -> None:
        """End the threads and remove the FIFOs."""
        self.detach_stdin()
        os.close(self._stop_write)
        for thread in self._threads:
            thread.join(10)
        os.close(self._stop_read)
        for path in filter(None, (self.stdin, self.stdout, self.stderr)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            self.directory.rmdir()


class Task:
    """A task (exec_id empty) or an exec of it, with its stdio."""

    def __init__(self, api: Api, container: str, exec_id: str, stdio: Stdio) -> None:
        self.api = api
        self.container = container
        self.exec_id = exec_id
        self.io = stdio
        self.pid = 0

    def _call(self, method: str, *, timeout: float = 60, **fields: object) -> Any:
        if self.exec_id:
            fields["exec_id"] = self.exec_id
        return self.api.call(
            "containerd.services.tasks.v1.Tasks",
            method,
            timeout=timeout,
            container_id=self.container,
            **fields,
        )

    def start(self, timeout: float = 60) -> int:
        """Start the process; answers its pid."""
        self.pid = int(self._call("Start", timeout=timeout).pid)
        return self.pid

    def wait(self, timeout: float = 60) -> int:
        """The exit code, once there is one."""
        return int(self._call("Wait", timeout=timeout).exit_status)

    def state(self) -> Any:
        """The Process message: status, exit_status, terminal, ..."""
        return self._call("Get").process

    def kill(self, signal: int, *, everyone: bool = False) -> None:
        """Send a signal to the process, or to everyone in the container."""
        self._call("Kill", signal=int(signal), all=everyone)

    def resize(self, columns: int, rows: int) -> None:
        """Set the terminal's size."""
        self._call("ResizePty", width=columns, height=rows)

    def close_stdin(self) -> None:
        """Tell the shim that no more stdin will come; the process sees the end after the last byte."""
        self._call("CloseIO", stdin=True)

    def delete(self, timeout: float = 60) -> Any:
        """Delete the stopped process; answers pid, exit_status and exited_at."""
        if self.exec_id:
            answer = self._call("DeleteProcess", timeout=timeout)
        else:
            answer = self._call("Delete", timeout=timeout)
        self.io.close()
        return answer

    def exec(
        self,
        *args: str,
        exec_id: str,
        terminal: bool = False,
        stdin: bool = True,
        cwd: str = "/",
        env: tuple[str, ...] = ("PATH=/bin",),
        user: int = 0,
        fields: dict[str, Any] | None = None,
    ) -> Task:
        """Add a process to this container; it is not started yet. `fields`: more of its OCI process."""
        spec = {
            "args": list(args),
            "cwd": cwd,
            "env": list(env),
            "terminal": terminal,
            "user": {"uid": user, "gid": user},
            **(fields or {}),
        }
        stdio = Stdio(self.api.directory / f"{self.container}-{exec_id}", terminal=terminal, stdin=stdin)
        body = {
            "type_url": "types.containerd.io/opencontainers/runtime-spec/1/Process",
            "value": json.dumps(spec).encode(),
        }
        process = Task(self.api, self.container, exec_id, stdio)
        try:
            process._call(
                "Exec",
                stdin=stdio.stdin,
                stdout=stdio.stdout,
                stderr=stdio.stderr,
                terminal=terminal,
                spec=body,
            )
        except grpc.RpcError:
            stdio.close()
            raise
        return process


class Api:
    """A connection to one containerd. While that is away calls wait for it, as long as they may."""

    def __init__(self, address: str, namespace: str, directory: Path) -> None:
        self.directory = directory
        self._metadata = (("containerd-namespace", namespace),)
        self._channel = grpc.insecure_channel(
            f"unix://{address}",
            options=[
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, service: str, name: str, *, timeout: float = 60, **fields: object) -> Any:
        """One unary call. Raises grpc.RpcError, whose code() and details() say why."""
        path, request, response = method(service, name)
        stub = self._channel.unary_unary(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return stub(request(**fields), timeout=timeout, metadata=self._metadata, wait_for_ready=True)

    @contextlib.contextmanager
    def events(self) -> Iterator[Callable[[float], Event]]:
        """Subscribe; gives a function that answers the next event, or raises queue.Empty after a time.

        Inside, every event that containerd takes is seen: the subscription is tried out first.
        """
        path, request, response = method(_EVENTS, "Subscribe")
        stub = self._channel.unary_stream(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        stream = stub(request(), metadata=self._metadata, wait_for_ready=True)
        gathered: queue.Queue[Event] = queue.Queue()
        subscribed = threading.Event()

        def gather() -> None:
            with contextlib.suppress(grpc.RpcError):
                for envelope in stream:
                    if envelope.topic == _MARK:
                        subscribed.set()
                        continue
                    name = envelope.event.type_url.rpartition("/")[2]
                    with contextlib.suppress(KeyError):
                        event = Event((envelope.topic, message(name).FromString(envelope.event.value)))
                        event.namespace = envelope.namespace
                        gathered.put(event)

        thread = threading.Thread(target=gather, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not subscribed.is_set():  # nothing else tells that containerd has taken it
                if time.monotonic() > deadline:
                    raise TimeoutError("containerd does not deliver events")
                self.publish(_MARK)
                subscribed.wait(0.05)
            yield lambda timeout: gathered.get(timeout=timeout)
        finally:
            stream.cancel()
            thread.join(10)

    def publish(self, topic: str) -> None:
        """Publish an event of one's own: what was published before it has been delivered when it arrives."""
        event = {"type_url": "containerd.events.TaskPaused"}
        self.call(_EVENTS, "Publish", topic=topic, event=event)

    def patch_spec(self, container: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Let `change` edit the OCI spec of a container that `ctr container create` made."""
        service = "containerd.services.containers.v1.Containers"
        found = self.call(service, "Get", id=container).container
        spec = json.loads(found.spec.value)
        change(spec)
        found.spec.value = json.dumps(spec).encode()
        self.call(service, "Update", container=found, update_mask={"paths": ["spec"]})

    def task(
        self, container: str, *, terminal: bool = False, stdin: bool = True, timeout: float = 60
    ) -> Task:
        """Create (not start) the task of a container; its stdio are FIFOs of ours."""
        mounts = self.call(
            "containerd.services.snapshots.v1.Snapshots", "Mounts", snapshotter="overlayfs", key=container
        ).mounts
        stdio = Stdio(self.directory / container, terminal=terminal, stdin=stdin)
        try:
            self.call(
                "containerd.services.tasks.v1.Tasks",
                "Create",
                timeout=timeout,
                container_id=container,
                rootfs=mounts,
                stdin=stdio.stdin,
                stdout=stdio.stdout,
                stderr=stdio.stderr,
                terminal=terminal,
            )
        except grpc.RpcError:
            stdio.close()
            raise
        return Task(self, container, "", stdio)
