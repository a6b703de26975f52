"""Fills a frozen dataclass from a TOML table, strictly.

What: `Table` is one section with its place in the file; `fill` gives the keyword arguments for a
dataclass whose annotations are int, float, bool, str or tuple[str, ...], and the keys that are known but
have no effect (`Inactive`).
Why: the section of a hypervisor belongs to its plugin, which may be anybody's; one strict reader
serves them all, so that a wrong key is told with file, line, type and the nearest name everywhere.
Invariants: reads annotations as strings (typing.get_type_hints would import and evaluate); every
problem of a section is collected, not only the first; difflib is imported only when there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from devices.errors import BugError
from shim.config.schema import Inactive, is_secret, toml_value

__all__ = ["KIND_TEXT", "Kind", "Place", "Table", "fill", "kind_of_field", "known_keys", "nearest"]

Kind = str
Place = Callable[[str], str]
"""From a key to "file:line"."""
KIND_TEXT: Mapping[Kind, str] = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "strings": "an array of strings",
    "tables": "an array of tables",
    "table": "a table",
}
_ANNOTATIONS: Mapping[Any, Kind] = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
    "tuple[str,...]": "strings",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    tuple[str, ...]: "strings",
}
_WRONG = object()


class Table:
    """A section: its dotted name, its keys, and where a key of it stands.

    `locate(key, ...)` gives (file, line), further keys lead into sub-tables; it scans the text, so it is for
    messages only.
    """

    __slots__ = ("locate", "name", "values")

    def __init__(self, name: str, values: Mapping[str, Any], locate: Callable[..., tuple[str, int]]) -> None:
        self.name = name
        self.values = values
        self.locate = locate

    def at(self, key: str) -> str:
        """ "file:line" of a key."""
        file, line = self.locate(key)
        return f"{file}:{line}"


def kind_of_field(field: dataclasses.Field[Any]) -> Kind:
    """The kind of value that a dataclass field takes. Raises BugError for an annotation it cannot."""
    annotation = field.type
    if isinstance(annotation, str):
        annotation = annotation.replace(" ", "")
    kind = _ANNOTATIONS.get(annotation)
    if kind is None:
        raise BugError(f"configuration field {field.name}: no rule for the annotation {field.type!r}")
    return kind


def kind_of_value(behaviour: Any) -> Kind:
    """The kind that a table of keys without effect means by its value."""
    if isinstance(behaviour, tuple):
        return "strings"
    if isinstance(behaviour, list):
        return "tables"
    if isinstance(behaviour, dict):
        return "table"
    return type(behaviour).__name__


def convert(kind: Kind, value: Any) -> Any:
    """`value` as `kind`, or _WRONG."""
    good: bool
    if kind == "strings":
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        return _WRONG
    if kind == "tables":
        good = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    elif kind == "table":
        good = isinstance(value, dict)
    elif kind == "bool":
        good = isinstance(value, bool)
    elif kind == "str":
        good = isinstance(value, str)
    elif kind == "float":
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        return _WRONG
    else:
        good = isinstance(value, int) and not isinstance(value, bool)
    return value if good else _WRONG


def nearest(key: str, known: Mapping[str, Kind]) -> str:
    """What to say of an unknown key: the nearest known one with its type."""
    import difflib

    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        return "no known key is like it"
    return f'the nearest is "{close[0]}" ({KIND_TEXT[known[close[0]]]})'


def known_keys(schema: type[Any] | None, inactive: Mapping[str, Any]) -> dict[str, Kind]:
    """Every key of a section with its kind: those without effect, and the schema's fields."""
    fields = {field.name: kind_of_field(field) for field in dataclasses.fields(schema)} if schema else {}
    return {key: kind_of_value(behaviour) for key, behaviour in inactive.items()} | fields


def fill(
    table: Table,
    schema: type[Any] | None,
    *,
    inactive: Mapping[str, Any],
    aliases: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[Inactive], list[str]]:
    """Read `table` by `schema`; returns (keyword arguments, keys without effect, problems).

    `schema`: None is a section in which no key has an effect. `inactive`: further known keys, each with
    the value that we behave as; a non-empty table there holds the known keys of a sub-table likewise.
    `aliases`: other spellings.
    """
    fields = {field.name for field in dataclasses.fields(schema)} if schema else set()
    known = known_keys(schema, inactive)
    arguments: dict[str, Any] = {}
    without_effect: list[Inactive] = []
    problems: list[str] = []
    for written, value in table.values.items():
        key = (aliases or {}).get(written, written)
        kind = known.get(key)
        if kind is None:
            problems.append(
                f'{table.at(written)}: [{table.name}] has no key "{written}"; {nearest(written, known)}'
            )
            continue
        if key != written and key in table.values:
            problems.append(f"{table.at(written)}: [{table.name}] {written} is {key} once more; keep one")
            continue
        converted = convert(kind, value)
        if converted is _WRONG:
            shown = "..." if is_secret(key) else toml_value(value)[:80]
            problems.append(
                f"{table.at(written)}: [{table.name}] {written} must be {KIND_TEXT[kind]}, not {shown}"
            )
        elif key in fields:
            arguments[key] = converted
        elif kind == "table" and inactive[key]:
            inner = Table(f"{table.name}.{written}", converted, partial(table.locate, written))
            _, found, wrong = fill(inner, None, inactive=inactive[key])
            without_effect += found
            problems += wrong
        else:
            locate = partial(table.locate, written)
            without_effect.append(Inactive(table.name, written, converted, inactive[key], locate))
    return arguments, without_effect, problems
