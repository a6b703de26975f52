"""What an index of the device rules answers is what going through them answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shim.spec.device_rules import DeviceRules, device_rules

KINDS = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(-1, 2)
RULES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "allow": st.booleans(),
            "type": st.sampled_from(["", "a", "b", "c"]),
            "major": NUMBERS,
            "minor": NUMBERS,
            "access": st.sampled_from(["", "r", "w", "rw", "rwm", "mx"]),
        },
    ),
    max_size=8,
)


def gone_through(rules: Sequence[Mapping[str, Any]], kind: str, major: int, minor: int) -> set[str]:
    """Rule by rule."""
    allowed: set[str] = set()
    for rule in rules:
        fits = all(
            rule.get(key, -1) in (-1, mine) for key, mine in (("major", major), ("minor", minor))
        ) and (rule.get("type") or "a") in ("a", kind)
        if fits:
            what = set(rule.get("access") or "rwm")
            allowed = allowed | what if rule.get("allow") else allowed - what
    return allowed & set("rwm")


@given(RULES, st.sampled_from(["b", "c"]), st.integers(0, 2), st.integers(0, 2))
def test_the_answers_are_the_same(rules: list[dict[str, Any]], kind: str, major: int, minor: int) -> None:
    index = DeviceRules(rules)

    assert index.access(kind, major, minor) == gone_through(rules, kind, major, minor)
    assert index.name(kind, major, minor) == any(
        rule.get("allow") and (rule.get("type"), rule.get("major"), rule.get("minor")) == (kind, major, minor)
        for rule in rules
    )
    assert index.open == any(rule.get("allow") and (rule.get("type") or "a") == "a" for rule in rules)


def test_without_rules_nothing_is_allowed() -> None:
    specs: list[dict[str, Any]] = [{}, {"linux": {}}, {"linux": {"resources": {}}}]
    for spec in specs:
        rules = device_rules(spec)
        assert (rules.access("b", 7, 0), rules.name("b", 7, 0), rules.open) == (frozenset(), False, False)
