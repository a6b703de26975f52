"""Which connections a server keeps when there are too many, and how much they may leave half said.

What: `Peers` counts the connections of one server, what they hold of frames that are not whole, and the calls
that are in progress on all of them.
Why: each connection costs a descriptor, and up to 4 MiB for a frame that never becomes whole; whoever may
connect at all can open ten thousand and say half a header on each. A limit alone would keep out whom the
server is for, too.
Invariants: at most `MAX_CONNECTIONS` and `MAX_HELD` bytes. Beyond, the connection that has been silent for
longest goes: one that has never said a whole frame. One that has is never closed for a newer one: it is the
newer one that goes.
"""

from __future__ import annotations

from ._endpoint import Endpoint

__all__ = ["MAX_CALLS", "MAX_CONNECTIONS", "MAX_HELD", "Peers"]

MAX_CONNECTIONS = 1024
"""containerd has one for its calls, and one for each stream of a process's where stdio goes over ttrpc."""
MAX_HELD = 64 << 20
"""Bytes of frames that are not whole: sixteen of the largest."""
MAX_CALLS = 4096
"""In progress on all connections: each is a task of some kilobytes."""


class Peers:
    """See the module's docstring. `calls`: in progress, counted by who runs them."""

    def __init__(self) -> None:
        self.calls = 0
        self._spoke: dict[Endpoint, bool] = {}
        self._held: dict[Endpoint, int] = {}
        self._total = 0

    def add(self, peer: Endpoint) -> bool:
        """A new one; False if there is no room for it, and it is to be closed."""
        if len(self._spoke) >= MAX_CONNECTIONS and not self._drop_silent():
            return False
        self._spoke[peer] = False
        return True

    def discard(self, peer: Endpoint) -> None:
        """It is gone."""
        self._spoke.pop(peer, None)
        self._total -= self._held.pop(peer, 0)

    def heard(self, peer: Endpoint, held: int, *, whole: bool) -> None:
        """Bytes came from it: `held` of them wait for the rest of their frame; `whole`: a frame was."""
        if peer not in self._spoke:
            return
        if whole:
            self._spoke[peer] = True
        self._total += held - self._held.get(peer, 0)
        self._held[peer] = held
        while self._total > MAX_HELD and self._drop_silent(holding=True):
            pass

    def _drop_silent(self, *, holding: bool = False) -> bool:
        for peer, spoke in self._spoke.items():
            if not spoke and (self._held.get(peer) or not holding):
                self.discard(peer)
                peer.abort()
                return True
        return False
