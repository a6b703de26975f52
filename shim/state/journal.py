"""The undo log with its copy on disk.

What: `Journal` implements `devices.undo.UndoLog`: what a sandbox acquires is written to
<state dir>/journal before it is used, and undone in reverse.
Why: after kill -9 nobody remembers; `delete` reads the file and undoes the same things.
Invariants: `record`, `update`, `forget` and `release` return after fsync (the file lives on a tmpfs,
where that is a no-op of microseconds, so they may be called on the event loop). A release that
failed stays in the file, for `delete` to try again, and is not tried twice here.
"""

from __future__ import annotations

import errno
import inspect
import os

from devices.errors import HostError
from devices.threads import acquire
from devices.undo import Entry, Release
from shim.state import journalfile, releases
from shim.state.safefs import remove_tree

__all__ = ["Journal"]


class Journal:
    """The journal of one sandbox. Made by `create`."""

    def __init__(self, directory: str, fd: int) -> None:
        self.directory = directory
        self._fd = fd
        self._entries: dict[Entry, int] = {}
        self._last = 0
        self._size = 0

    @classmethod
    def create(cls, directory: str, sandbox_id: str) -> Journal:
        """Make `directory` (0700) and an empty journal in it.

        Raises HostError if there is a journal already that still records something: two shims for
        one sandbox, or one that `delete` could not clean up after.
        """
        os.makedirs(directory, 0o700, exist_ok=True)
        try:
            left = journalfile.load(directory)
        except journalfile.JournalError as error:
            raise HostError(str(error), phase="journal", hint=f"remove {directory}") from error
        if left:
            raise HostError(
                f"{directory} still records {len(left)} acquisitions of an earlier shim",
                phase="journal",
                hint="run the shim's delete action for this id, then start again",
                code="ALREADY_EXISTS",
            )
        path = journalfile.journal_path(directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        journal = cls(directory, os.open(path, flags, 0o600))
        journal._write({"journal": journalfile.VERSION, "sandbox": sandbox_id})
        return journal

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is acquired now, in the order of acquisition."""
        return tuple(self._entries)

    def record(self, kind: str, release: Release | None = None, **facts: str | int) -> Entry:
        """See `UndoLog.record`. Raises HostError when it cannot be written down."""
        entry = Entry(kind, dict(facts), release)
        number = self._last + 1
        self._write({"op": "record", "n": number, "kind": kind, "facts": facts})
        self._last = number
        self._entries[entry] = number
        return entry

    def update(self, entry: Entry, **facts: str | int) -> None:
        """See `UndoLog.update`."""
        entry.facts.update(facts)
        if entry in self._entries:
            self._write({"op": "update", "n": self._entries[entry], "facts": facts})

    def forget(self, entry: Entry) -> None:
        """See `UndoLog.forget`."""
        number = self._entries.pop(entry, None)
        if number is not None:
            self._write({"op": "drop", "n": number})

    async def release(self, entry: Entry) -> None:
        """See `UndoLog.release`. Raises what the release raises; it is then left to `delete`."""
        number = self._entries.pop(entry, None)
        if number is None:
            return
        if entry.release is None:
            record = journalfile.Record(number, entry.kind, entry.facts)
            await acquire(releases.release, record)
        else:
            outcome = entry.release()
            if inspect.isawaitable(outcome):
                await outcome
        self._write({"op": "drop", "n": number})

    async def release_all(self) -> list[Exception]:
        """Release everything in reverse order, going on past errors; returns them."""
        errors: list[Exception] = []
        while self._entries:
            entry = next(reversed(self._entries))
            try:
                await self.release(entry)
            except Exception as error:  # noqa: BLE001  (undo goes on past every error)
                errors.append(error)
                self._entries.pop(entry, None)
        return errors

    def remove(self) -> None:
        """Remove the state directory with all that is in it: the sandbox is no more."""
        os.close(self._fd)
        self._fd = -1
        remove_tree(self.directory)

    def _write(self, change: dict[str, object]) -> None:
        line = journalfile.encode(change)
        try:
            if os.write(self._fd, line) != len(line):
                os.ftruncate(self._fd, self._size)  # a part of a line would spoil all that follow
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError as error:
            raise HostError(
                f"cannot write the journal in {self.directory}: {error.strerror}",
                phase="journal",
                hint="make room on the file system of /run",
            ) from error
        self._size += len(line)
