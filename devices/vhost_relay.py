"""A relay between a VMM and a vhost-user back end, for a VMM that will only connect to a path itself.

What: `Relay.start` meets the back end first, then listens at a path of our own, takes one connection there,
and passes on message by message, descriptors included.
Why: QEMU's vhost-user network takes no connected descriptor ("does not support FD passing"): left alone with
the back end's path it waits for one that does not answer with its main loop standing still, and nobody hears
of the back end's end. Only control messages pass here, a few dozen while a card is set up; the packets go
through the guest's memory.
Invariants:
- Messages are passed whole and in order; a message's descriptors come with its first byte, as they were sent.
- What arrives is bounded: no message over `LIMIT`, at most `FDS` descriptors; a side that breaks this, or
  goes, ends the relay for both. A side that does not read stops the other one, not us.
- Nothing listens any more when the VMM has come.
Source: docs/interop/vhost-user.rst of QEMU 7.2 ("Message Specification"), unix(7).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable

import structlog

from devices.rendezvous import listen
from devices.vhost_user import BackEnd

__all__ = ["Relay"]

LIMIT = 64 << 10  # bytes of a message's payload; the largest there is, the regions of memory, has 1 KiB
FDS = 16  # descriptors of a message; the protocol has 8

# Not by socket.send_fds: that of Python 3.11 forgets its flags, and would wait.
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

_header = struct.Struct("=III")  # request, flags, size of the payload

_log = structlog.get_logger("vhost-user")


class Relay:
    """One back end for one VMM, which connects to `path`. Made by `start` only."""

    def __init__(self, back_end: BackEnd, path: str, listener: socket.socket) -> None:
        self.back_end = back_end
        self.path = path
        self._listener: socket.socket | None = listener
        self._vmm: socket.socket | None = None
        self._ways: list[_Way] = []
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    @classmethod
    def start(cls, target: str, path: str, *, user: int = 0) -> Relay:
        """Between the back end at `target` and `user`, who connects to `path`, in a directory of ours.

        Raises HostError when nobody is at `target`; nothing listens then.
        """
        back_end = BackEnd.connect(target)
        try:
            listener = listen(path, backlog=1)
            os.chown(path, user, user)  # to connect is to write
        except BaseException:
            back_end.abandon()
            raise
        listener.setblocking(False)
        return cls(back_end, path, listener)

    @property
    def lost(self) -> asyncio.Future[None]:
        """See `BackEnd.lost`."""
        return self.back_end.lost

    def abort(self) -> None:
        """End both connections, so that the VMM stops waiting. Idempotent."""
        self._end()
        self.back_end.abort()

    def describe_loss(self) -> str:
        """See `BackEnd.describe_loss`."""
        return self.back_end.describe_loss()

    def evidence(self) -> dict[str, str]:
        """See `BackEnd.evidence`."""
        return {}

    @property
    def inside(self) -> bool:
        """Whether it is a part of this process."""
        return True

    @property
    def pids(self) -> list[int]:
        """None of ours."""
        return []

    def handed_over(self) -> None:
        """We keep it all: see the module's docstring."""

    async def stop(self) -> None:
        """Let go of everything. Idempotent."""
        self._end()
        if self._vmm is not None:
            self._vmm.close()
        await self.back_end.stop()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            vmm, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._vmm = vmm
        self._stop_listening()
        back = self.back_end.connection
        self._ways = [_Way(vmm, back, self._end), _Way(back, vmm, self._end)]

    def _stop_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _end(self) -> None:
        """Neither side gets anything any more; the VMM sees the end."""
        self._stop_listening()
        for way in self._ways:
            way.stop()
        if self._vmm is not None and self._vmm.fileno() >= 0:
            with contextlib.suppress(OSError):  # it may have gone already
                self._vmm.shutdown(socket.SHUT_RDWR)


class _Way:
    """From `source` to `target`. `end` is called once, when nothing more can pass."""

    def __init__(self, source: socket.socket, target: socket.socket, end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._source, self._target = source, target
        self._end = end
        self._data = bytearray()
        self._fds: list[int] = []
        self._stopped = False
        self._loop.add_reader(source.fileno(), self._read)

    def stop(self) -> None:
        """Pass nothing on any more. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._loop.remove_reader(self._source.fileno())
            self._loop.remove_writer(self._target.fileno())
            self._drop_fds()

    def _read(self) -> None:
        try:
            wanted = self._missing()
            data, fds, flags, _ = socket.recv_fds(
                self._source, wanted, FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(str(error))
            return
        self._fds += fds
        if not data:
            self._fail("")
            return
        self._data += data
        if flags & socket.MSG_CTRUNC or len(self._fds) > FDS:
            self._fail(f"a message came with more than {FDS} descriptors")
        elif len(self._data) >= _header.size and self._size() > LIMIT:
            self._fail(f"a message has more than {LIMIT >> 10} KiB")
        elif len(self._data) >= _header.size and self._missing() == 0:
            self._loop.remove_reader(self._source.fileno())
            self._write()

    def _write(self) -> None:
        """Called again when the target has room."""
        try:
            while self._data:
                sent = self._target.sendmsg([self._data], self._rights(), _SEND)
                self._drop_fds()
                del self._data[:sent]
        except BlockingIOError:
            self._loop.add_writer(self._target.fileno(), self._write)
            return
        except OSError as error:
            self._fail(str(error))
            return
        self._loop.remove_writer(self._target.fileno())
        self._loop.add_reader(self._source.fileno(), self._read)

    def _size(self) -> int:
        size: int = _header.unpack_from(self._data)[2]
        return size

    def _missing(self) -> int:
        """Bytes of this message that have not come: never more, or the next one's descriptors came along."""
        if len(self._data) < _header.size:
            return _header.size - len(self._data)
        return _header.size + self._size() - len(self._data)

    def _fail(self, why: str) -> None:
        if why:
            _log.warning("the relay ends", reason=why)
        self._end()

    def _rights(self) -> list[tuple[int, int, array.array[int]]]:
        if not self._fds:
            return []
        return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))]

    def _drop_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
