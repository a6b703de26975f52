"""scripts/releases.txt read by Python: what this host's release calls things.

Invariants: setup.sh reads the same table; a release that is not in it is an error which names those that are.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["RELEASES", "host_release", "read"]

TABLE = Path(__file__).with_name("releases.txt")


def rows(text: str) -> list[list[str]]:
    """The words of each row, without the "package" of some."""
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return [line[1:] if line[0] == "package" else line for line in lines if line]


def host_release(os_release: str) -> str:
    """The column of a host with this /etc/os-release. Raises LookupError."""
    facts = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    name = f"{facts.get('ID', '')}-{facts.get('VERSION_ID', '')}"
    if name == "debian-":
        name = "debian-14"
    if name not in RELEASES:
        raise LookupError(f"{name} is no release of {', '.join(RELEASES)}")
    return name


def read(release: str) -> dict[str, str]:
    """The release's column: row -> value, "=" replaced by the row's name. Raises LookupError."""
    if release not in RELEASES:
        raise LookupError(f"{release} is no release of {', '.join(RELEASES)}")
    at = RELEASES.index(release) + 1
    return {row[0]: row[0] if row[at] == "=" else row[at] for row in rows(TABLE.read_text())[1:]}


RELEASES = tuple(rows(TABLE.read_text())[0][1:])
"""All that the table has, the oldest Debian first."""
