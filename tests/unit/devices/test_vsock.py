"""The agent's channel keeps the hybrid handshake's rules and its deadlines, and fails at once with the VM."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from devices import vsock
from devices.errors import GuestError, HostError, HypervisorError
from devices.vsock import HOME_PORT, STREAM_PORT, HybridVsock, KernelVsock, reserve_cid

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the daemon's side; the test's own time-out is the deadline."""
    while not condition():  # noqa: ASYNC110  (it has no event)
        await asyncio.sleep(0.005)


class Daemon:
    """A stand-in for vhost-device-vsock: one script per connection; counts who hung up too early."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.early: list[bytes] = []
        self.answer = b"OK 1024\n"
        self.then = b""
        self.gate = asyncio.Event()
        self.gate.set()
        self.hung_up = 0
        self.streams: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.streams.append(writer)
        self.lines.append(await reader.readline())
        waiting = asyncio.create_task(reader.read(1))
        opened = asyncio.create_task(self.gate.wait())
        await asyncio.wait({waiting, opened}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            self.hung_up += 1
            opened.cancel()
            writer.close()
            return
        writer.write(self.answer + self.then)
        if not self.answer:
            writer.close()
        byte = await waiting
        if byte:
            self.early.append(byte + await reader.read(100))
        writer.close()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    fake = Daemon(str(tmp_path / "v"))
    server = await asyncio.start_unix_server(fake.serve, fake.path)
    yield fake
    server.close()
    for writer in fake.streams:
        writer.close()
    await server.wait_closed()
    await asyncio.sleep(0)


async def test_connect_sends_one_line_and_leaves_the_rest_of_the_stream(daemon: Daemon) -> None:
    daemon.then = b"first words"
    channel = HybridVsock(daemon.path)
    sock, port = await channel.connect(1024, 5)

    assert daemon.lines == [b"CONNECT 1024\n"]
    assert port == 0  # the number after OK is the guest's, and no use
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"first words"
    assert not sock.getblocking()
    sock.close()
    await channel.close()


async def test_a_vmm_that_tells_the_port_is_believed(daemon: Daemon) -> None:
    daemon.answer = b"OK 1073741824\n"
    channel = HybridVsock(daemon.path, home_call=False, tells_port=True)
    sock, port = await channel.connect(1024, 5)

    assert port == 1 << 30
    sock.close()
    await channel.close()


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"\n", b"OK " + b"9" * 100])
async def test_other_answers_are_errors(daemon: Daemon, answer: bytes) -> None:
    daemon.answer = answer
    channel = HybridVsock(daemon.path)
    with pytest.raises(GuestError, match="cannot connect to port 77"):
        await channel.connect(77, 5)
    await channel.close()


async def test_no_daemon_is_an_error_at_once(tmp_path: Path) -> None:
    channel = HybridVsock(str(tmp_path / "v"))
    with pytest.raises(GuestError, match="cannot connect"):
        await channel.connect(1024, 5)
    await channel.close()


async def test_a_late_answer_finds_the_socket_open(daemon: Daemon) -> None:
    """vhost-device-vsock 0.3.0 panics or spins when the host hangs up before the answer."""
    daemon.gate.clear()
    channel = HybridVsock(daemon.path)
    with pytest.raises(GuestError, match=r"did not answer within 0.05 s"):
        await channel.connect(1024, 0.05)
    cancelled = asyncio.create_task(channel.connect(1024, 5))
    await until(lambda: len(daemon.lines) >= 2)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await asyncio.sleep(0.02)

    assert daemon.hung_up == 0
    before = len(os.listdir("/proc/self/fd"))
    daemon.gate.set()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before - 4)  # both ends of both
    assert daemon.early == []
    await channel.close()


async def test_a_guest_that_never_answers_costs_so_many_descriptors(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beyond wait for their turn, then are refused at once; an answer makes room again."""
    monkeypatch.setattr(vsock, "UNANSWERED", 5)
    daemon.gate.clear()
    channel = HybridVsock(daemon.path)
    before = len(os.listdir("/proc/self/fd"))
    answers = await asyncio.gather(*(channel.connect(1024, 0.1) for _ in range(30)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {GuestError}
    assert len(daemon.lines) == 5
    assert len(os.listdir("/proc/self/fd")) == before + 2 * 5  # both ends of each
    began = time.monotonic()
    with pytest.raises(GuestError, match="5 connections without an answer") as caught:
        await channel.connect(1024, 60)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert time.monotonic() - began < 30
    assert daemon.hung_up == 0

    daemon.gate.set()
    await until(lambda: not channel._parked)
    sock, _ = await channel.connect(1024, 5)
    sock.close()
    await channel.close()


async def test_a_burst_waits_for_its_turn(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "UNANSWERED", 5)
    channel = HybridVsock(daemon.path)
    for sock, _ in await asyncio.gather(*(channel.connect(1024, 20) for _ in range(50))):
        sock.close()
    assert len(daemon.lines) == 50
    await channel.close()


async def test_close_ends_parked_handshakes(daemon: Daemon) -> None:
    daemon.gate.clear()
    channel = HybridVsock(daemon.path)
    with pytest.raises(GuestError):
        await channel.connect(1024, 0.02)
    await channel.close()
    await until(lambda: daemon.hung_up > 0)


async def test_streams_are_named_by_four_bytes(daemon: Daemon) -> None:
    channel = HybridVsock(daemon.path)
    names = []
    for _ in range(3):
        sock, name = await channel.open_stream(5)
        names.append(name)
        sock.close()
    await until(lambda: len(daemon.early) >= 3)

    assert names == [1, 2, 3]
    assert daemon.lines == [f"CONNECT {STREAM_PORT}\n".encode()] * 3
    assert daemon.early == [b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\3"]
    await channel.close()


async def test_the_home_call_makes_it_ready(daemon: Daemon) -> None:
    channel = HybridVsock(daemon.path)
    home = f"{daemon.path}_{HOME_PORT}"
    assert channel.home_port == HOME_PORT
    ready = asyncio.create_task(channel.wait_ready(5))
    await asyncio.sleep(0.01)
    assert not ready.done()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(home)
        await ready
    await channel.wait_ready(5)  # and stays so

    assert not os.path.exists(home)
    assert daemon.lines == []  # nobody dialled a booting guest
    await channel.close()


async def test_an_agent_that_never_calls_is_told_with_the_console() -> None:
    channel = HybridVsock("/nonexistent", home_call=False)
    await channel.close()
    with pytest.raises(GuestError, match="closed"):
        await channel.wait_ready(1)


async def test_the_deadline_comes_with_evidence(tmp_path: Path) -> None:
    channel = HybridVsock(str(tmp_path / "v"), diagnostics=lambda: {"guest console": "stuck here"})
    with pytest.raises(GuestError, match=r"within 0.05 s") as caught:
        await channel.wait_ready(0.05)

    assert caught.value.phase == "boot"
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert "stuck here" in str(caught.value)
    await channel.close()


async def test_a_stock_agent_is_dialled_until_it_answers(daemon: Daemon) -> None:
    daemon.answer = b""
    channel = HybridVsock(daemon.path, home_call=False)
    ready = asyncio.create_task(channel.wait_ready(10))
    await until(lambda: len(daemon.lines) >= 2)
    daemon.answer = b"OK 1024\n"
    await ready

    assert channel.home_port == 0
    assert set(daemon.lines) == {b"CONNECT 1024\n"}
    await channel.close()


async def test_the_vms_death_fails_what_waits_and_what_comes(daemon: Daemon) -> None:
    daemon.gate.clear()
    channel = HybridVsock(daemon.path)
    waiting = [asyncio.create_task(channel.wait_ready(60)), asyncio.create_task(channel.connect(1024, 60))]
    await asyncio.sleep(0.02)
    channel.fail(lambda: HypervisorError("the VM is gone: qemu was killed by SIGKILL"))
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 1)

    assert [str(result) for result in results] == ["the VM is gone: qemu was killed by SIGKILL"] * 2
    with pytest.raises(HypervisorError, match="SIGKILL"):
        await channel.connect(1024, 1)
    await channel.close()


def test_a_host_without_vhost_vsock_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot open"):
        reserve_cid(str(tmp_path / "vhost-vsock"))


def test_a_device_that_refuses_a_cid_is_closed_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="refuses"):
        reserve_cid(str(tmp_path / "file"))

    assert len(os.listdir("/proc/self/fd")) == before


async def test_kernel_vsock_listens_on_a_port_of_its_own() -> None:
    try:
        one, two = KernelVsock(77), KernelVsock(78)
    except OSError:
        pytest.skip("this kernel has no AF_VSOCK")

    assert one.home_port not in (0, two.home_port)
    with pytest.raises(GuestError):
        await one.connect(1024, 0.5)
    with pytest.raises(GuestError, match=r"within 0.05 s"):
        await one.wait_ready(0.05)
    await one.close()
    await two.close()


async def test_a_link_in_the_sockets_place_leads_to_nobody(tmp_path: Path, daemon: Daemon) -> None:
    """A jailed VMM may write to its directory: no link of its own is another VM's agent."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/s").symlink_to(daemon.path)
    channel = HybridVsock(str(tmp_path / "mine/s"), home_call=False)
    with pytest.raises(GuestError):
        await channel.connect(1024, 5)
    await channel.close()
    assert daemon.lines == []
