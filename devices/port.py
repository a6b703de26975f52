"""The agent's channel as one stream of bytes: a port of virtio-serial (design D6's third face).

What: `PortChannel`, an `AgentChannel` over a socket pair; the VMM has the other end as the port's chardev.
Why: the state of a VM with vhost-user devices cannot be saved, and what they serve does not see private
copies of a guest's memory. A port of virtio-serial is a device of the VMM's own, so templates have one.
Invariants: there is one connection, made with the channel; whoever has taken it has the stream, and when it
closes the guest's agent sees the end. What is sent before the guest has opened the port waits, so nobody has
to be told that the agent is ready: its first answer says it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from devices.errors import GuestError, KataError

__all__ = ["PortChannel"]


class PortChannel:
    """See the module's docstring and `devices.vsock.AgentChannel`."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours: socket.socket | None = ours
        self._same = ours.dup()  # to end it by, whoever has it
        self._error: Callable[[], KataError] | None = None

    @classmethod
    def pair(cls) -> tuple[PortChannel, int]:
        """The channel, and the descriptor of the end that the VMM inherits; the caller closes that."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        return cls(ours), theirs.detach()

    @property
    def home_port(self) -> int:
        """The guest calls nobody."""
        return 0

    async def wait_ready(self, timeout: float) -> None:  # noqa: ARG002  (AgentChannel's)
        """Nothing is waited for: see the invariants. Raises the VM's error if it is gone."""
        if self._error is not None:
            raise self._error()

    async def connect(self, port: int, timeout: float) -> tuple[socket.socket, int]:  # noqa: ARG002
        """The stream, once. Raises GuestError."""
        if self._error is not None:
            raise self._error()
        if self._ours is None:
            raise GuestError(
                "the guest's only connection is taken", phase="agent", code="FAILED_PRECONDITION"
            )
        ours, self._ours = self._ours, None
        return ours, 0

    async def open_stream(self, timeout: float) -> tuple[socket.socket, int]:  # noqa: ARG002
        """There are none. Raises GuestError."""
        raise GuestError("this guest has no connections for streams", phase="stdio", code="UNIMPLEMENTED")

    def hang_up(self) -> None:
        """End the stream for both, whoever has it here: the guest sees that nobody is there any more."""
        with contextlib.suppress(OSError):
            self._same.shutdown(socket.SHUT_RDWR)

    def fail(self, error: Callable[[], KataError]) -> None:
        """See `AgentChannel.fail`."""
        self._error = error

    async def close(self) -> None:
        """See `AgentChannel.close`."""
        self._same.close()
        if self._ours is not None:
            self._ours.close()
            self._ours = None
