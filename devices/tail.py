"""The last bytes of a stream that nobody trusts: a child's stderr, a guest's console.

What: `TailBuffer` keeps the newest `limit` bytes and gives the last lines as printable text.
Why: a failed start is explained by these lines; they come from a VMM or a guest, may be endless,
and end up in logs and on terminals.
Invariants: never more than `limit` bytes are kept; `tail` returns nothing but newlines and what
`devices.plain` leaves, so no escape sequence of a guest reaches an operator's terminal.
"""

from __future__ import annotations

from devices.plain import plain_lines

__all__ = ["TailBuffer"]

_LINE_LIMIT = 400  # characters of one line in an error message


class TailBuffer:
    """A byte ring: `write` never fails and never grows beyond `limit` bytes."""

    def __init__(self, limit: int = 64 << 10) -> None:
        self._limit = limit
        self._data = bytearray()
        self.total = 0

    def __len__(self) -> int:
        return len(self._data)

    def write(self, data: bytes) -> None:
        """Append, dropping the oldest bytes."""
        self.total += len(data)
        self._data += data[-self._limit :]
        if len(self._data) > self._limit:
            del self._data[: len(self._data) - self._limit]

    def raw(self) -> bytes:
        """The bytes as they came, escape sequences included."""
        return bytes(self._data)

    def lines(self) -> list[str]:
        """All non-empty lines, cleaned; long lines are cut."""
        lines = plain_lines(self._data.decode("utf-8", "replace"))
        kept = [line.rstrip() for line in lines if line.strip()]
        return [line if len(line) <= _LINE_LIMIT else line[:_LINE_LIMIT] + "..." for line in kept]

    def tail(self, lines: int = 10) -> str:
        """The last of `lines()`, joined by newlines."""
        return "\n".join(self.lines()[-lines:])
