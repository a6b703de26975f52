"""A server and a client of ttrpc in one loop, joined by a unix socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.unit.ttrpc.echo import ECHO, Echo
from ttrpc import Client, Server


class Pair:
    """A running server with its Echo, and as many clients as a test wants."""

    def __init__(self, path: str, server: Server, echo: Echo, stack: AsyncExitStack) -> None:
        self.path = path
        self.server = server
        self.echo = echo
        self._stack = stack

    async def client(self, **options: Any) -> Client:
        """A new connection, closed at the end of the test."""
        return await self._stack.enter_async_context(
            await Client.connect_unix(self.path, timeout=5, **options)
        )

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection for bytes of the test's own."""
        reader, writer = await asyncio.open_unix_connection(self.path)

        async def close() -> None:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

        self._stack.push_async_callback(close)
        return reader, writer


MakePair = Callable[..., Awaitable[Pair]]


@pytest.fixture
async def make_pair(tmp_path: Path) -> AsyncIterator[MakePair]:
    """Start a server: `make_pair(run_to_end=..., **options of Server)`."""
    async with AsyncExitStack() as stack:

        async def make(*, run_to_end: Any = False, impl: Any = None, **options: Any) -> Pair:
            server = Server(**options)
            echo = Echo()
            server.register(ECHO, impl or echo, run_to_end=run_to_end)
            path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.sock")
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(path)
            listener.listen()
            serving = asyncio.create_task(server.serve(listener))

            async def stop() -> None:
                await server.close(0)
                await serving

            stack.push_async_callback(stop)
            return Pair(path, server, echo, stack)

        yield make


@pytest.fixture
async def pair(make_pair: MakePair) -> Pair:
    """A server with default options."""
    return await make_pair()
