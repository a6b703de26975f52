"""A vhost-user back end that somebody else runs: SPDK, qemu-storage-daemon, a switch.

What: `BackEnd.connect` meets it on its unix socket, for a VMM that then speaks to it; `lost` tells its end.
Why we connect and not the VMM: whether anybody is there is known before anything is plugged. And we keep a
copy of the connection: a VMM waits for a back end's answers with everything else standing still (QEMU 7.2:
its whole main loop), and says nothing when it goes away.
Invariants:
- Exactly one connection is made: a probe would be taken for the VMM, and some serve one only.
- Nothing here blocks: a back end that does not accept is refused, one that does not answer can be given up
  (`abort`).
- The connection is the back end's until `stop`: it must come after the VMM has let go.
Source: unix(7), epoll_ctl(2); docs/interop/vhost-user.rst of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket

from devices.errors import HostError

__all__ = ["BackEnd"]

_WHY = {
    errno.ENOENT: "there is no such socket",
    errno.ECONNREFUSED: "nobody listens there",
    errno.EAGAIN: "it does not accept connections, and its queue is full",
}


class BackEnd:
    """One connection. `lost` is done when the back end closes it; neither `abort` nor `stop` does that."""

    def __init__(self, path: str, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.path = path
        self.connection = connection
        self.lost: asyncio.Future[None] = loop.create_future()
        # Readable is none of our business, the end is; asyncio knows no such watch, but an epoll within its
        # own does.
        self._watch = select.epoll()
        self._watch.register(connection.fileno(), select.EPOLLRDHUP)
        loop.add_reader(self._watch.fileno(), self._ended)

    @classmethod
    def connect(cls, path: str) -> BackEnd:
        """Meet the back end that listens at `path`, without waiting. Raises HostError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
            sock.setblocking(True)  # as whoever inherits it expects
            return cls(path, sock)
        except OSError as error:
            sock.close()
            why = _WHY.get(error.errno or 0, error.strerror or str(error))
            raise HostError(
                f"no vhost-user back end answers at {path[:200]}: {why}",
                phase="devices",
                hint="start the back end, and see that it listens on this socket",
                code="FAILED_PRECONDITION",
            ) from error
        except BaseException:
            sock.close()
            raise

    def abort(self) -> None:
        """End the connection for the VMM as well, which then stops waiting for answers. Idempotent."""
        self._unwatch()
        if self.connection.fileno() >= 0:
            self.connection.shutdown(socket.SHUT_RDWR)

    def describe_loss(self) -> str:
        """One sentence, once `lost` is done."""
        return f"the vhost-user back end at {self.path} closed its connection"

    def evidence(self) -> dict[str, str]:
        """It is not ours: what it says is said elsewhere."""
        return {}

    @property
    def inside(self) -> bool:
        """Whether it is a part of this process."""
        return False

    @property
    def pids(self) -> list[int]:
        """None of ours."""
        return []

    def handed_over(self) -> None:
        """We keep it all: see the module's docstring."""

    async def stop(self) -> None:
        """Let go of it. Idempotent."""
        self.abandon()

    def abandon(self) -> None:
        """The same, where nothing may be awaited."""
        self._unwatch()
        self.connection.close()

    def _ended(self) -> None:
        self._unwatch()
        if not self.lost.done():
            self.lost.set_result(None)

    def _unwatch(self) -> None:
        if not self._watch.closed:
            asyncio.get_running_loop().remove_reader(self._watch.fileno())
            self._watch.close()
