"""The way to the agent of a VM on another machine: a unix socket of whoever relays it.

What: `ProxySocket`, an `AgentChannel`. The socket speaks ttrpc at once: no CONNECT, no port, no call home.
Invariants: as `AgentChannel`. The relay serves the agent's calls and nothing else, no streams beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from devices.beneath import connect_to
from devices.errors import GuestError, HypervisorError, KataError

__all__ = ["MAX_PATH", "ProxySocket"]

MAX_PATH = 107  # bytes: unix(7)
_REDIAL = 0.1  # seconds


class ProxySocket:
    """`path` is known once the service has said it."""

    home_port = 0

    def __init__(self) -> None:
        self.path = ""
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: Callable[[], KataError] = lambda: GuestError("the agent's channel is closed")

    async def wait_ready(self, timeout: float) -> None:
        """See `AgentChannel.wait_ready`: it can be connected to."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with contextlib.suppress(OSError):
                        self._dial().close()
                        return
                    await asyncio.wait({self._gone}, timeout=_REDIAL)
        except TimeoutError:
            raise GuestError(
                f"nobody listened at {self.path}, the agent's socket, within {timeout:g} s",
                phase="boot",
                code="DEADLINE_EXCEEDED",
                hint="see the hypervisor service's log",
            ) from None

    async def connect(self, port: int, timeout: float) -> tuple[socket.socket, int]:  # noqa: ARG002
        """See `AgentChannel.connect`; whatever the port is, the agent answers."""
        try:
            return self._dial(), 0
        except OSError as error:
            raise GuestError(
                f"cannot connect to {self.path}, the agent's socket: {error.strerror}"
            ) from error

    async def open_stream(self, timeout: float) -> tuple[socket.socket, int]:  # noqa: ARG002
        """There are none."""
        raise HypervisorError("a VM on another machine has no streams beside the agent's calls")

    def fail(self, error: Callable[[], KataError]) -> None:
        """See `AgentChannel.fail`."""
        if not self._gone.done():
            self._error = error
            self._gone.set_result(None)

    async def close(self) -> None:
        """See `AgentChannel.close`."""
        if not self._gone.done():
            self._gone.set_result(None)

    def _dial(self) -> socket.socket:
        if self._gone.done():
            raise self._error()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            connect_to(sock, self.path)  # at once, or EAGAIN: its backlog is full
            return sock
        except BaseException:
            sock.close()
            raise
