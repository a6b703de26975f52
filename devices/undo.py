"""The undo log: what was acquired, written down before it is used, released in reverse.

What: the protocol that device, hypervisor and sandbox code records its acquisitions with, and
`MemoryUndo`, the in-memory stack. `shim.state.journal` adds the copy on disk, which `delete` replays
after a crash.
Why: a failure at any point, kill -9 included, must leave nothing behind (design D10).
Invariants: `record` returns before the thing is acquired; a release runs at most once; releasing
one entry never prevents the others from being released.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Entry", "MemoryUndo", "UndoLog"]

Release = Callable[[], Awaitable[None] | None]


@dataclass(eq=False, slots=True)
class Entry:
    """One acquisition: its kind ("process", "socket", "dir", "mount", ...), its facts, its release."""

    kind: str
    facts: dict[str, str | int]
    release: Release | None = field(default=None, repr=False)


class UndoLog(Protocol):
    """Where acquisitions are recorded. Kinds and their facts:

    - `process`: pid, start (field 22 of /proc/PID/stat), name. Released by SIGKILL if both match.
    - `logger`: the same, and container. Waited for, then SIGTERM, then SIGKILL.
    - `file`: path. Released by unlink.
    - `socket`: path; with inode and made (`shim.state.names`) it is unlinked only if it is still that one.
    - `link`: path, target. Unlinked if it still points there.
    - `dir`: path. Released by removing the tree without ever crossing a mount.
    - `mount`: path. Released by umount2(MNT_DETACH | UMOUNT_NOFOLLOW).
    - `user`: uid, directory, mark: see `devices.users`.
    - `tap`: netns, namespace, link, index, devices, qdiscs: see `shim.resources.network.endpoint`.
    - `remote-vm`: socket, vm: see `hypervisors.remote.vmm`.
    - `cgroup`, `cgroups`, ...: as their owners say.
    """

    def record(self, kind: str, release: Release | None = None, **facts: str | int) -> Entry:
        """Write the entry down, durably, and return it. Call it before the acquisition."""
        ...

    def update(self, entry: Entry, **facts: str | int) -> None:
        """Add facts that are known only afterwards (a pid)."""
        ...

    async def release(self, entry: Entry) -> None:
        """Release this one now and forget it."""
        ...

    def forget(self, entry: Entry) -> None:
        """The thing is gone by itself: drop the entry without releasing it. Never raises."""
        ...


class MemoryUndo:
    """An undo log without a disk, for tests and short-lived tools."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def record(self, kind: str, release: Release | None = None, **facts: str | int) -> Entry:
        """See `UndoLog.record`."""
        entry = Entry(kind, facts, release)
        self.entries.append(entry)
        return entry

    def update(self, entry: Entry, **facts: str | int) -> None:
        """See `UndoLog.update`."""
        entry.facts.update(facts)

    async def release(self, entry: Entry) -> None:
        """See `UndoLog.release`."""
        if entry in self.entries:
            self.entries.remove(entry)
            if entry.release is not None:
                outcome = entry.release()
                if inspect.isawaitable(outcome):
                    await outcome

    def forget(self, entry: Entry) -> None:
        """See `UndoLog.forget`."""
        if entry in self.entries:
            self.entries.remove(entry)

    async def release_all(self) -> list[Exception]:
        """Release everything in reverse order; return the errors met on the way."""
        errors: list[Exception] = []
        while self.entries:
            try:
                await self.release(self.entries[-1])
            except Exception as error:  # noqa: BLE001  (undo goes on past every error)
                errors.append(error)
        return errors
