"""The undo log with its copy on disk.

What: `Journal` implements `devices.undo.UndoLog`: what a sandbox acquires is written to
<state dir>/journal before it is used, and undone in reverse.
Why: after kill -9 nobody remembers; `delete` reads the file and undoes the same things.
Invariants:
- `record`, `update`, `forget` and `release` return after fsync (the file lives on a tmpfs, where that is a
  no-op of microseconds, so they may be called on the event loop).
- One writer: whatever thread a change comes from, it gets its number and its line under one lock. There is
  one journal to a state directory, because its owner has that directory's lock (`shim.state.statedir`).
- What is acquired is in the file. What could not be written did not happen: the caller hears it (HostError),
  and the file ends with the last whole line; where even that failed, the next change writes the file anew
  first. Only that something is gone may come late: to release it twice does no harm, so nobody hears of it.
- It stays below `_SLACK` plus twice what is acquired: then it is written anew, with the live records only.
- A release that failed stays in the file, for `delete` to try again, and is not tried twice here.
"""

from __future__ import annotations

import errno
import inspect
import os
import threading
from collections.abc import Callable
from functools import partial

from devices.errors import HostError
from devices.threads import acquire
from devices.undo import Entry, Release
from shim.state import journalfile, releases
from shim.state.identity import Identity

__all__ = ["Journal"]

_SLACK = 128 << 10
"""Bytes of released records below which the file is not written anew."""
_MAX_LIVE = 16 << 20
"""Bytes of what is acquired at once: some 100 000 mounts. `delete` reads that in a second or two."""


