"""JSON that somebody else wrote, read as strictly as its standard allows.

What: `parse` answers the value; `place` names one inside of it, such as `linux.devices[3].major`;
`check_strings` has the rule for strings for values that came another way.
Why not json.loads: it takes NaN and Infinity, which are no JSON; UTF-16 and UTF-32, which no other reader of
these files takes; of a key that is there twice the last value, where another program may see the first; and
a number of a million digits, or the depth of a million brackets, ends in an error of Python's.
Invariants: whatever the bytes are, the result is a value or a JsonError, whose text says what is wrong and
where; integers have at most 40 digits (more become a float, which no integer's check takes); strings have no
half of a surrogate pair and no NUL, which no path, argument or name of Linux can hold; values are nested
1,000 deep at most, with any Python: 3.11 reads no deeper, later ones as deep as their stack is.
Source: RFC 8259; RFC 7493 (I-JSON) for names that are there twice, and surrogates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from devices.plain import plain

__all__ = ["JsonError", "check_strings", "parse", "place"]

_MAX_DEPTH = 1000
_MAX_DIGITS = 40
_MAX_KEY = 80  # characters of a key in a message
#: How a NUL, or half of a pair, begins; raw, neither gets past UTF-8 and the parser.
_ODD = (rb"\u0000", rb"\ud", rb"\uD")


class JsonError(ValueError):
    """It is no such JSON; the text says why, and where."""


class _TwiceError(Exception):
    """A key is there twice."""


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs, some of which may have one key."""


def parse(data: bytes) -> Any:
    """The value that `data`, all of it, is. Raises JsonError."""
    try:
        value = json.loads(
            (text := data.decode()),
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_constant=_refuse,
        )
        if any(odd in data for odd in _ODD):
            check_strings(value)
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8, at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg}, in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except _TwiceError:
        raise JsonError(f"{_twice(text)} is there twice") from None
    if data.count(b"{") + data.count(b"[") > _MAX_DEPTH and _is_deep(value):
        raise JsonError("it is nested too deeply")
    return value


def place(parent: str, key: str | int) -> str:
    """Where the member `key` of `parent` ("" for the whole) is. Indexes are numbers."""
    if isinstance(key, int):
        return f"{parent}[{key}]"
    if key.isascii() and key.replace("-", "_").isidentifier():
        return f"{parent}.{key[:_MAX_KEY]}" if parent else key[:_MAX_KEY]
    return f'{parent}["{plain(key[:_MAX_KEY])}"]'


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError
    return found


def _integer(text: str) -> int | float:
    return int(text) if len(text) <= _MAX_DIGITS else float(text)


def _is_deep(whole: Any) -> bool:
    """Whether it is nested deeper than it may be. Looks at one level after the other, without recursion."""
    level: list[Any] = [[whole]]
    for _ in range(_MAX_DEPTH + 1):
        members = [value.values() if isinstance(value, dict) else value for value in level]
        level = [member for some in members for member in some if isinstance(member, dict | list)]
        if not level:
            return False
    return True


def _refuse(name: str) -> None:
    raise JsonError(f"{name} is no number of JSON")


#: Where a value is: None for the whole, else its parent's and its key. Texts are made of few of them.
_Trail = tuple[Any, str | int] | None


def _text(trail: _Trail) -> str:
    keys: list[str | int] = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    where = ""
    for key in reversed(keys):
        where = place(where, key)
    return where


def _walk(whole: Any) -> Iterator[tuple[_Trail, Any]]:
    """Everything in it with its trail, each before its members. Without recursion."""
    waiting: list[tuple[_Trail, Any]] = [(None, whole)]
    while waiting:
        trail, value = waiting.pop()
        yield trail, value
        if isinstance(value, dict):
            waiting += [((trail, key), member) for key, member in value.items()]
        elif isinstance(value, _Pairs):
            waiting += [((trail, key), member) for key, member in value]
        elif isinstance(value, list):
            waiting += [((trail, index), member) for index, member in enumerate(value)]


def _twice(text: str) -> str:
    """The place of a key that is there twice; nobody knew it while it was read."""
    try:
        whole = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return "a key"  # and what follows is no JSON
    for trail, value in _walk(whole):
        seen: set[str] = set()
        for key, _ in value if isinstance(value, _Pairs) else ():
            if key in seen:
                return _text((trail, key))
            seen.add(key)
    return "a key"


def check_strings(whole: Any) -> None:
    """Raise JsonError for the first string, or key, that has what no string may have."""
    for trail, value in _walk(whole):
        if isinstance(value, str):
            _check_string(value, trail)
        elif isinstance(value, dict):
            for key in value:
                _check_string(key, (trail, key))


def _check_string(text: str, trail: _Trail) -> None:
    if "\0" in text:
        raise JsonError(f"{_text(trail) or 'it'} has a NUL in it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise JsonError(f"{_text(trail) or 'it'} has half of a surrogate pair in it") from None
