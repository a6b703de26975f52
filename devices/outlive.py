"""Whether the children of this process outlive it.

What: `let_children_outlive` says so, once, before the first child; `children_outlive` is asked where a child
is started, and where a connection to it is made that another process of ours may have to make again.
Why a fact of the process: its children need each other. A VMM that lives on without its virtiofsd hangs.
Invariants: what outlives us is in the undo log like everything else, so whoever cleans up after us ends it.
"""

from __future__ import annotations

__all__ = ["children_outlive", "let_children_outlive"]

_outlive: list[bool] = [False]


def let_children_outlive(outlive: bool = True) -> None:
    """From now on children are not killed when this process ends."""
    _outlive[0] = outlive


def children_outlive() -> bool:
    """Whether they are not."""
    return _outlive[0]
