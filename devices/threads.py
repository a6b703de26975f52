"""Blocking calls beside the event loop: those that take something, and those that only look.

What: `acquire` for a call that makes, takes, changes or gives back anything on the host; `look` for one that
leaves everything as it is.
Why two: a thread cannot be stopped. Who is cancelled while one mounts must not undo beside it, or the mount
comes after its undo; but who waits for a `stat` of a dead file server must not have to wait for it.
Invariants: `acquire` returns or raises only after its thread has ended; a result that nobody takes any more,
because its caller was cancelled, goes to `lost`. `look` may leave its thread behind; its threads are others
than those of `acquire`: looks that never return cannot keep anything from being given back. Nothing else in
the daemon calls asyncio.to_thread (ruff's TID251 says so).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache, partial
from typing import ParamSpec, TypeVar

__all__ = ["acquire", "look", "to_end"]

_LOOKERS = 16  # threads: so many looks may hang in dead file systems before further ones wait for them

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def to_end(work: asyncio.Future[_T], lost: Callable[[_T], object] | None = None) -> _T:
    """What `work`, which cannot be stopped, answers. Cancelled, it ends first, and `lost` gets its answer."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if work.cancelled() or work.exception() is not None:
            raise  # asked for, so that asyncio does not complain that nobody did
        if lost is not None:
            lost(work.result())
        raise


async def acquire(
    call: Callable[..., _T],
    /,
    *args: object,
    lost: Callable[[_T], object] | None = None,
    executor: Executor | None = None,
    **kwargs: object,
) -> _T:
    """`call(*args, **kwargs)` in a thread, to its end whatever becomes of the caller.

    `lost` undoes a call whose caller was cancelled meanwhile, where nothing else does (an undo log's entry,
    which was made before, needs none): such as os.close for a call that opens.
    """
    loop = asyncio.get_running_loop()
    return await to_end(loop.run_in_executor(executor, partial(call, *args, **kwargs)), lost)


async def look(call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`call(*args, **kwargs)` in a thread; it changes nothing, so nobody need wait for it when cancelled."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_lookers(os.getpid()), partial(call, *args, **kwargs))


@cache
def _lookers(_pid: int) -> ThreadPoolExecutor:
    """A forked copy of this process gets threads of its own."""
    return ThreadPoolExecutor(_LOOKERS, thread_name_prefix="look")
