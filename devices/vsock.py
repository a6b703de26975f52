"""The agent's channel: two faces of vsock behind one API (design D6).

What: `AgentChannel` and its faces: `HybridVsock` (a unix socket and `CONNECT port`, as spoken by
vhost-device-vsock, Cloud Hypervisor and Firecracker) and `KernelVsock` (AF_VSOCK and a CID taken
from /dev/vhost-vsock).
Why: the rest of the shim dials the guest and does not care how.
Invariants:
- The guest is dialled only after its agent called home (an own agent), or with a back-off under one
  deadline (a stock agent): dialling a booting guest can wedge vhost-device-vsock 0.3.0.
- A hybrid connection is never closed, and nothing is sent on it but the CONNECT line, before the
  answer came: vhost-device-vsock drops such bytes, and spins or panics on such a close. Who loses
  patience leaves the socket parked until the answer or the end of the VM.
- A dead VM fails everything that waits, at once, with the evidence (`fail`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from devices.beneath import connect_to
from devices.errors import GuestError, HostError, KataError

__all__ = [
    "AGENT_PORT",
    "HOME_PORT",
    "STREAM_PORT",
    "UNANSWERED",
    "AgentChannel",
    "HybridVsock",
    "KernelVsock",
    "reserve_cid",
]

AGENT_PORT = 1024  # the agent's ttrpc server, as in Kata
HOME_PORT = 1028  # hybrid only: where the guest calls home (agent.home_vport)
STREAM_PORT = 1029  # our agent's stdio streams (agent.stream_port)

UNANSWERED = 128
"""Hybrid connections whose answer has not come: a guest that gives none costs so many descriptors. A host in
good health has a few at a time, each for some milliseconds."""

_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # _IOW(0xAF, 0x60, __u64), linux/vhost.h
_CID_FIRST, _CID_LAST = 3, 0xFFFF_FFFE  # 0-2 are the hypervisor's, local's and host's
_CID_TRIES = 50
_REPLY_LIMIT = 32  # bytes of `OK 4294967295\n`, with room
_REDIAL_FIRST, _REDIAL_MAX = 0.05, 0.5  # seconds between two dials of a stock agent
_REDIAL_BACKLOG = 0.005  # seconds
_DIAL_TIMEOUT = 2.0  # seconds for one dial of a stock agent

T = TypeVar("T")
Diagnostics = Callable[[], dict[str, str]]


class AgentChannel(Protocol):
    """Stream connections to the guest's agent."""

    @property
    def home_port(self) -> int:
        """The port of CID 2 that the guest calls when its agent listens; 0: it does not call."""
        ...

    async def wait_ready(self, timeout: float) -> None:
        """Return when the guest's agent listens.

        Raises GuestError, with the console's last lines, when `timeout` seconds passed or the VM ended.
        """
        ...

    async def connect(self, port: int, timeout: float) -> tuple[socket.socket, int]:
        """A connection to `port` in the guest: a connected non-blocking stream socket and the port that
        the guest sees as its peer's (0: this transport does not tell). Raises GuestError."""
        ...

    async def open_stream(self, timeout: float) -> tuple[socket.socket, int]:
        """A connection for one stdio stream of our own agent, and the id that names it there.

        The id went out as four bytes; what follows is framed: u32 length and bytes, 0 for the end.
        """
        ...

    def fail(self, error: Callable[[], KataError]) -> None:
        """The VM is gone: everything that waits, and every later call, raises `error()`."""
        ...

    async def close(self) -> None:
        """Stop listening and fail who still waits. Connections made stay open. Idempotent."""
        ...


