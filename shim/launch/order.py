"""What a daemon is told that is to take a sandbox over, and how it answers.

What: `Plight` is what `shim.launch.takeover` found; `Order` goes with the new daemon, which enters the
mounts, adopts the journal and reports by it.
Invariants: the report is made once; without one whoever waits hears the end of the pipe.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.state.identity import Identity
from shim.state.recoveryfile import Saved

if TYPE_CHECKING:
    from shim.state.journal import Journal

__all__ = ["MAX_REPORT", "Order", "Plight"]

MAX_REPORT = 64 << 10  # bytes


@dataclass(frozen=True, slots=True)
class Plight:
    """A sandbox that can be recovered: what its shim wrote down, its bundle, and a process in its mounts."""

    identity: Identity
    saved: Saved
    bundle: str
    holder: int


class Order:
    """What the daemon is told. `report` says once how it went, "" for well."""

    def __init__(self, plight: Plight, report: int) -> None:
        self.saved = plight.saved
        self._plight = plight
        self._report = report

    def report(self, problem: str) -> None:
        """Idempotent."""
        fd, self._report = self._report, -1
        if fd >= 0:
            os.write(fd, (problem or "\n").encode("utf-8", "replace")[:MAX_REPORT])
            os.close(fd)

    def enter_mounts(self) -> int:
        """See `devices.mounts.enter`."""
        from devices.mounts import enter

        left = enter(self._plight.holder)
        os.chdir(self._plight.bundle)
        return left

    def linked(self, sandbox_id: str) -> bool:
        """Whether the link for Kata's tools is this sandbox's."""
        return self.saved.daemon.alias == sandbox_id

    async def adopt(self, identity: Identity, directory: str) -> Journal:
        """The journal, ours now. Its loggers have ended with their shim's pipes, or do now."""
        from shim.launch.undo_kinds import release
        from shim.state import healthfile
        from shim.state.journal import Journal

        journal = Journal.adopt(directory, identity, release)
        for entry in journal.entries:
            if entry.kind == "logger":
                await journal.release(entry)
        healthfile.clear(directory)
        return journal
