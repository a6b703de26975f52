"""The guest's console: a stream that is always read and of which the end is kept.

What: `Console` owns a socket pair: one end for the VMM's serial port, the other read here.
Why: the kernel's last lines explain a guest that does not boot; and a serial port that nobody reads
stops the guest.
With `path` it is a socket that the VMM listens on instead, so that whoever takes the VM over can read on
(`reading`); while nobody does, what the guest says is lost, and the guest goes on.
Invariants: at most 64 KiB are kept; reading never blocks and takes at most 64 KiB per turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Self

from devices.rendezvous import connect_now, listen
from devices.tail import TailBuffer

__all__ = ["Console"]

_READ_SIZE = 64 << 10
_PANIC = "Kernel panic - not syncing: "


class Console:
    """Reading starts at once; the VMM gets `guest_end`, which is closed here by `handed_over`.

    `on_output` sees each piece, and nothing (b"") at the end.
    """

    def __init__(self, on_output: Callable[[bytes], None] | None = None, *, path: str = "") -> None:
        if path:
            theirs = listen(path)
            ours = connect_now(path)  # in its backlog, before the VMM is there
        else:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._read(ours, theirs, on_output)

    @classmethod
    def reading(cls, path: str, on_output: Callable[[bytes], None] | None = None) -> Self:
        """Read on from a VMM that listens at `path`. Raises OSError."""
        console = cls.__new__(cls)
        console._read(connect_now(path), None, on_output)
        return console

    def _read(
        self, ours: socket.socket, theirs: socket.socket | None, on_output: Callable[[bytes], None] | None
    ) -> None:
        self.output = TailBuffer()
        self._on_output = on_output
        ours.setblocking(False)
        self._ours: socket.socket | None = ours
        self._theirs = theirs
        asyncio.get_running_loop().add_reader(ours.fileno(), self._on_readable)

    @property
    def guest_end(self) -> int:
        """The descriptor for the VMM; valid until `handed_over`."""
        assert self._theirs is not None
        return self._theirs.fileno()

    def handed_over(self) -> None:
        """The VMM runs and has its copy: close ours, so that its death ends the stream."""
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def tail(self, lines: int = 10) -> str:
        """The guest's last lines, cleaned of control characters; after a panic, those that led to it
        (the call trace that follows says less)."""
        said = self.output.lines()
        end = next((i + 1 for i in reversed(range(len(said))) if _PANIC in said[i]), len(said))
        return "\n".join(said[max(0, end - lines) : end])

    def panic(self) -> str:
        """The kernel's reason if it panicked, else "". The guest's own words."""
        return next(
            (line.partition(_PANIC)[2] for line in reversed(self.output.lines()) if _PANIC in line), ""
        )

    def drain(self) -> None:
        """Read what is there, without waiting: for the moment after the VMM's death."""
        for _ in range(16):  # a socket buffer holds about 200 KiB
            if self._ours is None or not self._on_readable():
                return

    def close(self) -> None:
        """Stop reading. What was read stays. Idempotent."""
        self.handed_over()
        if self._ours is not None:
            with contextlib.suppress(RuntimeError):  # no loop any more: nothing to remove it from
                asyncio.get_running_loop().remove_reader(self._ours.fileno())
            self._ours.close()
            self._ours = None
            if self._on_output is not None:
                self._on_output(b"")

    def _on_readable(self) -> bool:
        assert self._ours is not None
        try:
            data = os.read(self._ours.fileno(), _READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            return False
        self.output.write(data)
        if self._on_output is not None:
            self._on_output(data)
        return True
