"""What one Firecracker says: its log and its metrics.

What: `Report` reads the two FIFOs, keeps the tails as evidence, and asks for the metrics.
Why: an error must carry the last words of the VMM and of the guest; they come by three ways.
Invariants: nothing here blocks; what is said is bounded and is somebody else's text.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import structlog

from devices import foreign_json
from devices.child import process_stat
from devices.lines import LineLog
from hypervisors.firecracker.fifo import Fifo, LineFifo
from hypervisors.firecracker.jail import Den
from hypervisors.http_api import HttpApi

__all__ = ["LOG", "METRICS", "Report"]

LOG, METRICS = "log.fifo", "metrics.fifo"  # in the den
_DEADLINE = 10.0  # seconds
_LEVELS = {":ERROR]": "error", ":WARN]": "warning"}

_log = structlog.get_logger("firecracker")


class Report:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._console = LineLog("console", lambda line: _log.debug("console", line=line))
        self._words = LineLog("firecracker", _say)
        self._log: Fifo | None = None
        self._metrics: LineFifo | None = None
        self._numbers: asyncio.Future[dict[str, Any]] | None = None

    def open(self, den: Den) -> None:
        """Read the den's FIFOs, which exist. Raises OSError."""
        self._log = Fifo(den.path(LOG), self._words.write)
        self._metrics = LineFifo(den.path(METRICS), self._on_metrics)

    def close(self) -> None:
        """Stop reading. Idempotent."""
        for fifo in (self._log, self._metrics):
            if fifo is not None:
                fifo.close()

    @property
    def log_tail(self) -> str:
        """Firecracker's last words; what is still in the FIFO counts."""
        if self._log is None:
            return ""
        self._log.drain()
        return self._log.tail.tail()

    async def metrics(self, api: HttpApi, pid: int) -> dict[str, float]:
        """CPU seconds and resident bytes from /proc, and Firecracker's own counters, `group_name` each."""
        found: dict[str, float] = {"processes": 0.0}
        with contextlib.suppress(ProcessLookupError):
            fields = process_stat(pid)
            found["processes"] = 1.0
            found["cpu_seconds_total"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found["resident_bytes"] = float(int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
        self._numbers = asyncio.get_running_loop().create_future()
        await api.put("/actions", {"action_type": "FlushMetrics"}, timeout=_DEADLINE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEADLINE):
                for group, values in (await self._numbers).items():
                    if isinstance(values, dict):
                        found |= {
                            f"{group}_{name}": float(value)
                            for name, value in values.items()
                            if isinstance(value, int | float)
                        }
        return found

    def on_console(self, data: bytes) -> None:
        """Pass the serial port's text on to the log."""
        self._console.write(data)

    def _on_metrics(self, line: bytes) -> None:
        if self._numbers is not None and not self._numbers.done():
            with contextlib.suppress(ValueError):
                numbers = foreign_json.loads(line)
                if isinstance(numbers, dict):
                    self._numbers.set_result(numbers)


def _say(text: str) -> None:
    level = next((name for word, name in _LEVELS.items() if word in text), "debug")
    getattr(_log, level)("log", line=text)
