"""Settles the memory of a process that is about to be forked, so that its pages stay shared.

What: `settle` collects garbage once, takes what is left out of the collector's sight, and fills the gaps of
CPython's pools of small objects.
Why: a child that makes an object in a gap between two old ones gets a copy of the whole page; where there are
no gaps, new objects lie together on pages of their own.
Invariants: what fills the gaps is kept for ever; it holds no byte of anybody's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

__all__ = ["settle"]

_POOL = 16 << 10  # bytes of a pool of CPython's allocator since 3.10
_HEADER = 48  # bytes; an object there is the first of its pool
_LARGEST = 512  # bytes of what it counts as small
_ENOUGH = 50_000  # objects of one size; more gaps are not worth their filling
_kept: list[list[object]] = []


def settle() -> None:
    """Call it once everything is loaded, right before the first fork."""
    gc.collect()
    _kept.append(_fill(object))  # 16 bytes each
    _kept.append(_fill(lambda: float("1.5")))  # 32
    # 33: what a bytes object has besides its content.
    _kept.extend(_fill(partial(bytes, size - 33)) for size in range(48, _LARGEST + 1, 16))
    gc.freeze()


def _fill(make: Callable[[], object]) -> list[object]:
    """Objects in all gaps of the pools for their size: until one begins a pool that nobody had used."""
    made: list[object] = []
    while not made or (id(made[-1]) % _POOL != _HEADER and len(made) < _ENOUGH):
        made.append(make())
    return made