class _Channel:
    """What both faces share: readiness, failure, deadlines, stream ids."""

    def __init__(self, home: socket.socket | None, diagnostics: Diagnostics) -> None:
        loop = asyncio.get_running_loop()
        self._home = home
        self._diagnostics = diagnostics
        self._ready = False
        self._gone: asyncio.Future[None] = loop.create_future()
        self._error: Callable[[], KataError] = lambda: GuestError("the agent's channel is closed")
        # Whoever hears no call home may not be the first one, and that may have left streams behind.
        self._last_stream = 0 if home is not None else random.getrandbits(31)

    async def _attempt(self, port: int) -> tuple[socket.socket, int]:
        raise NotImplementedError  # pragma: no cover  (each face has its own)

    def _abandon(self, attempt: asyncio.Task[tuple[socket.socket, int]]) -> None:
        """Nobody wants the connection any more."""
        attempt.cancel()
        attempt.add_done_callback(_close_result)

    def _from_guest(self, peer: Any) -> bool:  # noqa: ARG002
        return True

    async def wait_ready(self, timeout: float) -> None:
        if self._ready:
            return
        waiting = asyncio.create_task(self._called() if self._home is not None else self._dial())
        try:
            await self._before_death(waiting, timeout)
        except TimeoutError:
            raise GuestError(
                f"the guest's agent did not answer within {timeout:g} s",
                phase="boot",
                code="DEADLINE_EXCEEDED",
                details=self._diagnostics(),
                hint="see the guest's console above; check kernel, initrd and image, or allow more time",
            ) from None
        finally:
            waiting.cancel()
            await asyncio.wait({waiting})
        self._ready = True
        self._stop_listening()

    async def connect(self, port: int, timeout: float) -> tuple[socket.socket, int]:
        """See `AgentChannel.connect`."""
        attempt = asyncio.create_task(self._attempt(port))
        taken = False
        try:
            connection = await self._before_death(attempt, timeout)
            taken = True
            return connection
        except TimeoutError:
            raise GuestError(
                f"port {port} of the guest did not answer within {timeout:g} s", code="DEADLINE_EXCEEDED"
            ) from None
        except OSError as error:
            raise GuestError(f"cannot connect to port {port} of the guest: {error}") from error
        finally:
            if not taken:
                self._abandon(attempt)

    async def open_stream(self, timeout: float) -> tuple[socket.socket, int]:
        self._last_stream += 1
        stream = self._last_stream
        sock, _ = await self.connect(STREAM_PORT, timeout)
        try:
            sock.send(struct.pack(">I", stream))  # a new connection takes four bytes
        except OSError as error:
            sock.close()
            raise GuestError(f"the agent closed a new stdio connection: {error}") from error
        return sock, stream

    def fail(self, error: Callable[[], KataError]) -> None:
        if not self._gone.done():
            self._error = error
            self._gone.set_result(None)

    async def close(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._home is not None:
            self._home.close()
            self._home = None

    async def _called(self) -> None:
        """Accept the home call. Its content is nothing; its arrival is all."""
        loop = asyncio.get_running_loop()
        while self._home is not None:
            connection, peer = await loop.sock_accept(self._home)
            connection.close()
            if self._from_guest(peer):
                return
            await asyncio.sleep(0)  # another guest, which may call as fast as it likes

    async def _dial(self) -> None:
        """A stock agent says nothing: try until it listens."""
        pause = _REDIAL_FIRST
        while True:
            with contextlib.suppress(GuestError):
                sock, _ = await self.connect(AGENT_PORT, _DIAL_TIMEOUT)
                sock.close()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _REDIAL_MAX)

    async def _before_death(self, work: asyncio.Task[T], timeout: float) -> T:
        """`work`'s result, unless the VM dies (the error of `fail`) or time runs out (TimeoutError)."""
        awaited: set[asyncio.Future[Any]] = {work, self._gone}
        await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done():
            raise self._error()
        if work.done():
            return work.result()
        raise TimeoutError


