"""What a JSON document must be made of, and the reading of one into just that.

What: the kinds of values (`Text`, `Integer`, `Flag`, `ListOf`, `MapOf`, `Table`, `Opaque`), and `fit`, which
turns a parsed document into a `Fitted` one.
Why: config.json, an exec's process, an update's resources and mountInfo.json are written by programs in Go,
and read by many more; whoever reads them here may rely on every type, range and spelling afterwards.
Invariants, of what `fit` gives:
- A key of a table has the spelling of the table, whatever letters it was written in: Go's decoder, and so
  runc and containerd, takes `Hooks` for `hooks`. Two spellings of one key are refused.
- A null is as good as nothing, as in Go: it is not there, or, in a list or map, the kind's zero value.
- A key that the table has not is left out, and told (`strange`): Go ignores it.
- Whatever is there has the kind that the table says, and no list or map more entries than it says.
- It is a copy, and no deeper than the table.
What is wrong is a ShapeError with its place, such as `linux.devices[3].major`; no text of the document is in
it, since an environment may hold secrets.
Source: Go's encoding/json (Unmarshal).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.strict_json import place

__all__ = [
    "Fitted",
    "Flag",
    "Integer",
    "Kind",
    "ListOf",
    "MapOf",
    "Opaque",
    "ShapeError",
    "Table",
    "Text",
    "copied",
    "fit",
]

_MAX_STRANGE = 50  # of them are told
_MAX_DEPTH = 64  # of what is not looked into


class ShapeError(ValueError):
    """The document is not made so. The text says where, and what it must be; `steps` lead to it, innermost
    first."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why
        self.steps: list[str | int] = []

    def __str__(self) -> str:
        return f"{_place(self.steps) or 'it'} {self.why}"


Fitted = tuple[dict[str, Any], list[str]]
"""A document, and the places of keys in it that mean nothing (50 at most)."""

Strange = list[list[str | int]]
"""Steps to keys that no table has, innermost first."""


class Kind:
    """What a value must be."""

    def fit(self, value: Any, strange: Strange, /) -> Any:
        """`value`, which is not None, as it may be relied on. Raises ShapeError."""
        raise NotImplementedError

    def zero(self) -> Any:
        """What null is in a list."""
        raise NotImplementedError


class Text(Kind):
    """A string: one of `choices` if there are some, of at most `longest` bytes in UTF-8."""

    def __init__(self, *choices: str, longest: int = 0) -> None:
        self.choices = choices
        self.longest = longest

    def fit(self, value: Any, _: Strange, /) -> str:
        if type(value) is not str:
            raise ShapeError(f"must be a string, not {_name(value)}")
        if self.choices and value not in self.choices:
            raise ShapeError(f"must be one of {', '.join(self.choices)}")
        if self.longest and len(value) * 4 > self.longest and len(value.encode()) > self.longest:
            raise ShapeError(f"has more than {self.longest} bytes")
        return value

    def zero(self) -> str:
        return ""


class Integer(Kind):
    """A whole number from `low` to `high`, both included."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def fit(self, value: Any, _: Strange, /) -> int:
        if type(value) is not int:
            raise ShapeError(f"must be an integer from {self.low} to {self.high}, not {_name(value)}")
        if not self.low <= value <= self.high:
            raise ShapeError(f"must be an integer from {self.low} to {self.high}, not {value}")
        return value

    def zero(self) -> int:
        return max(self.low, 0)


class Flag(Kind):
    """True or false."""

    def fit(self, value: Any, _: Strange, /) -> bool:
        if type(value) is not bool:
            raise ShapeError(f"must be true or false, not {_name(value)}")
        return value

    def zero(self) -> bool:
        return False


class Opaque(Kind):
    """An object that nobody looks into: what it means is another platform's matter."""

    def fit(self, value: Any, _: Strange, /) -> dict[str, Any]:
        if type(value) is not dict:
            raise ShapeError(f"must be an object, not {_name(value)}")
        level: list[Any] = [value]
        for _depth in range(_MAX_DEPTH):
            level = [
                member
                for one in level
                for member in (one.values() if isinstance(one, dict) else one)
                if isinstance(member, dict | list)
            ]
        if level:
            raise ShapeError(f"is nested deeper than {_MAX_DEPTH}")
        return value

    def zero(self) -> dict[str, Any]:
        return {}


