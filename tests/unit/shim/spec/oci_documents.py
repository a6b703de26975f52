"""Documents for the tests of this wing: strategies made of the very table that says what a field must be."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from shim.spec.oci_types import SPEC
from shim.spec.shape import Flag, Integer, Kind, ListOf, MapOf, Opaque, Table, Text

__all__ = ["documents", "values"]

_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


def values(kind: Kind) -> st.SearchStrategy[Any]:
    """What a kind takes."""
    match kind:
        case Text():
            return st.sampled_from(kind.choices) if kind.choices else _TEXTS
        case Integer():
            return st.integers(kind.low, kind.high)
        case Flag():
            return st.booleans()
        case Opaque():
            return st.just({"a": [1]})
        case ListOf():
            return st.lists(st.deferred(lambda: values(kind.kind)), max_size=2)
        case MapOf():
            return st.dictionaries(_TEXTS, values(kind.kind), max_size=2)
        case Table():
            return st.fixed_dictionaries(
                {}, optional={name: values(one) for name, one in kind.fields.items()}
            )
    raise AssertionError(kind)


def documents() -> st.SearchStrategy[dict[str, Any]]:
    """Specs with any of the fields, of the right kinds."""
    return values(SPEC)


def example(kind: Kind = SPEC) -> Any:
    """One document with every field, whose values a container can have."""
    match kind:
        case Text():
            return kind.choices[0] if kind.choices else "/x"
        case Integer():
            return max(kind.low, 1)
        case Flag():
            return False
        case Opaque():
            return {"a": "b"}
        case ListOf():
            return [example(kind.kind)]
        case MapOf():
            return {"k": example(kind.kind)}
        case Table():
            found = {name: example(one) for name, one in kind.fields.items()}
            if "fileMode" in found:
                return found | {"type": "c", "minor": 3}
            return found | ({"rootfsPropagation": "shared"} if "rootfsPropagation" in found else {})
    raise AssertionError(kind)
