"""Lines that somebody else says, on their way to our log: within a budget, and told what is left out.

What: `LineLog` cuts a stream into lines and passes them on, some at a time; `Budget` is its allowance, for
whoever logs events of somebody else. One for each source, so that one's flood takes nothing from another's.
Why: a VMM, or a guest through it, says 30,000 lines in one read. The loop stood for seconds while they were
logged, and containerd's log grew as fast as a guest liked.
Invariants:
- At once `BURST` lines, which is more than a kernel's boot has; in the long run `RATE` a second. What exceeds
  this is counted, and told once a second at most ("lines left out").
- One turn of the loop logs at most `PIECE` lines of a source.
- At most `BURST` lines of `LENGTH` characters wait. A longer line is cut, one that is cut by two reads is put
  together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

__all__ = ["BURST", "LENGTH", "PIECE", "RATE", "Budget", "LineLog"]

BURST = 1000
RATE = 20.0
PIECE = 25
LENGTH = 500
_TELL = 1.0  # seconds between two lines about what is left out

_log = structlog.get_logger("lines")


class Budget:
    """How much of one source may be logged. `what`: what is counted, "lines"."""

    def __init__(self, source: str, what: str = "lines") -> None:
        self._source = source
        self._what = what
        self._left = float(BURST)
        self._at = 0.0
        self._left_out = 0
        self._teller: asyncio.TimerHandle | None = None

    def take(self, wanted: int = 1) -> int:
        """How many of `wanted` may be logged now; the others will be told as left out. On the loop."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._left = min(BURST, self._left + (now - self._at) * RATE)
        self._at = now
        taken = min(wanted, int(self._left))
        self._left -= taken
        if taken < wanted:
            self._left_out += wanted - taken
            if self._teller is None:
                self._teller = loop.call_later(_TELL, self.tell)
        return taken

    def tell(self) -> None:
        """Say now what has been left out since it was said last, if anything."""
        if self._teller is not None:
            self._teller.cancel()
            self._teller = None
        if self._left_out:
            _log.warning(f"{self._left_out} {self._what} left out", source=self._source)
            self._left_out = 0


class LineLog:
    """Passes a source's lines to `say`, cut and without the empty ones. Call it on the loop."""

    def __init__(self, source: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._budget = Budget(source)
        self._partial = b""
        self._waiting: deque[bytes] = deque()
        self._running = False

    def write(self, data: bytes) -> None:
        """The next bytes of the stream; none of them are its end."""
        if not data:
            self._end()
            return
        count = data.count(b"\n")
        if not count:
            self._partial = (self._partial + data[:LENGTH])[: 4 * LENGTH]  # bytes of a character
            return
        taken = self._budget.take(count)
        *lines, rest = data.split(b"\n", taken)
        if lines:
            lines[0] = self._partial + lines[0]
            self._waiting.extend(line[: 4 * LENGTH] for line in lines if line.strip())
        self._partial = rest[rest.rfind(b"\n") + 1 :][: 4 * LENGTH]
        self._pass_on()

    def _end(self) -> None:
        """The last line may lack its newline. What waits is still passed on."""
        if self._partial:
            self.write(b"\n")
        self._budget.tell()

    def _pass_on(self) -> None:
        if self._waiting and not self._running:
            self._running = True
            asyncio.get_running_loop().call_soon(self._some)

    def _some(self) -> None:
        self._running = False
        for _ in range(min(PIECE, len(self._waiting))):
            self._say(self._waiting.popleft().decode("utf-8", "replace").rstrip()[:LENGTH])
        self._pass_on()