class ListOf(Kind):
    """A list of at most `most` values of one kind."""

    def __init__(self, kind: Kind, most: int) -> None:
        self.kind = kind
        self.most = most
        self._plain = type(kind) is Text and not kind.choices and not kind.longest

    def fit(self, value: Any, strange: Strange, /) -> list[Any]:
        if type(value) is not list:
            raise ShapeError(f"must be a list, not {_name(value)}")
        if len(value) > self.most:
            raise ShapeError(f"has {len(value)} entries, and may have {self.most}")
        if self._plain and set(map(type, value)) <= {str}:
            return value.copy()
        found = []
        for index, item in enumerate(value):
            told = len(strange)
            try:
                found.append(self.kind.zero() if item is None else self.kind.fit(item, strange))
            except ShapeError as error:
                error.steps.append(index)
                raise
            for steps in strange[told:]:
                steps.append(index)
        return found

    def zero(self) -> list[Any]:
        return []


class MapOf(Kind):
    """An object with keys of the document's choice, at most `most`, and values of one kind."""

    def __init__(self, kind: Kind, most: int) -> None:
        self.kind = kind
        self.most = most

    def fit(self, value: Any, strange: Strange, /) -> dict[str, Any]:
        if type(value) is not dict:
            raise ShapeError(f"must be an object, not {_name(value)}")
        if len(value) > self.most:
            raise ShapeError(f"has {len(value)} entries, and may have {self.most}")
        found = {}
        for key, item in value.items():
            told = len(strange)
            try:
                found[key] = self.kind.zero() if item is None else self.kind.fit(item, strange)
            except ShapeError as error:
                error.steps.append(key)
                raise
            for steps in strange[told:]:
                steps.append(key)
        return found

    def zero(self) -> dict[str, Any]:
        return {}


class Table(Kind):
    """An object whose keys have a meaning, each with its kind. No two differ in the case of letters only."""

    def __init__(self, fields: Mapping[str, Kind]) -> None:
        self.fields = fields
        self._spelled = {_folded(name): name for name in fields}

    def fit(self, value: Any, strange: Strange, /) -> dict[str, Any]:
        if type(value) is not dict:
            raise ShapeError(f"must be an object, not {_name(value)}")
        fields = self.fields
        found: dict[str, Any] = {}
        renamed: dict[str, str] = {}
        for key, item in value.items():
            name = key
            if key not in fields:
                name = self._spelled.get(_folded(key), "")
                if not name:
                    if len(strange) < _MAX_STRANGE:
                        strange.append([key])
                    continue
                if name in value or name in renamed:
                    error = ShapeError(f"is there twice, the other one as {renamed.get(name, name)}")
                    error.steps.append(key)
                    raise error
                renamed[name] = key
            if item is None:
                continue
            told = len(strange)
            try:
                found[name] = fields[name].fit(item, strange)
            except ShapeError as error:
                error.steps.append(key)
                raise
            for steps in strange[told:]:
                steps.append(name)
        return found

    def zero(self) -> dict[str, Any]:
        return {}


def fit(table: Table, value: Any, root: str = "") -> Fitted:
    """`value`, a parsed document, as `table` says. Raises ShapeError. `root`: where it stands in a larger
    document, such as "process", for places."""
    strange: Strange = []
    steps = list[str | int](reversed(root.split("."))) if root else []
    try:
        document = table.fit(value, strange)
    except ShapeError as error:
        error.steps += steps
        raise
    return document, [_place([*one, *steps]) for one in strange]


def copied(value: Any) -> Any:
    """A document, or a part of one, of which nothing is shared. What copy.deepcopy does, in a third of its
    time."""
    if type(value) is dict:
        return {key: copied(member) for key, member in value.items()}
    if type(value) is list:
        return [copied(member) for member in value]
    return value


def _place(steps: list[str | int]) -> str:
    where = ""
    for step in reversed(steps):
        where = place(where, step)
    return where


def _folded(key: str) -> str:
    """As Go compares: letters of either case are one, and with s and k their two relatives beyond ASCII."""
    return key.lower() if key.isascii() else key.replace("\u017f", "s").replace("\u212a", "k").lower()


def _name(value: Any) -> str:
    """What it is instead; a number as such, of a text nothing."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value}"
        case str():
            return "a string"
        case list():
            return "a list"
        case None:
            return "null"
        case _:
            return "an object"
