"""JSON from somebody whom we do not trust: a VMM's API, a guest's agent.

What: `loads` is json.loads for such a text.
Why: json.loads takes more than JSON has: NaN and Infinity, which no integer can be made of, numbers of
thousands of digits, which no field can hold, and nesting up to the interpreter's limit, where whoever looks
at the value next fails. All of these surface far from the text, as errors that are nobody's.
Invariants: whatever is wrong is a ValueError; integers have 64 bits at most, signed or unsigned; floats are
finite; nesting ends at `DEPTH`. The caller bounds the length.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["DEPTH", "loads"]

DEPTH = 32
"""Levels; QEMU's deepest answer that is asked for, a disk behind several layers, has about ten."""


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64  # 20 digits and sign: more cannot be in 64 bits
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {text[:40]} has more than 64 bits")
    return value
