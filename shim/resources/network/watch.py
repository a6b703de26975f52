"""Being told of changes in a pod's network namespace while its containers run.

What: `LinkWatch.changed` returns when links, addresses or routes of the namespace have changed and have then
been left alone for a moment.
Why: `docker network connect` and whoever else works on a running pod start no container afterwards, at which
the shim would look. Why the moment: a link comes before its addresses, and its routes after them.
Invariants: an idle namespace costs nothing; what changes without end is told every `_AT_MOST` seconds. What
the socket had no room for counts as a change. `close` may be called twice.
Source: rtnetlink(7), netlink(7).
"""

from __future__ import annotations

import asyncio
import socket

from shim.resources.network.netns import Netns

__all__ = ["LinkWatch"]

_SETTLED = 0.2  # seconds without a change
_AT_MOST = 2.0
#: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


class LinkWatch:
    """Of one namespace. Made by `open`."""

    def __init__(self, heard: socket.socket) -> None:
        self._socket = heard
        self._loop = asyncio.get_running_loop()
        self._heard = asyncio.Event()
        self._last = 0.0  # by the loop's clock: when it heard of a change
        self._loop.add_reader(heard, self._read)

    @classmethod
    async def open(cls, netns: Netns) -> LinkWatch:
        """From now on. Raises OSError."""
        return cls(await netns.run(_listen))

    async def changed(self) -> None:
        """Wait for a change since the last call, and its end."""
        await self._heard.wait()
        until = self._loop.time() + _AT_MOST
        while (left := min(until, self._last + _SETTLED) - self._loop.time()) > 0:  # noqa: ASYNC110  (time's)
            await asyncio.sleep(left)
        self._heard.clear()

    def close(self) -> None:
        """Hear no more."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        try:
            self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: there were more than it could hold
            pass
        self._last = self._loop.time()
        self._heard.set()


def _listen() -> socket.socket:
    """In the namespace's thread: the socket stays the namespace's."""
    heard = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        heard.bind((0, _GROUPS))
    except BaseException:
        heard.close()
        raise
    return heard
