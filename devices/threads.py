"""Blocking calls beside the event loop: those that take something, and those that only look.

What: `acquire` for a call that makes, takes, changes or gives back anything on the host; `look` for one that
leaves everything as it is.
Why two: a thread cannot be stopped. Who is cancelled while one mounts must not undo beside it, or the mount
comes after its undo; but who waits for a `stat` of a dead file server must not have to wait for it.
Invariants: `acquire` returns or raises only after its thread has ended; a result that nobody takes any more,
because its caller was cancelled, goes to `lost`. Where no thread can be started (the limit of processes) both
raise HostError, and the call has not been made and never will be. `look` may leave its thread behind; its
threads are others than those of `acquire`: looks that never return cannot keep anything from being given
back. Nothing else in the daemon calls asyncio.to_thread (ruff's TID251 says so).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache, partial
from typing import ParamSpec, TypeVar

from devices.errors import HostError

__all__ = ["acquire", "look", "start", "submit", "to_end"]

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


def start(thread: threading.Thread) -> None:
    """Start it. Raises HostError if there can be no more."""
    try:
        thread.start()
    except RuntimeError as error:
        raise _no_thread() from error


def submit(executor: Executor | None, call: Callable[[], _T]) -> asyncio.Future[_T]:
    """As the loop's `run_in_executor`, with the executor of its own for None. Raises HostError.

    An executor that cannot start the thread it wants has queued the call by then, and a thread that it has
    makes it later, when nobody knows of it any more: so the call is withdrawn.
    """
    done: Future[_T] = Future()

    def work() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001  (it is raised to whoever waits)
            done.set_exception(error)

    loop = asyncio.get_running_loop()
    try:
        loop.run_in_executor(executor, work)
    except RuntimeError as error:
        if done.cancel():
            raise _no_thread() from error
    return asyncio.wrap_future(done, loop=loop)


def _no_thread() -> HostError:
    return HostError(
        "no more threads can be started",
        hint="raise the limit of processes: ulimit -u, the unit's TasksMax, pids.max of the cgroup",
    )


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
    return await to_end(submit(executor, partial(call, *args, **kwargs)), lost)


async def look(call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """`call(*args, **kwargs)` in a thread; it changes nothing, so nobody need wait for it when cancelled."""
    return await submit(_lookers(os.getpid()), partial(call, *args, **kwargs))


@cache
def _lookers(_pid: int) -> ThreadPoolExecutor:
    """A forked copy of this process gets threads of its own."""
    return ThreadPoolExecutor(_LOOKERS, thread_name_prefix="look")
