"""Short lines on stderr, which is the guest's serial console when the agent is PID 1.

Why not `logging`: the serial port of an emulated machine costs milliseconds per line, so the agent
is silent unless something is wrong or `agent.log=debug` was asked for.
"""

from __future__ import annotations

import os

__all__ = ["debug", "error", "set_debug"]

_LIMIT = 1000  # characters per line: the text may come from a container
_state = {"debug": False}


def set_debug(wanted: bool) -> None:
    """Turn debug lines on or off."""
    _state["debug"] = wanted


def _write(level: str, text: str) -> None:
    line = " ".join(text.split())[:_LIMIT]
    try:
        os.write(2, f"agent: {level}: {line}\n".encode(errors="replace"))
    except OSError:
        return  # no console: nobody to tell


def error(text: str) -> None:
    """Something failed that no caller will be told about."""
    _write("error", text)


def debug(text: str) -> None:
    """A step was taken; only with `agent.log=debug`."""
    if _state["debug"]:
        _write("debug", text)
