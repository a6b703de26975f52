"""The file that says a guest does not answer: `health.json` in its sandbox's state directory.

What: `write`, `clear`, and `read` for whoever looks from outside (`kata-ctl list`).
Why a file: it can be read when the shim hangs too, and nobody has to ask it.
Invariants: it is there while the guest is unresponsive and at no other time; a reader sees all of it or
nothing; what is read is bounded, and no reader fails by what stands in it.
"""

from __future__ import annotations

import contextlib
import json  # to write; what is read goes through foreign_json
import os
from dataclasses import dataclass

from devices import foreign_json
from shim.state.bundle import write_atomically

__all__ = ["NAME", "Silence", "clear", "read", "write"]

NAME = "health.json"
_LIMIT = 16 << 10  # bytes


@dataclass(frozen=True, slots=True)
class Silence:
    """Since when it does not answer, in seconds of the epoch, and how one knows."""

    since: float
    why: str


def write(directory: str, silence: Silence) -> None:
    """Raises OSError. Blocks."""
    text = json.dumps({"since": silence.since, "why": silence.why[: _LIMIT // 16]})
    write_atomically(directory, NAME, text + "\n")


def clear(directory: str) -> None:
    """It answers again. Idempotent. Raises OSError. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, NAME))


def read(directory: str) -> Silence | None:
    """None for a guest of which nothing bad is known, and for a file that is none. Blocks."""
    try:
        fd = os.open(
            os.path.join(directory, NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
        try:
            document = foreign_json.loads(os.read(fd, _LIMIT))
        finally:
            os.close(fd)
        since, why = document["since"], document["why"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if type(since) not in (int, float) or not isinstance(why, str):
        return None
    return Silence(float(since), why)
