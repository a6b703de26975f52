"""The mark on the children of a shim: an environment variable that says whose they are.

What: `mark_children` sets it for this process, `marked` adds it to a child's environment, `mark_of` reads it
from a process that runs.
Why: between fork and the journal's next line a child runs whose pid nobody wrote down. If its shim dies then,
somebody else must know it for certain: by its command line it could be an administrator's `tail -f` of a
file of the sandbox.
Invariants: whoever has the mark was started by `devices.child`, or by one that was; hooks, loggers and
whatever else is the user's never have it, since they may leave something behind on purpose. Nothing is
imported that `delete` would have to wait for.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["VARIABLE", "mark_children", "mark_of", "marked"]

VARIABLE = "KATA_SHIM_CHILD"

_mark: dict[str, str] = {}


def mark_children(key: str, start: int) -> None:
    """From now on children are marked as those of the sandbox with this key, and of the shim that was started
    at `start` (clock ticks since boot)."""
    _mark[VARIABLE] = f"{key}.{start}"


def marked(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with the mark, if one is set."""
    return {**env, **_mark}


def mark_of(pid: int) -> tuple[str, int]:
    """(key, start) that the process was marked with, ("", 0) if it was not. Raises OSError if it is gone."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        words = file.read().split(b"\0")
    for word in words:
        name, _, value = word.partition(b"=")
        if name == VARIABLE.encode():
            key, _, start = value.decode("ascii", "replace").partition(".")
            return key, int(start) if start.isdigit() else 0
    return "", 0
