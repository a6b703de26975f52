"""What is fuzzed: one function for each reader of foreign bytes.

What: `TARGETS` maps a name to a function of bytes. It returns, or raises what the reader does not promise.
Why no mocks of the readers: each target calls what the product calls, with the same limits.
Invariants: a target touches no file of the host that its input names, starts nothing, and leaves nothing;
the same input does the same thing.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.message import DecodeError

from devices.errors import KataError
from devices.frames import FrameReader
from devices.plain import plain, plain_lines
from devices.tail import TailBuffer
from proto import agent_pb2, oci_pb2
from shim.launch import bootstrap, flags
from shim.protocols import Deadlines, GuestContainer
from shim.resources.network import resolver
from shim.resources.network.relay import Frames
from shim.sandbox.agent_client import GuestAgent
from shim.state.trace import Trace
from shim.tasks.stats import to_any
from ttrpc import Code, RemoteProtocolError, RpcError
from ttrpc._connection import ClientConnection, ServerConnection
from ttrpc._events import EndReceived, RequestReceived, StreamFailed
from ttrpc._state import State

__all__ = ["TARGETS", "Target"]

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}
"""By name, in the order of the definitions."""


def target(function: Target) -> Target:
    """Enter it into TARGETS: `journal` becomes "journal", `config_json` "config-json"."""
    TARGETS[function.__name__.replace("_", "-")] = function
    return function


_loop: asyncio.AbstractEventLoop | None = None


def run(work: Any) -> Any:
    """Await `work` on a loop that lasts: making one takes longer than most targets."""
    global _loop  # noqa: PLW0603
    if _loop is None:
        _loop = asyncio.new_event_loop()
    return _loop.run_until_complete(work)


def pieces(data: bytes) -> Iterator[bytes]:
    """`data` in portions whose sizes its first bytes say: how a peer cuts its bytes must not matter."""
    sizes = [1 + size for size in data[:4]] or [1]
    at, turn = 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        yield data[at : at + size]
        at, turn = at + size, turn + 1


# --- ttrpc, both sides


@target
def ttrpc_server(data: bytes) -> None:
    """What anybody who reached the shim's socket may send; every request is answered."""
    connection = ServerConnection()
    with contextlib.suppress(RemoteProtocolError):
        for piece in pieces(data):
            for event in connection.receive(piece):
                if isinstance(event, StreamFailed):
                    connection.reject(event)
                elif isinstance(event, RequestReceived) and not event.is_open:
                    connection.send_response(event.stream_id, event.payload[:100])
                elif isinstance(event, EndReceived) and connection.state(event.stream_id) is not State.DONE:
                    connection.send_error(event.stream_id, Code.UNIMPLEMENTED, event.__class__.__name__)
    with contextlib.suppress(RemoteProtocolError):
        connection.receive_eof()


@target
def ttrpc_client(data: bytes) -> None:
    """What a guest's agent may answer while four calls wait."""
    connection = ClientConnection()
    for number in range(4):
        connection.send_request("grpc.AgentService", f"M{number}", b"")
    with contextlib.suppress(RemoteProtocolError):
        for piece in pieces(data):
            for _event in connection.receive(piece):
                pass
    with contextlib.suppress(RemoteProtocolError):
        connection.receive_eof()


# --- the agent's answers


