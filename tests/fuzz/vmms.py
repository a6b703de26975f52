"""The targets that read what a VMM, or a daemon beside it, says: after a guest broke out into it, anything.

What: enters them into `targets.TARGETS`. Replies come over a socket as they would; what is taken out of a
reply is also tried with a QEMU that answers the right command with any value.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import socket
from collections.abc import Iterator
from functools import cache
from typing import Any

from devices import foreign_json
from devices.addresses import PciTopology
from devices.config import BlockConfig
from devices.errors import KataError
from devices.vsock import HybridVsock
from hypervisors.cloud_hypervisor.events import LIMIT, Events
from hypervisors.config import HypervisorConfig
from hypervisors.dragonball.talk import Talk
from hypervisors.firecracker.report import Report
from hypervisors.http_api import HttpApi
from hypervisors.qemu import events
from hypervisors.qemu.disks import update_disk
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.qmp import QmpClient, QmpError
from hypervisors.qemu.sizing import Sizer
from tests.fuzz.targets import directory, run, target

__all__: list[str] = []


@target
def qmp(data: bytes) -> None:
    """What a QEMU that a guest took over may write on its control socket."""
    run(_qmp(data))


async def _qmp(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.send(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            client = await QmpClient.connect(ours, timeout=5)
        except KataError:
            return
        try:
            for _ in range(3):
                await client.execute("query-status", timeout=5)
        except KataError:
            return
        finally:
            await client.close()


@target
def firecracker(data: bytes) -> None:
    """Likewise a Firecracker's API."""
    run(_firecracker(data))


async def _firecracker(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    api = HttpApi("Firecracker", ours)
    with theirs:
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.send(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            for _ in range(2):
                await api.get("/", timeout=5)
        except KataError:
            return
        finally:
            await api.close()


class _Qemu:
    """Answers each command with the next value, whatever was asked; a text that begins with ! is a refusal.

    An object with an "event" is an event before the next answer; after the last value QEMU is gone.
    """

    def __init__(self, values: list[Any]) -> None:
        self._values = iter(values)
        self._expected: list[tuple[events.Match, asyncio.Future[Any]]] = []

    async def execute(self, command: str, _arguments: Any = None, **_options: Any) -> Any:
        for value in self._values:
            if isinstance(value, dict) and "event" in value:
                for match, awaited in self._expected:
                    if match(value) and not awaited.done():
                        awaited.set_result(value)
            elif isinstance(value, str) and value.startswith("!"):
                raise QmpError(command, value[1:], "no")
            else:
                return value
        raise QmpError(command, "GenericError", "it is gone")

    @contextlib.contextmanager
    def expect(self, match: events.Match) -> Iterator[asyncio.Future[Any]]:
        awaited: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        entry = match, awaited
        self._expected.append(entry)
        try:
            yield awaited
        finally:
            self._expected.remove(entry)
            awaited.cancel()


@cache
def _plan(virtio_mem: bool) -> Any:
    section = HypervisorConfig(
        default_memory=256,
        default_maxmemory=4096,
        default_maxvcpus=4,
        hotplug_timeout=0.0,
        enable_virtio_mem=virtio_mem,
    )
    return with_ports(first_plan(section, Accelerator.KVM, "vm"), PciTopology())


@target
def qmp_answers(data: bytes) -> None:
    """The first byte chooses what is done with QEMU's answers, which are a list of JSON."""
    try:
        values = foreign_json.loads(data[1:])
    except ValueError:
        return
    if isinstance(values, list):
        with contextlib.suppress(KataError):
            run(_with_answers(data[0], values))


async def _with_answers(what: int, values: list[Any]) -> None:
    client: Any = _Qemu(values)
    sizer = Sizer(_plan(what & 8 != 0), client)
    match what % 6:
        case 0:
            assert isinstance(await sizer.resize_vcpu(3), int)
        case 1:
            await sizer.resize_vcpu(3)
            await sizer.resize_vcpu(1)
        case 2:
            assert isinstance(await sizer.resize_memory(1024), int)
        case 3:
            await sizer.resize_memory(1024)
            await sizer.resize_memory(256)
        case 4:
            disk = BlockConfig(id="d", path="/dev/null")
            await update_disk(client, disk, disk)
        case _:
            matches = (events.deleted("d"), events.let_go("d"), events.size_is("d", 1), events.taken("d"))
            for value in values:
                if isinstance(value, dict):
                    assert all(isinstance(match(value), bool) for match in matches)


class _Api:
    """A Firecracker that takes every request, and writes a line of metrics then."""

    def __init__(self, report: Report, line: bytes) -> None:
        self._report, self._line = report, line

    async def put(self, _path: str, _body: Any, *, timeout: float) -> None:
        self._report._on_metrics(self._line)
        self._report._on_metrics(b"{}")


@target
def firecracker_metrics(data: bytes) -> None:
    """A line of Firecracker's metrics."""
    report = Report()
    found = run(report.metrics(_Api(report, data), os.getpid()))  # type: ignore[arg-type]
    assert all(isinstance(value, float) for value in found.values())


@target
def clh_events(data: bytes) -> None:
    """What Cloud Hypervisor says by itself, in two pieces."""
    run(_clh_events(data))


async def _clh_events(data: bytes) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    seen: list[tuple[str, str]] = []
    stream = Events(reader, lambda name, device: seen.append((name, device)))
    gone = stream.removal("disk")
    try:
        for piece in (data[:7], data[7 : 60 << 10], b"\n}\n"):
            os.write(writer, piece)
            stream.read()
        assert len(stream._partial) <= LIMIT
        assert gone.done() <= (("vm/device-removed", "disk") in seen)
    finally:
        stream.close()
        os.close(writer)


@target
def dragonball(data: bytes) -> None:
    """What the process around Dragonball says, in two pieces, while an action waits for its answer."""
    run(_dragonball(data))


async def _dragonball(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    talk = Talk(ours, lambda content: None)
    asked = asyncio.create_task(talk.ask("PauseMicroVm", timeout=5.0))
    try:
        await asyncio.sleep(0)
        for piece in (data[:7], data[7 : 60 << 10], b"\n"):
            with contextlib.suppress(BrokenPipeError):  # it has heard enough
                theirs.sendall(piece)
            talk.read()
            await asyncio.sleep(0)
        theirs.close()
        with contextlib.suppress(KataError):
            await asked
        with contextlib.suppress(KataError):
            await talk.hello(5.0)
    finally:
        asked.cancel()
        await talk.close()
        theirs.close()


_vsock: socket.socket | None = None


@target
def vsock_answer(data: bytes) -> None:
    """What stands behind a hybrid vsock's socket answers to CONNECT."""
    run(_connect(data))


async def _connect(data: bytes) -> None:
    global _vsock  # noqa: PLW0603
    path = os.path.join(directory("x", b""), "vsock")
    if _vsock is None:
        _vsock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        atexit.register(_vsock.close)
        _vsock.bind(path)
        _vsock.listen(4)
        _vsock.setblocking(False)
    channel = HybridVsock(path, home_call=False, tells_port=True)
    call = asyncio.create_task(channel.connect(1024, 5.0))
    there, _ = await asyncio.get_running_loop().sock_accept(_vsock)
    with there:
        there.send(data[:4000])
    try:
        ours, port = await call
        ours.close()
        assert port >= 0
    except KataError as error:
        assert len(str(error)) < 1000
    finally:
        await channel.close()