class HybridVsock(_Channel):
    """vsock as a unix socket: the host writes `CONNECT port`, the guest's calls arrive at `<path>_<port>`."""

    def __init__(
        self,
        path: str,
        *,
        home_call: bool = True,
        tells_port: bool = False,
        user: int = 0,
        diagnostics: Diagnostics = dict,
    ) -> None:
        """`path`: the VMM's or daemon's unix socket; at most 100 bytes. Binds `<path>_1028` now, before
        the guest boots. `tells_port`: the number after OK is the host's port (vhost-device-vsock gives
        the guest's). `user`: whom the one at `path` runs as."""
        home = None
        if home_call:
            home = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            home.setblocking(False)
            home.bind(f"{path}_{HOME_PORT}")
            os.chown(f"{path}_{HOME_PORT}", user, user, follow_symlinks=False)  # to connect is to write
            home.listen(4)
        super().__init__(home, diagnostics)
        self._path = path
        self._tells_port = tells_port
        self._turn = asyncio.Semaphore(UNANSWERED)
        self._dialled: set[asyncio.Task[Any] | None] = set()
        self._parked: set[asyncio.Task[tuple[socket.socket, int]]] = set()

    @property
    def home_port(self) -> int:
        return HOME_PORT if self._home is not None else 0

    def _abandon(self, attempt: asyncio.Task[tuple[socket.socket, int]]) -> None:
        if attempt not in self._dialled:  # it waits for its turn, or has ended
            super()._abandon(attempt)
            return
        attempt.add_done_callback(_close_result)  # parked, not cancelled: see the invariants
        self._parked.add(attempt)
        attempt.add_done_callback(self._parked.discard)

    async def close(self) -> None:
        """See `AgentChannel.close`. Ends parked handshakes too: the VM is gone or about to."""
        await super().close()
        for attempt in self._parked:
            attempt.cancel()
        if self._parked:
            await asyncio.wait(set(self._parked))

    def _stop_listening(self) -> None:
        if self._home is not None:
            with contextlib.suppress(OSError):
                os.unlink(f"{self._path}_{HOME_PORT}")
        super()._stop_listening()

    async def _attempt(self, port: int) -> tuple[socket.socket, int]:
        if len(self._parked) >= UNANSWERED:
            raise GuestError(
                f"the guest has left {UNANSWERED} connections without an answer: none more to port {port}",
                hint="the guest hangs, or its agent does; see its console",
                code="RESOURCE_EXHAUSTED",
            )
        async with self._turn:
            task = asyncio.current_task()
            self._dialled.add(task)
            try:
                return await self._dial_through(port)
            finally:
                self._dialled.discard(task)

    async def _dial_through(self, port: int) -> tuple[socket.socket, int]:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while True:
                try:
                    connect_to(sock, self._path)  # a jailed VMM may write there
                    break
                except BlockingIOError:  # its backlog is full, which nothing announces the end of: unix(7)
                    await asyncio.sleep(_REDIAL_BACKLOG)
            sock.send(f"CONNECT {port}\n".encode())  # in one piece, as the daemon parses it in one read
            reply = bytearray()
            while not reply.endswith(b"\n"):
                # One byte at a time: what follows the line belongs to the caller.
                data = await loop.sock_recv(sock, 1)
                if not data:
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
                reply += data
                if len(reply) > _REPLY_LIMIT:
                    raise OSError(errno.EPROTO, f"unexpected answer {bytes(reply)!r}")
            words = reply.split()
            if not words or words[0].upper() != b"OK":
                raise OSError(errno.EPROTO, f"unexpected answer {bytes(reply)!r}")
            told = words[1] if self._tells_port and len(words) > 1 else b""
            return sock, int(told) if told.isdigit() else 0
        except BaseException:
            sock.close()
            raise


class KernelVsock(_Channel):
    """vsock by the host's kernel. Owns the CID: the descriptor of /dev/vhost-vsock given to the VMM."""

    def __init__(self, cid: int, *, home_call: bool = True, diagnostics: Diagnostics = dict) -> None:
        """The home port is the kernel's choice, because ports of CID 2 are shared by all VMs."""
        home = None
        if home_call:
            home = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            home.setblocking(False)
            home.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            home.listen(4)
        super().__init__(home, diagnostics)
        self.cid = cid

    @property
    def home_port(self) -> int:
        return int(self._home.getsockname()[1]) if self._home is not None else 0

    def _from_guest(self, peer: Any) -> bool:
        return bool(peer[0] == self.cid)

    async def _attempt(self, port: int) -> tuple[socket.socket, int]:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (self.cid, port))
            return sock, int(sock.getsockname()[1])
        except BaseException:
            sock.close()
            raise


def reserve_cid(device: str = "/dev/vhost-vsock") -> tuple[int, int]:
    """Take a free CID: (descriptor for the VMM's `vhostfd`, CID). It is free again when the last copy
    of the descriptor is closed. Raises HostError."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {device}: {error.strerror}", hint="modprobe vhost_vsock") from error
    try:
        for _ in range(_CID_TRIES):
            cid = random.randint(_CID_FIRST, _CID_LAST)
            try:
                fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise HostError(f"{device} refuses a context id: {error.strerror}") from error
            return fd, cid
        raise HostError(f"no free vsock context id after {_CID_TRIES} tries")
    except BaseException:
        os.close(fd)
        raise


def _close_result(task: asyncio.Task[tuple[socket.socket, int]]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result()[0].close()
