"""Meeting a daemon on a unix socket without waiting longer than needed.

What: `listen` binds a socket that is handed to a daemon already listening; `connect_when_listening`
connects to one that a daemon makes itself.
Why: between a daemon's exec and its listen lie milliseconds that a fixed sleep would miss on either side.
Invariants: the wait ends by inotify, by the daemon's death, or by its deadline; never by polling a
daemon that has not made its socket yet. Exactly one connection is ever made: a probe would be
taken for the VMM. In a directory that a daemon may write to nothing is believed: what is connected to is a
socket there, never where a link leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket

from devices.beneath import connect_to
from devices.child import Child
from devices.errors import HostError

__all__ = ["connect_now", "connect_when_listening", "listen"]

_IN_CREATE = 0x100
_IN_MOVED_TO = 0x80
_BETWEEN_BIND_AND_LISTEN = 0.001  # seconds; two system calls of the daemon apart


def listen(path: str, backlog: int = 4) -> socket.socket:
    """A listening unix socket at `path` (at most 107 bytes), for a child to accept on."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {path}: {error}") from error
    return sock


def connect_now(path: str) -> socket.socket:
    """A connection to a socket that listens already (its backlog takes us before it accepts)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connect_to(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_when_listening(path: str, daemon: Child, timeout: float) -> socket.socket:
    """A connection to `path` as soon as `daemon` listens there.

    Raises HostError, with the daemon's last words, when it ends or `timeout` seconds pass.
    """
    watch = _Watch(os.path.dirname(path))
    try:
        async with asyncio.timeout(timeout):
            while True:
                watch.changed.clear()
                try:
                    return connect_now(path)
                except FileNotFoundError:
                    changed = asyncio.create_task(watch.changed.wait())
                    waits: set[asyncio.Future[object]] = {changed, daemon.exited}  # type: ignore[arg-type]
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
                except ConnectionRefusedError:
                    await asyncio.sleep(_BETWEEN_BIND_AND_LISTEN)
                if not daemon.alive:
                    raise HostError(
                        f"{daemon.name} {daemon.describe()} before it was ready",
                        phase="devices",
                        details={f"{daemon.name} stderr": daemon.stderr_tail()},
                        hint=f"start {daemon.name} by hand to see why it does not run on this host",
                    )
    except TimeoutError:
        raise HostError(
            f"{daemon.name} did not listen on its socket within {timeout:g} s",
            phase="devices",
            details={f"{daemon.name} stderr": daemon.stderr_tail()},
        ) from None
    finally:
        watch.close()


class _Watch:
    """inotify on one directory: `changed` is set when a name appears in it."""

    def __init__(self, directory: str) -> None:
        self.changed = asyncio.Event()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if (
            self._fd < 0
            or libc.inotify_add_watch(self._fd, os.fsencode(directory), _IN_CREATE | _IN_MOVED_TO) < 0
        ):
            number = ctypes.get_errno()
            if self._fd >= 0:
                os.close(self._fd)
            raise HostError(
                f"cannot watch {directory}: {os.strerror(number)}",
                hint="raise fs.inotify.max_user_instances" if number == errno.EMFILE else "",
            )
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 4096)
        self.changed.set()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
