"""What the agent gives the kernel at once fits one descriptor of vsock's queue, and nothing of it is lost."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from agent.vsock import PACKET, Connection, Listener


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Connection, socket.socket]:
    """A connection that a listener accepted, and its other end."""
    listener = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.connect(str(tmp_path / "s"))
    accepted, _ = listener.accept()
    listener.close()
    return accepted, other


def test_a_packet_fits_eight_pages() -> None:
    """With its header of 44 bytes and the kernel's part behind it (some 320)."""
    assert PACKET + 44 + 512 <= 8 * 4096


@pytest.mark.parametrize("size", [0, 1, PACKET, PACKET + 1, 4 * PACKET])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_one_send_is_one_packet_at_most(
    pair: tuple[Connection, socket.socket], size: int, kind: type
) -> None:
    connection, other = pair
    with connection, other:
        connection.setblocking(False)
        data = os.urandom(size)
        sent = connection.send(kind(data))

        assert sent == min(size, PACKET)
        if sent:
            assert other.recv(1 << 20) == data[:sent]


@pytest.mark.parametrize("sizes", [(4, PACKET - 4), (4, PACKET), (PACKET, 1), (0, 5), (1, 2 * PACKET, 3)])
def test_one_sendmsg_too(pair: tuple[Connection, socket.socket], sizes: tuple[int, ...]) -> None:
    """All buffers count, and those behind the limit wait."""
    connection, other = pair
    with connection, other:
        buffers = [os.urandom(size) for size in sizes]
        sent = connection.sendmsg(buffers)

        assert sent == min(sum(sizes), PACKET)
        assert other.recv(1 << 20) == b"".join(buffers)[:sent]


async def test_asyncio_sends_the_rest(tmp_path: Path) -> None:
    """A server of asyncio on such a listener: a message of four megabytes arrives whole."""
    data = os.urandom(4 << 20)

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(writer.get_extra_info("socket")._sock, Connection)
        writer.write(data)
        await writer.drain()
        writer.close()

    listener = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.setblocking(False)
    server = await asyncio.start_unix_server(serve, sock=listener)
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))

    assert await reader.read() == data
    writer.close()
    server.close()