class Journal:
    """The journal of one sandbox. Made by `create`."""

    def __init__(self, directory: str, header: dict[str, object], fd: int) -> None:
        self.directory = directory
        self._header = header
        self._fd = fd
        self._lock = threading.Lock()
        self._entries: dict[Entry, int] = {}
        self._failed: dict[Entry, int] = {}  # could not be released; `release_all` tries once more
        self._lines: dict[int, bytes] = {}  # what the file would be if it were written anew
        self._live = 0  # bytes of those
        self._last = 0
        self._size = os.fstat(fd).st_size
        self._next_look = _SLACK
        self._spoilt = False  # the file's end is not as it should be
        self._stale = False  # the file has a record of something that is gone

    @classmethod
    def create(cls, directory: str, identity: Identity, bundle: str = "") -> Journal:
        """An empty journal in `directory`, which belongs to the caller.

        Raises HostError if there is a journal already that still records something, or cannot be read: an
        earlier shim of the same sandbox, after which neither `delete` nor the start of this one cleaned up.
        """
        try:
            left = journalfile.load(directory)
        except (journalfile.JournalError, OSError) as error:
            raise HostError(str(error), phase="journal", hint=_by_hand(directory)) from error
        if left.identity not in (None, identity):
            raise HostError(
                f"{directory} is that of {left.identity}", phase="journal", hint=_by_hand(directory)
            )
        if left.damage:
            raise HostError(
                f"the journal of an earlier shim of {identity} is damaged: {left.damage}",
                phase="journal",
                hint=_by_hand(directory),
                code="FAILED_PRECONDITION",
            )
        if left.records:
            raise HostError(
                f"{directory} still records {len(left.records)} things of an earlier shim of {identity}",
                phase="journal",
                hint=f"`{_delete_command(identity)}` tries again and says what cannot be undone",
                code="ALREADY_EXISTS",
            )
        header = journalfile.header_of(identity, bundle)
        try:
            return cls(directory, header, journalfile.rewrite(directory, header, ()))
        except OSError as error:
            raise _cannot_write(directory, error) from error

    @classmethod
    def adopt(
        cls, directory: str, identity: Identity, release: Callable[[journalfile.Record], None]
    ) -> Journal:
        """The journal in `directory`, which belongs to the caller, with all that a dead daemon acquired but
        its socket. `release` undoes a record, in a thread.

        Raises HostError for one that is another sandbox's, or cannot be read to its end.
        """
        try:
            left = journalfile.load(directory)
        except (journalfile.JournalError, OSError) as error:
            raise HostError(str(error), phase="journal", hint=_by_hand(directory)) from error
        if left.identity != identity or left.damage:
            why = f"is damaged: {left.damage}" if left.damage else f"is that of {left.identity}"
            raise HostError(f"the journal in {directory} {why}", phase="journal", hint=_by_hand(directory))
        header = journalfile.header_of(identity, left.bundle)
        kept = [record for record in left.records if not _is_of_the_daemon(record, left.socket)]
        lines = {record.number: journalfile.encode_record(record) for record in kept}
        try:
            journal = cls(directory, header, journalfile.rewrite(directory, header, lines.values()))
        except OSError as error:
            raise _cannot_write(directory, error) from error
        for record in kept:
            entry = Entry(record.kind, record.facts, partial(acquire, release, record))
            journal._entries[entry] = record.number
            journal._keep(record.number, lines[record.number])
            journal._last = max(journal._last, record.number)
        return journal

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is acquired now, in the order of acquisition."""
        with self._lock:
            return tuple(self._entries)

    def record(self, kind: str, release: Release | None = None, **facts: str | int) -> Entry:
        """See `UndoLog.record`. Raises HostError when it cannot be written down."""
        entry = Entry(kind, dict(facts), release)
        with self._lock:
            number = self._last + 1
            line = journalfile.encode_record(journalfile.Record(number, kind, entry.facts))
            if self._live + len(line) > _MAX_LIVE:
                raise HostError(
                    f"this sandbox holds {len(self._lines)} things already: more is not written down",
                    phase="journal",
                    code="RESOURCE_EXHAUSTED",
                )
            self._write(line)
            self._last = number
            self._keep(number, line)
            self._entries[entry] = number
        return entry

    def update(self, entry: Entry, **facts: str | int) -> None:
        """See `UndoLog.update`. Raises HostError when it cannot be written down; nothing is updated then."""
        with self._lock:
            number = self._entries.get(entry)
            if number is not None:
                self._write(journalfile.encode({"op": "update", "n": number, "facts": facts}))
            entry.facts.update(facts)
            if number is not None:
                record = journalfile.Record(number, entry.kind, entry.facts)
                self._keep(number, journalfile.encode_record(record))

    def forget(self, entry: Entry) -> None:
        """See `UndoLog.forget`."""
        with self._lock:
            number = self._entries.pop(entry, None)
            if number is not None:
                self._drop(number)

    async def release(self, entry: Entry) -> None:
        """See `UndoLog.release`. Raises what the release raises; it is then left to `release_all`, and to
        `delete`."""
        with self._lock:
            number = self._entries.pop(entry, None)
        if number is None:
            return
        try:
            if entry.release is None:
                record = journalfile.Record(number, entry.kind, entry.facts)
                await acquire(releases.release, record)
            else:
                outcome = entry.release()
                if inspect.isawaitable(outcome):
                    await outcome
        except BaseException:
            with self._lock:
                self._failed[entry] = number
            raise
        with self._lock:
            self._drop(number)

    async def release_all(self) -> list[Exception]:
        """Release everything in reverse order, what failed before too, going on past errors; returns them."""
        errors: list[Exception] = []
        with self._lock:
            every = {**self._entries, **self._failed}
            self._entries = dict(sorted(every.items(), key=lambda pair: pair[1]))
            self._failed.clear()
        while entries := self.entries:
            try:
                await self.release(entries[-1])
            except Exception as error:  # noqa: BLE001  (undo goes on past every error)
                errors.append(error)
        return errors

    def close(self) -> None:
        """Write no more. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    # --- under the lock

    def _keep(self, number: int, line: bytes) -> None:
        self._live += len(line) - len(self._lines.get(number, b""))
        self._lines[number] = line

    def _drop(self, number: int) -> None:
        try:
            # Before the line is forgotten: a file that is written anew here must have what is dropped.
            self._write(journalfile.encode({"op": "drop", "n": number}))
        except HostError:
            self._stale, self._next_look = True, 0
        self._live -= len(self._lines.pop(number))

    def _write(self, line: bytes) -> None:
        try:
            if self._fd < 0:
                raise OSError(errno.EBADF, "it is closed")
            if self._spoilt or self._size + len(line) > self._next_look:
                self._compact()
            self._append(line)
        except OSError as error:
            raise _cannot_write(self.directory, error) from error

    def _append(self, line: bytes) -> None:
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError:
            # What was not acknowledged must not be found, and a part of a line would cost all that follow.
            try:
                os.ftruncate(self._fd, self._size)
            except OSError:
                self._spoilt = True
            raise
        self._size += len(line)

    def _compact(self) -> None:
        """Write the file anew if that is worth it, or must be. Raises OSError only in the second case."""
        if self._spoilt or self._stale or self._size > _SLACK + 2 * self._live:
            try:
                fd = journalfile.rewrite(self.directory, self._header, self._lines.values())
            except OSError:
                if self._spoilt:
                    raise
                self._next_look = self._size + _SLACK  # go on with the file as it is
                return
            os.close(self._fd)
            self._fd, self._spoilt, self._stale = fd, False, False
            self._size = os.fstat(fd).st_size
        self._next_look = max(_SLACK + 2 * self._live, self._size + _SLACK // 4)


def _is_of_the_daemon(record: journalfile.Record, socket: str) -> bool:
    if record.kind == "process":
        return record.facts.get("name") == "shim"
    return record.kind == "socket" and record.facts.get("path") == socket


def _cannot_write(directory: str, error: OSError) -> HostError:
    return HostError(
        f"cannot write the journal in {directory}: {error.strerror}",
        phase="journal",
        hint="make room on the file system of /run",
    )


def _delete_command(identity: Identity) -> str:
    flags = f"-namespace {identity.namespace} -address {identity.address} -id {identity.sandbox_id}"
    return f"containerd-shim-kata-v2 {flags} delete"


def _by_hand(directory: str) -> str:
    return f"see what it records and whether that is still there, then remove {directory}"
