"""A process of a dead shim, supervised by the next one: a `Child` that is none of ours.

What: `adopt` makes a `Child` of a process that runs, by its pid and start time, and reads on what it says.
Why: the VMM and its daemons may outlive their shim (`devices.outlive`); whoever takes the VM over watches
them and ends them as their parent did.
Invariants: signals go by a pidfd that was opened before the start time was compared. How it ended nobody
tells who is not its parent: `exited` resolves to `UNKNOWN`, and `describe` says so. Its stderr is a pipe
that it holds open for reading itself (`Child.spawn`), so it lost nothing but what was read before, and a
program that had filled the pipe goes on when we read.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable

from devices.child import Child, process_start_time
from devices.errors import HostError
from devices.undo import Entry, UndoLog

__all__ = ["UNKNOWN", "adopt"]

UNKNOWN = 255


class _Adopted(Child):
    """See the module's docstring."""

    def describe(self) -> str:
        return "ended; nobody saw how" if self.exited.done() else "is running"

    def _reap(self) -> int | None:
        return UNKNOWN


def adopt(
    name: str,
    pid: int,
    start: int,
    *,
    undo: UndoLog,
    entry: Entry,
    on_output: Callable[[bytes], None] | None = None,
) -> Child:
    """The process that `entry` of the undo log records. Raises HostError if it has ended."""
    gone = HostError(f"{name} (pid {pid}) has ended", phase="adopt", code="FAILED_PRECONDITION")
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        raise gone from None
    try:
        if process_start_time(pid) != start:
            raise gone
        stderr = _open_stderr(pid)
    except ProcessLookupError:
        os.close(pidfd)
        raise gone from None
    except BaseException:
        os.close(pidfd)
        raise
    child = _Adopted(name, pid, pidfd, stderr, undo, entry, on_output)
    entry.release = child.kill
    return child


def _open_stderr(pid: int) -> int:
    """The reading end of its stderr, by a description of our own; -1 if that is no pipe."""
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    return -1
