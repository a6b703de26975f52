"""Somebody who changes files beside the code under test, and waits for nobody.

Why a process: a thread shares the interpreter's lock with what it attacks; it may get few tries.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["attacking"]

_COUNT = struct.Struct("=Q")


@contextmanager
def attacking(change: Callable[[int], None]) -> Iterator[Callable[[], int]]:
    """`change` is called again and again with the number of earlier calls that came through; an OSError of it
    is a try that failed. Gives a function that says how many came through."""
    with mmap.mmap(-1, mmap.PAGESIZE) as shared:  # [0:8] how many, [8] whether it is over
        mine = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                done = 0
                while not shared[_COUNT.size] and os.getppid() == mine:
                    try:
                        change(done)
                    except OSError:
                        continue
                    done += 1
                    _COUNT.pack_into(shared, 0, done)
                code = 0
            finally:
                os._exit(code)
        try:
            yield lambda: int(_COUNT.unpack_from(shared)[0])
        finally:
            shared[_COUNT.size] = 1
            _, status = os.waitpid(pid, 0)
        assert status == 0, "the attacker failed"
