"""The journal's format on disk: encode a change, load a file.

What: one JSON object per line, appended. The first is the header {"journal": 1, "sandbox": ID}; then
    {"op": "record", "n": 1, "kind": "process", "facts": {"name": "qemu"}}
    {"op": "update", "n": 1, "facts": {"pid": 7, "start": 9}}     facts are added
    {"op": "drop", "n": 1}                                        released, or gone by itself
Why apart from `journal`: `delete` reads it after a crash and should not load what the daemon needs.
Invariants:
- A file cut off anywhere loads: a last line without its newline that is not whole was never
  acknowledged, so what it tells had not happened yet. (No proper prefix of a JSON object is JSON, so
  half a pid is never read.)
- Anything else that is not exactly this format is refused as a whole. Nothing is guessed.
"""

from __future__ import annotations

import json
import os

__all__ = ["VERSION", "JournalError", "Record", "encode", "journal_path", "load"]

VERSION = 1
MAX_SIZE = 64 << 20
"""Bytes; a sandbox writes some hundred per device."""

Facts = dict[str, str | int]


class JournalError(Exception):
    """The journal cannot be used; the text names file, line and cause."""


class Record:
    """One thing that was acquired and not yet released."""

    __slots__ = ("facts", "kind", "number")

    def __init__(self, number: int, kind: str, facts: Facts) -> None:
        self.number = number
        self.kind = kind
        self.facts = facts

    def __repr__(self) -> str:
        return f"Record({self.number}, {self.kind!r}, {self.facts!r})"


def journal_path(directory: str) -> str:
    """The journal of the sandbox whose state is in `directory`."""
    return os.path.join(directory, "journal")


def encode(change: dict[str, object]) -> bytes:
    """One line."""
    return json.dumps(change, separators=(",", ":")).encode() + b"\n"


def load(directory: str) -> list[Record]:
    """What the journal in `directory` says is still acquired, in the order of acquisition.

    Without a journal: []. Raises JournalError if it is of another version or damaged.
    """
    path = journal_path(directory)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        return []
    if len(data) > MAX_SIZE:
        raise JournalError(f"{path} has more than {MAX_SIZE} bytes")
    return parse(data, path)


def parse(data: bytes, path: str = "journal") -> list[Record]:
    """See `load`."""
    lines = data.split(b"\n")
    cut_off = lines.pop()  # b"" when the file ends with a newline
    records: dict[int, Record] = {}
    last = 0
    for number, line in enumerate(lines, 1):
        change = _decode(line)
        if change is None:
            raise JournalError(f"{path}:{number}: not a line of a journal: {line[:80]!r}")
        last = _apply(change, records, last, number, path)
    change = _decode(cut_off)
    if change is not None:
        _apply(change, records, last, len(lines) + 1, path)
    return list(records.values())


def _decode(line: bytes) -> dict[str, object] | None:
    try:
        change = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return change if isinstance(change, dict) else None


def _apply(change: dict[str, object], records: dict[int, Record], last: int, line: int, path: str) -> int:
    """Apply one change; returns the highest record number so far."""
    if line == 1:
        version = change.get("journal")
        if version != VERSION or isinstance(version, bool):
            raise JournalError(
                f"{path}: version {version!r} of the format; this shim knows version {VERSION};"
                " try: the shim that wrote it"
            )
        return last
    op, number, kind = change.get("op"), change.get("n"), change.get("kind")
    facts = _facts(change.get("facts", {}))
    if not isinstance(number, int) or isinstance(number, bool) or facts is None:
        raise JournalError(f"{path}:{line}: malformed")
    if op == "record" and isinstance(kind, str) and number > last:
        records[number] = Record(number, kind, facts)
        return number
    if op == "update" and number in records:
        records[number].facts.update(facts)
    elif op == "drop" and number in records:
        del records[number]
    else:
        raise JournalError(f"{path}:{line}: {op!r} of {number} does not fit what precedes it")
    return last


def _facts(value: object) -> Facts | None:
    if not isinstance(value, dict):
        return None
    facts: Facts = {}
    for key, item in value.items():
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            return None
        facts[key] = item
    return facts
