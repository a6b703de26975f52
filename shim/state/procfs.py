"""Processes by pid and start time: look, kill, and see to an end.

Why: a pid alone names nothing once its process is gone; with field 22 of /proc/PID/stat it names one
process for as long as the host runs.
Invariants: a signal goes through a pidfd that was opened *before* the start time was compared, so it
reaches that very process or nobody.
"""

from __future__ import annotations

import os

__all__ = ["end_process", "is_running", "kill_process", "start_time", "stat"]

_SIGKILL, _SIGTERM = 9, 15


def stat(pid: int) -> tuple[str, int, int]:
    """(state, parent's pid, start time in clock ticks) of `pid`. Raises ProcessLookupError."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(3, "no such process", str(pid)) from None
    fields = text[text.rindex(b")") + 2 :].split()  # the name may hold blanks and parentheses
    return fields[0].decode(), int(fields[1]), int(fields[19])


def start_time(pid: int) -> int:
    """When `pid` was started, in clock ticks since boot. Raises ProcessLookupError."""
    return stat(pid)[2]


def is_running(pid: int, start: int) -> bool:
    """Whether that process exists and is no zombie."""
    try:
        state, _, started = stat(pid)
    except ProcessLookupError:
        return False
    return started == start and state not in "ZX"


def kill_process(pid: int, start: int, timeout: float) -> bool:
    """SIGKILL the process and wait until it ended; whether it did within `timeout` seconds.

    A process that is gone, or another one under the same pid, counts as ended. Blocks.
    """
    return _end(pid, start, ((_SIGKILL, timeout),))


def end_process(pid: int, start: int, timeout: float) -> bool:
    """As `kill_process`, for one that is about to end: half of the time is its own, then it is asked by
    SIGTERM, and after another quarter killed."""
    return _end(pid, start, ((0, timeout / 2), (_SIGTERM, timeout / 4), (_SIGKILL, timeout / 4)))


def _end(pid: int, start: int, steps: tuple[tuple[int, float], ...]) -> bool:
    """Each step is a signal (0: none) and the seconds to wait after it."""
    import select
    import signal

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if not is_running(pid, start):
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        for number, seconds in steps:
            try:
                signal.pidfd_send_signal(fd, number)
            except ProcessLookupError:
                return True
            if poll.poll(seconds * 1000):
                return True
        return False
    finally:
        os.close(fd)
