"""JSON of somebody whom nobody trusts: what passes is plain JSON of a usual size, all else a ValueError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.foreign_json import DEPTH, loads

_VALUES = st.recursive(
    st.none() | st.booleans() | st.text() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(-1e300, 1e300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_VALUES)
def test_what_is_json_passes(value: Any) -> None:
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b"\xff",
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e309",
        "[-1e999]",
        str(1 << 64),
        str(-(1 << 63) - 1),
        "1" + "0" * 5000,
        "[" * (DEPTH + 2) + "]" * (DEPTH + 2),
        "[" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
    ],
)
def test_what_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        loads(text)


def test_the_deepest_that_passes() -> None:
    assert loads("[" * (DEPTH + 1) + "]" * (DEPTH + 1))
