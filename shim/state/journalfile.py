"""The journal's format on disk: encode a change, read a file, write one anew.

What: one JSON object per line, appended. The first says whose journal it is:
    {"journal": 2, "sandbox": ID, "namespace": NAMESPACE, "address": containerd's, "bundle": DIRECTORY}
and each other one changes what is acquired:
    {"op": "record", "n": 1, "kind": "process", "facts": {"name": "qemu"}}
    {"op": "update", "n": 1, "facts": {"pid": 7, "start": 9}}     facts are added
    {"op": "drop", "n": 1}                                        released, or gone by itself
Version 1 (up to November 2026) named only the sandbox; whose it was is told by the socket that it recorded.
Why apart from `journal`: `delete` reads it after a crash and should not load what the daemon needs.
Invariants:
- A file cut off anywhere reads as what was acknowledged: a last line without its newline that is not whole
  tells of something that had not happened yet. (No proper prefix of a JSON object is JSON, so half a pid is
  never read.)
- A line that is not exactly this format costs what comes after it, never what came before: the reader gets
  that, and hears where the damage is. Nothing is guessed.
- `rewrite` replaces the file as a whole or not at all. What was damaged is kept beside it, and told by every
  later reader, until a person removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from shim.state.identity import Identity

__all__ = [
    "VERSION",
    "History",
    "JournalError",
    "Record",
    "encode",
    "header_of",
    "journal_path",
    "load",
    "read_identity",
    "rewrite",
]

VERSION = 2
MAX_SIZE = 64 << 20
"""Bytes that are read. A writer of version 2 stays far below (`shim.state.journal`)."""
_MAX_HEADER = 64 << 10

Facts = dict[str, str | int]


class JournalError(Exception):
    """Not a journal that this shim knows how to read; the text names file and cause."""


class Record:
    """One thing that was acquired and not yet released."""

    __slots__ = ("facts", "kind", "number")

    def __init__(self, number: int, kind: str, facts: Facts) -> None:
        self.number = number
        self.kind = kind
        self.facts = facts

    def __repr__(self) -> str:
        return f"Record({self.number}, {self.kind!r}, {self.facts!r})"


class History:
    """What a journal tells.

    `records`: what is still acquired, in the order of acquisition. `identity`: whose it is; None for version
    1 and if the first line is lost. `bundle`: that of the container whose `start` made the sandbox. `damage`:
    where it cannot be read any further, "" if all of it could. `socket`: the first one that was recorded,
    even if it is released by now. `has_released`: something that was acquired is not any more (a journal that
    was written anew does not tell). `header`: the first line, for who writes the file anew; {} if it is lost.
    """

    __slots__ = ("bundle", "damage", "has_released", "header", "identity", "records", "socket", "version")

    def __init__(self) -> None:
        self.version = 0
        self.header: dict[str, object] = {}
        self.identity: Identity | None = None
        self.bundle = ""
        self.records: list[Record] = []
        self.damage = ""
        self.socket = ""
        self.has_released = False


def journal_path(directory: str) -> str:
    """The journal of the sandbox whose state is in `directory`."""
    return os.path.join(directory, "journal")


def damaged_path(directory: str) -> str:
    """Where a journal that could not be read to its end is kept."""
    return os.path.join(directory, "journal.damaged")


def header_of(identity: Identity, bundle: str = "") -> dict[str, object]:
    """The first line."""
    return {
        "journal": VERSION,
        "sandbox": identity.sandbox_id,
        "namespace": identity.namespace,
        "address": identity.address,
        "bundle": bundle,
    }


def encode(change: dict[str, object]) -> bytes:
    """One line."""
    return json.dumps(change, separators=(",", ":")).encode() + b"\n"


def encode_record(record: Record) -> bytes:
    """The line that makes this record, with all its facts."""
    return encode({"op": "record", "n": record.number, "kind": record.kind, "facts": record.facts})


def load(directory: str) -> History:
    """What the journal in `directory` tells; an empty history without one.

    Raises JournalError if it is of a version that this shim does not know, OSError if it cannot be read.
    """
    path, kept = journal_path(directory), damaged_path(directory)
    found = os.path.lexists(kept)
    try:
        history = parse(_read(path, MAX_SIZE + 1), path)
    except FileNotFoundError:
        if not found:
            return History()
        history = parse(_read(kept, MAX_SIZE + 1), kept)  # it had just been put aside
    if found and not history.damage:
        history.damage = f"{kept}: what followed the damage is not known"
    return history


def read_identity(directory: str) -> tuple[int, Identity | None]:
    """(version, whose it is) of the journal in `directory`, from its first line alone; (0, None) if that
    cannot be read, (1, None) for one that does not say."""
    for path in (journal_path(directory), damaged_path(directory)):
        try:
            line = _read(path, _MAX_HEADER).partition(b"\n")[0]
        except OSError:
            continue
        history = History()
        try:
            if _take_header(_decode(line.decode("utf-8", "replace")), history):
                return history.version, history.identity
        except JournalError:
            break
    return 0, None


def rewrite(directory: str, header: dict[str, object], lines: Iterable[bytes], *, keep: bool = False) -> int:
    """Replace the journal in `directory` by one of these lines; an open descriptor of it, for appending.

    `keep` leaves the old one as evidence. Raises OSError; the old journal is as it was then.
    """
    path = journal_path(directory)
    temporary = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        data = memoryview(b"".join([encode(header), *lines]))
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
        if keep and not os.path.lexists(damaged_path(directory)):
            os.link(path, damaged_path(directory))
        os.rename(temporary, path)
        _sync(directory)
    except BaseException:
        os.close(fd)
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    return fd


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: str, limit: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        return file.read(limit)


def parse(data: bytes, path: str = "journal") -> History:
    """See `load`."""
    history = History()
    text, spoilt = _text(data)
    records: dict[int, Record] = {}
    last = at = line = 0
    while at < len(text):
        line += 1
        end = text.find("\n", at)
        whole = end >= 0
        piece = text[at : end if whole else len(text)]
        change = _decode(piece)
        at = end + 1 if whole else len(text)
        if change is None and not whole and not spoilt:
            break  # cut off: it was never acknowledged
        if line == 1:
            if not _take_header(change, history, path):
                history.damage = f"{path}:1: does not say whose journal it is: {piece[:80]!r}"
                break
            continue
        last = _apply(change, records, last, history)
        if last < 0:
            history.damage = f"{path}:{line}: not a change that fits what precedes it: {piece[:80]!r}"
            break
    if spoilt and not history.damage:
        history.damage = f"{path}:{line + 1}: not text"
    elif len(data) > MAX_SIZE and not history.damage:
        history.damage = f"{path}: more than {MAX_SIZE} bytes; the rest is not read"
    history.records = list(records.values())
    return history


def _text(data: bytes) -> tuple[str, bool]:
    """As text, up to the line with the first byte that is none; and whether there was one."""
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        return data[: data.rfind(b"\n", 0, error.start) + 1].decode(), True


def _decode(line: str) -> dict[str, object] | None:
    try:
        change = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return change if isinstance(change, dict) else None


def _take_header(change: dict[str, object] | None, history: History, path: str = "journal") -> bool:
    """Whether that was a first line. Raises JournalError if it is of another version."""
    version = change.get("journal") if change is not None else None
    if change is None or not isinstance(version, int) or isinstance(version, bool):
        return False
    if version not in (1, VERSION):
        raise JournalError(
            f"{path}: version {version} of the format; this shim knows version {VERSION};"
            " try: the shim that wrote it"
        )
    if version == VERSION:
        texts = [change.get(key) for key in ("address", "namespace", "sandbox")]
        address, namespace, sandbox = (text if isinstance(text, str) else None for text in texts)
        if address is None or not namespace or not sandbox:
            return False
        history.identity = Identity(address, namespace, sandbox)
        history.bundle = str(change.get("bundle", ""))
    history.version, history.header = version, change
    return True


def _apply(change: dict[str, object] | None, records: dict[int, Record], last: int, history: History) -> int:
    """Apply one change; the highest record number so far, -1 if it does not fit."""
    if change is None:
        return -1
    op, number, kind = change.get("op"), change.get("n"), change.get("kind")
    facts = _facts(change.get("facts", {}))
    if type(number) is not int or facts is None:
        return -1
    if op == "record" and isinstance(kind, str) and number > last:
        records[number] = Record(number, kind, facts)
        if kind == "socket" and not history.socket:
            history.socket = str(facts.get("path", ""))
        return number
    if op == "update" and number in records:
        records[number].facts.update(facts)
    elif op == "drop" and number in records:
        del records[number]
        history.has_released = True
    else:
        return -1
    return last


def _facts(value: object) -> Facts | None:
    if not isinstance(value, dict):
        return None
    for item in value.values():
        if type(item) is not str and type(item) is not int:
            return None
    return value
