"""Where in a TOML text a key stands: needed only when something is to be said about it.

What: `find_line(text, path)` gives the line of the key or table `path`.
Why: tomllib is fast and tells no positions, tomlkit tells them and costs a tenth of a second to
import; so the daemon reads with the one and, in the rare case of an error, looks with this.
Invariants: the text is valid TOML (tomllib has read it), so this only needs to know strings,
brackets and keys. A key that it cannot find is 0, never an exception. Keys inside inline tables and
arrays give the line of the key that holds them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import lru_cache

__all__ = ["find_line"]

_TOKEN = re.compile(
    r'''
    (?P<string> """(?:\\.|[^\\])*?"{3,5} | \'\'\'.*?\'{3,5} | "(?:\\.|[^"\\\n])*" | \'[^\'\n]*\' )
  | (?P<comment> \#[^\n]* )
  | (?P<mark> [\[\]{}=,.\n] )
  | (?P<word> [^\s\[\]{}=,.\#"\']+ )
    ''',
    re.VERBOSE | re.DOTALL,
)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, text, line) without comments."""
    line, at = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", at, match.start())
        at = match.start()
        if match.lastgroup != "comment":
            yield match.lastgroup or "", match.group(), line


def _key_part(kind: str, piece: str) -> str:
    if kind == "string":
        return str(tomllib.loads(f"key = {piece}")["key"])
    return piece


def _keys(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every table header and every key with its line, in the order of the text."""
    table: tuple[str, ...] = ()
    parts: list[str] = []
    header = in_value = False
    depth = first = 0
    for kind, piece, line in _tokens(text):
        if in_value:
            if kind == "mark":
                depth += (piece in "[{") - (piece in "]}")
                in_value = not (piece == "\n" and depth == 0)
        elif kind != "mark":
            first = first or line
            parts.append(_key_part(kind, piece))
        elif piece == "[":
            header, first = True, line
        elif piece == "]" and header:
            if parts:
                table = tuple(parts)
                yield table, first
            parts, first = [], 0
        elif piece == "=":
            yield (*table, *parts), first
            parts, first, depth, in_value = [], 0, 0, True
        elif piece == "\n":
            header = False


@lru_cache(maxsize=8)
def _index(text: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    """All of `_keys`, kept: `kata-ctl config check` asks for dozens of positions in one text."""
    return tuple(_keys(text))


def find_line(text: str, path: Sequence[str]) -> int:
    """The line, from 1, of the last place that sets the key `path` or opens the table `path`; 0 if none.

    A key that is only within an inline table gives the line of the nearest key that holds it.
    """
    wanted = tuple(path)
    best, best_length = 0, 0
    for key, line in _index(text):
        if len(key) >= best_length and key == wanted[: len(key)]:
            best, best_length = line, len(key)
    if best_length == len(wanted):
        return best
    # `[a.b]` opens `a` too: a table that is only part of headers and dotted keys.
    for key, line in _index(text):
        if key[: len(wanted)] == wanted:
            return line
    return best
