"""Versions of the programs around a VM that are known to be bad, and why: for `kata-ctl check`.

What: `why_bad` looks up what a program says of its version.
Invariants: a row is a published fault of that program which matters here; what this project works around by
itself (docs/hosts.md) is no row. A version that cannot be read is not judged.
Source: the CVE records named in the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from devices.versions import parse

__all__ = ["Bad", "why_bad"]

_Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bad:
    """What is wrong with a version, and what to do."""

    reason: str
    hint: str


def _jailer(version: _Numbers) -> bool:
    return version <= (1, 13, 1) or version == (1, 14, 0)


_JAILER = Bad(
    "CVE-2026-1386: its jailer follows links in the directory that it fills, as root",
    "update Firecracker to 1.13.2, or to 1.14.1 or later",
)
_TABLE: tuple[tuple[str, Callable[[_Numbers], bool], Bad], ...] = (
    ("Firecracker", _jailer, _JAILER),
    ("Jailer", _jailer, _JAILER),
    (
        "virtiofsd version",  # QEMU's, in C; the other one says no "version"
        lambda version: version < (5, 2, 50),
        Bad(
            "CVE-2020-35517: root of a guest opens the host's devices in the shared directory",
            "update QEMU to 6.0 or later",
        ),
    ),
    (
        "QEMU emulator",
        lambda version: version < (7, 2),
        Bad("older than all that this project is tried with", "update QEMU to 7.2 or later"),
    ),
)


def why_bad(said: str) -> Bad | None:
    """For the first line of `PROGRAM --version`."""
    numbers = parse(said).numbers
    for name, matches, bad in _TABLE:
        if numbers and said.lower().startswith(name.lower()) and matches(numbers):
            return bad
    return None