class _Answers:
    """A client whose every call is answered with the same bytes, or an error with them as its text."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def call(self, method: Any, _request: Any, **_options: Any) -> Any:
        if self._data[:1] == b"\xff":
            code = Code.of(self._data[1] % 20) if len(self._data) > 1 else Code.UNKNOWN
            raise RpcError(code, self._data[2:].decode("utf-8", "replace"))
        answer = method.output_type._concrete_class()
        try:
            answer.ParseFromString(self._data)
        except DecodeError as error:
            raise RpcError(Code.INTERNAL, str(error)) from error
        return answer


_DEADLINES, _TRACE = Deadlines(), Trace("fuzz")


def _calls(agent: GuestAgent) -> list[Callable[[], Any]]:
    return [
        lambda: agent.check(1.0),
        lambda: agent.create_container("c", GuestContainer(spec=oci_pb2.Spec(), beyond={"a": 1})),
        lambda: agent.wait_process("c", "e"),
        lambda: agent.write_stdin("c", "e", b"some"),
        lambda: agent.read_stdout("c", "e", 100),
        lambda: agent.stats_container("c"),
        lambda: agent.list_processes("c"),
        agent.memory_block_size,
        agent.memory_available,
        lambda: agent.volume_stats("/v"),
        agent.get_oom_event,
    ]


@target
def agent(data: bytes) -> None:
    """Whatever the agent answers to whichever call: a value in its bounds or a KataError."""
    guest = GuestAgent(_Answers(data[1:]), _DEADLINES, _TRACE)  # type: ignore[arg-type]
    calls = _calls(guest)
    try:
        answer = run(calls[data[0] % len(calls)]()) if data else None
    except KataError as error:
        assert str(error).isprintable(), "it ends in a log and on a terminal"
        return
    if isinstance(answer, agent_pb2.StatsContainerResponse):
        for unified in (False, True):
            to_any(answer, unified=unified)


# --- streams


@target
def stdio_frames(data: bytes) -> None:
    """A process's output as the guest frames it: however it is cut, the same bytes come out."""

    def read(parts: Iterator[bytes]) -> bytes:
        reader = FrameReader()
        return b"".join(bytes(part) for piece in parts for part in reader.payloads(memoryview(piece)))

    whole = read(iter([data]))
    assert whole == read(pieces(data))
    assert len(whole) <= len(data)


@target
def loopback_frames(data: bytes) -> None:
    """A connection of the guest's loopback as the guest frames it: however it is cut, the same comes out."""

    def read(parts: Iterator[bytes]) -> tuple[bytes, int, bool]:
        reader = Frames()
        found = b"".join(bytes(part) for piece in parts for part in reader.payloads(memoryview(piece)))
        return found, reader.ends, reader.broken

    whole = read(iter([data]))
    assert whole == read(pieces(data))
    assert len(whole[0]) <= len(data)
    assert whole[1] <= 2 or whole[2]


@target
def name_questions(data: bytes) -> None:
    """What the guest asks name servers: one of those that it was given, a message of DNS, or the end."""

    async def read(ours: socket.socket) -> None:
        while True:
            _, address, _, question = await resolver.read_question(ours, ("127.0.0.1", "127.0.0.11"))
            assert address in ("127.0.0.1", "127.0.0.11")
            assert 0 < len(question) <= resolver.MESSAGE

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(data[: 64 << 10])
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            run(read(ours))


@target
def console(data: bytes) -> None:
    """A guest's console: what is shown of it is printable, and no more than is kept."""
    buffer = TailBuffer(4096)
    for piece in pieces(data):
        buffer.write(piece)
    assert len(buffer) <= 4096
    lines = buffer.lines()
    assert all(line.isprintable() and line.strip() for line in lines)
    assert buffer.tail(3) == "\n".join(lines[-3:])
    text = data.decode("utf-8", "surrogateescape")
    clean = plain(text)
    assert clean.isprintable()
    assert plain(clean) == clean
    assert plain_lines(text) == [plain(line.rstrip("\r")) for line in text.split("\n")]


# --- the bundle, and what containerd gives to `start`


@target
def bootstrap_params(data: bytes) -> None:
    """The stdin of `start`: ignored where it is nothing we know."""
    options = bootstrap.decode(data)
    assert "\0" not in options.config_path + options.shim_cgroup + options.socket_dir
    bootstrap.answer("unix:///run/containerd/s/0", options)


@target
def command_line(data: bytes) -> None:
    """The arguments of the program."""
    words = data.decode("utf-8", "surrogateescape").split("\n")[:40]
    try:
        found = flags.parse(words)
        found.check()
    except flags.FlagError:
        return
    assert "/" not in found.id + found.namespace


# --- for those that read files


_scratch: str = ""


def scratch(name: str, data: bytes) -> str:
    """The path of a file with this content, in a directory of the process, which goes with it."""
    global _scratch  # noqa: PLW0603
    if not _scratch:
        _scratch = tempfile.mkdtemp(prefix="kata-fuzz-")
        atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
    path = os.path.join(_scratch, name)
    with open(path, "wb") as file:
        file.write(data)
    return path


def directory(name: str, data: bytes) -> str:
    """A directory in which a file of this name has this content."""
    return os.path.dirname(scratch(name, data))


def mapping(data: bytes) -> Mapping[str, Any] | None:
    """The JSON object in `data`, if there is one."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
