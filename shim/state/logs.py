"""The daemon's log: JSON lines to containerd, by structlog.

What: `configure` points structlog (and the standard library's logging, which asyncio uses) at the
`log` FIFO of the bundle, whose bytes containerd copies to its own log.
Why: one line, one event, machine-readable, with the sandbox in it: {"ts", "level", "msg", "sandbox", ...}.
Invariants:
- Logging never blocks and never raises: while containerd is away nobody drains the FIFO's 64 KiB,
  and what does not fit is dropped (and counted; the next line that fits carries `dropped`).
- One line is one write of at most 4096 bytes (PIPE_BUF), so lines never mix.
- Values of keys that carry secrets (environment, annotations) do not appear, only their names.
- Whoever a value came from, it is plain (`devices.plain`) and bounded; a traceback keeps its lines.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

import structlog

from devices.plain import plain, plain_lines

__all__ = ["configure", "redact", "set_level"]

MAX_LINE = 4096
"""Bytes of one line with its newline: what a pipe takes as one piece."""
_MAX_VALUE = 1024  # characters of one value; two of them and a traceback still fit
_SECRET_KEYS = frozenset({"env", "environ", "environment", "annotations", "secrets", "kernel_params_secret"})
_HIDDEN = "[redacted]"


class LogPipe:
    """The sink: one `write` per line on a descriptor that does not block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.dropped = 0

    def write(self, event: Mapping[str, Any]) -> None:
        """Write one event as a line, or drop it."""
        fields = dict(event)
        if self.dropped:
            fields["dropped"] = self.dropped
        try:
            os.write(self._fd, _encode(fields))
            self.dropped = 0
        except OSError:
            self.dropped += 1

    def msg(self, **event: Any) -> None:
        """structlog's interface of a logger: every level ends here."""
        self.write(event)

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


def _encode(fields: dict[str, Any]) -> bytes:
    line = json.dumps(fields, default=str, ensure_ascii=False).encode("utf-8", "replace")
    if len(line) >= MAX_LINE:
        kept = {
            key: _clip(value, _MAX_VALUE // 4, lines=key == "exception")
            for key, value in list(fields.items())[:12]
        }
        line = json.dumps(kept, default=str).encode()[: MAX_LINE - 1]
    return line + b"\n"


def _clip(value: Any, limit: int, *, lines: bool = False) -> Any:
    if isinstance(value, (int, float, bool)) or value is None:
        return value
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= limit else text[:limit] + "..."
    return "\n".join(plain_lines(text)) if lines else plain(text)


def redact(key: str, value: Any) -> Any:
    """`value` without its secrets if `key` is one that carries them, else as it is."""
    if key.lower() not in _SECRET_KEYS:
        return value
    if isinstance(value, Mapping):
        return dict.fromkeys(map(str, value), _HIDDEN)
    if isinstance(value, (list, tuple)):
        return [f"{str(item).partition('=')[0]}={_HIDDEN}" for item in value]
    return _HIDDEN


class _Shape:
    """The last processor: order the keys, add the constant ones, bound the values, hide the secrets."""

    def __init__(self, constant: Mapping[str, str]) -> None:
        self._constant = constant

    def __call__(
        self, _: Any, method: str, event: MutableMapping[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        fields: dict[str, Any] = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "warning" if method == "warn" else method,
            "msg": _clip(event.pop("event", ""), _MAX_VALUE),
            **self._constant,
        }
        for key, value in event.items():
            trace = key == "exception"
            fields[key] = _clip(redact(key, value), _MAX_VALUE * (1 + trace), lines=trace)
        return (), fields


class _Bridge(logging.Handler):
    """Records of the standard library's logging become lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        exc_info = record.exc_info if record.exc_info and record.exc_info[0] else None
        structlog.get_logger(record.name).log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=exc_info
        )


def configure(bundle: str, *, debug: bool, foreground: bool = False, **fields: str) -> LogPipe:
    """Send everything logged to the FIFO `log` in `bundle`, at level info or debug.

    `fields` appear in every line. Without the FIFO, or in the foreground, stderr is used.
    """
    fd = sys.stderr.fileno() if foreground else _open_fifo(os.path.join(bundle, "log"))
    pipe = LogPipe(fd)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            _Shape(fields),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=lambda *_: pipe,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_Bridge()]
    root.setLevel(logging.INFO if debug else logging.WARNING)
    logging.raiseExceptions = False
    return pipe


_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def set_level(name: str, *, debug: bool) -> None:
    """From now on log at level `name` ([runtime] log_level) and above; `debug` means everything."""
    level = logging.DEBUG if debug else _LEVELS[name]
    structlog.configure(
        **{**structlog.get_config(), "wrapper_class": structlog.make_filtering_bound_logger(level)}
    )
    logging.getLogger().setLevel(logging.INFO if level == logging.DEBUG else max(level, logging.WARNING))


def _open_fifo(path: str) -> int:
    try:
        # Reading too: no reader need be there, and the end of containerd is no EPIPE for us.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return sys.stderr.fileno()
