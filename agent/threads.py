"""Blocking calls beside the agent's loop.

Why: what touches a file system may wait for ever (a dead virtiofsd), and the agent must go on answering.
Invariants: a call has a deadline; one that is late keeps its thread, and nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import TypeVar

from ttrpc import Code, RpcError

__all__ = ["MOUNT_DEADLINE", "in_thread"]

MOUNT_DEADLINE = 30.0  # seconds; a dead virtiofsd would make mount(2) wait for ever

_NO_MORE = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
_T = TypeVar("_T")


async def in_thread(what: str, call: Callable[[], _T], deadline: float = MOUNT_DEADLINE) -> _T:
    """Run a blocking call beside the loop. OSError becomes RpcError with its text: RESOURCE_EXHAUSTED where
    the guest has no more of something, else FAILED_PRECONDITION."""
    loop = asyncio.get_running_loop()
    try:
        return await asyncio.wait_for(loop.run_in_executor(None, call), deadline)
    except TimeoutError:
        raise RpcError(Code.DEADLINE_EXCEEDED, f"{what}: no answer within {deadline:g} s") from None
    except OSError as error:
        code = Code.RESOURCE_EXHAUSTED if error.errno in _NO_MORE else Code.FAILED_PRECONDITION
        raise RpcError(code, f"{what}: {error.strerror}") from None
