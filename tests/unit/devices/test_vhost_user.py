"""A vhost-user back end: met at once, its end noticed, a mute one given up, its messages relayed whole."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from devices.errors import HostError
from devices.rendezvous import connect_now, listen
from devices.vhost_relay import FDS, LIMIT, Relay
from devices.vhost_user import BackEnd


def message(size: int, request: int = 1) -> bytes:
    """A message with a payload of so many bytes."""
    return struct.pack("=III", request, 1, size) + os.urandom(size)


@pytest.fixture(autouse=True)
def no_descriptors_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_back_end_that_is_not_there_is_told_with_its_path(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(HostError, match=rf"{path}: there is no such socket") as caught:
        BackEnd.connect(path)
    assert caught.value.hint
    listen(path).close()
    with pytest.raises(HostError, match="nobody listens there"):
        BackEnd.connect(path)
    with pytest.raises(HostError, match="AF_UNIX path too long"):
        BackEnd.connect(f"/{'x' * 200}")


async def test_one_that_does_not_accept_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen(path, backlog=0)
    first = connect_now(path)
    with pytest.raises(HostError, match="its queue is full"):
        BackEnd.connect(path)
    first.close()
    listener.close()


async def test_its_end_is_noticed_though_the_vmm_holds_the_connection(tmp_path: Path) -> None:
    """And what it says meanwhile is left for the VMM."""
    path = str(tmp_path / "s")
    listener = listen(path)
    back_end = BackEnd.connect(path)
    vmm = back_end.connection.dup()
    theirs, _ = listener.accept()
    theirs.sendall(b"words")
    await asyncio.sleep(0)
    assert not back_end.lost.done()
    assert vmm.recv(10) == b"words"
    theirs.close()
    async with asyncio.timeout(20):
        await back_end.lost
    await back_end.stop()
    await back_end.stop()
    vmm.close()
    listener.close()


async def test_giving_up_ends_the_vmms_wait_and_is_no_loss(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen(path)
    back_end = BackEnd.connect(path)
    vmm = back_end.connection.dup()
    back_end.abort()
    assert await asyncio.to_thread(vmm.recv, 10) == b""
    assert not back_end.lost.done()
    await back_end.stop()
    back_end.abort()
    vmm.close()
    listener.close()


class Ends:
    """A relay between two sockets of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.listener = listen(str(directory / "target"))
        self.relay = Relay.start(str(directory / "target"), str(directory / "relay"))
        self.back, _ = self.listener.accept()
        self.vmm = connect_now(self.relay.path)
        for sock in (self.back, self.vmm):
            sock.settimeout(20)

    async def close(self) -> None:
        await self.relay.stop()
        for sock in (self.back, self.vmm, self.listener):
            sock.close()


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[Ends]:
    made = Ends(tmp_path)
    yield made
    await made.close()


def take(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """So many bytes, and the descriptors that came with the first of them. Blocks."""
    data, fds, _, _ = socket.recv_fds(sock, size, FDS)
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data, fds


async def test_messages_pass_both_ways_with_their_descriptors(ends: Ends, tmp_path: Path) -> None:
    """Those sent at one go, too: the descriptors stay with the message that had them."""
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(8)]
    plain, carrier, large = message(8), message(300), message(LIMIT)
    for source, target in ((ends.vmm, ends.back), (ends.back, ends.vmm)):
        source.sendall(plain)
        socket.send_fds(source, [carrier], files)
        sending = asyncio.to_thread(source.sendall, large)
        reading = asyncio.to_thread(
            lambda target=target: [take(target, len(one)) for one in (plain, carrier, large)]  # type: ignore[misc]
        )
        (first, none), (second, some), (third, no_more) = (await asyncio.gather(sending, reading))[1]
        assert (first, second, third) == (plain, carrier, large)
        assert (none, no_more) == ([], [])
        assert [os.fstat(fd).st_ino for fd in some] == [os.stat(tmp_path).st_ino] * 8
        for fd in some:
            os.close(fd)
    for fd in files:
        os.close(fd)
    assert not os.path.exists(ends.relay.path)


async def test_a_side_that_does_not_read_stops_the_other_and_nothing_is_lost(ends: Ends) -> None:
    ends.vmm.setblocking(False)
    sent = bytearray()
    one = message(4096)
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            while True:
                await loop.sock_sendall(ends.vmm, one)
                sent += one
    # The message that was cut short is finished when there is room again.
    got = bytearray()
    ends.back.setblocking(False)
    while len(got) < len(sent):
        got += await loop.sock_recv(ends.back, 65536)
    assert got[: len(sent)] == sent


@pytest.mark.parametrize("wrong", ["size", "descriptors"])
async def test_what_breaks_the_protocol_ends_the_relay(ends: Ends, tmp_path: Path, wrong: str) -> None:
    if wrong == "size":
        ends.back.sendall(struct.pack("=III", 1, 1, LIMIT + 1))
    else:
        files = [os.open(tmp_path, os.O_RDONLY) for _ in range(FDS + 1)]
        socket.send_fds(ends.back, [message(8)], files)
        for fd in files:
            os.close(fd)
    assert await asyncio.to_thread(ends.vmm.recv, 10) == b""


async def test_the_end_of_the_back_end_reaches_the_vmm_and_us(ends: Ends) -> None:
    await asyncio.sleep(0)
    ends.back.close()
    assert await asyncio.to_thread(ends.vmm.recv, 10) == b""
    async with asyncio.timeout(20):
        await ends.relay.lost


async def test_giving_up_a_relay_ends_the_vmms_wait_and_its_way_back(ends: Ends) -> None:
    ends.vmm.sendall(message(8))
    assert len((await asyncio.to_thread(take, ends.back, 20))[0]) == 20
    ends.relay.abort()
    assert await asyncio.to_thread(ends.vmm.recv, 10) == b""
    assert not ends.relay.lost.done()
    with pytest.raises(FileNotFoundError):
        connect_now(ends.relay.path)


async def test_no_relay_listens_for_a_back_end_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no vhost-user back end"):
        Relay.start(str(tmp_path / "target"), str(tmp_path / "relay"))
    assert os.listdir(tmp_path) == []
