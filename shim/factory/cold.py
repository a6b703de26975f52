"""The answer of the factory that it has no template: `Cold`.

Why a module of its own: whoever may get the answer need not load the factory.
"""

from __future__ import annotations

__all__ = ["Cold"]


class Cold(Exception):  # noqa: N818  (no error: the other way to start)
    """The VM boots; the text says why."""
