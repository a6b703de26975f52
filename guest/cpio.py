"""A writer for the initramfs format: cpio's "newc", byte for byte the same for the same tree.

What: `archive(entries)` returns an uncompressed newc archive.
Why not cpio(1): inode numbers, times and order would come from the building machine. Uncompressed,
because unpacking costs an emulated CPU more than reading one more megabyte (docs/guest.md).
Invariants: entries come out sorted by name, numbered from 1, owned by root, with one fixed time.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Entry", "archive", "directory", "file"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One node: its name without a leading slash, its st_mode, its contents (a link's target)."""

    name: str
    mode: int
    data: bytes = b""


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def _pad(size: int) -> bytes:
    return b"\0" * (-size % 4)


def _record(number: int, entry: Entry, time: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, time, len(entry.data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return head + _pad(len(head)) + entry.data + _pad(len(entry.data))


def archive(entries: Iterable[Entry], *, time: int) -> bytes:
    """The archive of these entries; `time` is every node's modification time in seconds.

    Sorting puts a directory before what is in it, which the kernel's unpacker requires. Raises
    ValueError for a name that occurs twice.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    names = [entry.name for entry in ordered]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice in the archive")
    records = [_record(number, entry, time) for number, entry in enumerate(ordered, 1)]
    return b"".join([*records, _record(0, Entry("TRAILER!!!", 0), 0)])
