"""When a process's stdin begins: at Start, and what it means that nobody feeds it then.

What: `attend` decides, for the FIFO that was opened at Start, whether it stays open until CloseIO.
Why at Start, not at Create: a client's write waits for the FIFO's reader, so it cannot come to the end of
its input before it knows the task that it is to say CloseIO to. `ctr run` forgets to say it otherwise: up to
64 KiB in a pipe never ended there (nor do they with runc's shim, which opens at Create).
Why a decision: `ctr` with an empty input has closed its end before there is a task, says nothing ever, and
the process would wait for ever. A client that was attached at Start (it waits in its open, or has written)
may go and come, and only CloseIO ends stdin. Nobody there, within `GRACE` of the start, while a client reads
the output, is an empty input: stdin ends. Nobody there at all is a detached task: stdin stays open, for who
attaches later.
Invariants: a terminal's stdin, and a stream's (`shim.stdio.stream`), are never ended by this. CloseIO ends
the wait.
Source: containerd's cmd/ctr/commands/tasks (stdinCloser) and fifo package; fifo(7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shim.stdio.ends import InputEnd, OutputEnd
from shim.stdio.pump import readable

__all__ = ["GRACE", "attend"]

GRACE = 2.0
"""Seconds after Start in which a client may still open stdin; containerd's own do so before Create."""


async def attend(source: InputEnd, outputs: Sequence[OutputEnd | None], closed: asyncio.Event) -> None:
    """Hold `source` open until CloseIO (`closed`), unless its client has gone with nothing to say."""
    if not source.someone_writes():
        await _until_any(source, closed)
        if not source.someone_writes() and any(out is not None and out.someone_reads() for out in outputs):
            return
    if not closed.is_set():
        source.keep()


async def _until_any(source: InputEnd, closed: asyncio.Event) -> None:
    """Until somebody has written, has come and gone, or CloseIO was said; `GRACE` at most."""
    waits = [asyncio.ensure_future(readable(source.fd)), asyncio.ensure_future(closed.wait())]
    try:
        await asyncio.wait(waits, timeout=GRACE, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
