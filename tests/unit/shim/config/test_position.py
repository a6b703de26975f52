"""`find_line` promises the line of any key in valid TOML, and 0, never an exception, where there is none."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.config.position import find_line

TEXT = '''\
# a = 1
title = "x # y = [" # a.b = 2

[a]                                   # 4
b = 1
  "c d" = 2
'e=f' = 3
list = [                              # 8
  "b = 9",  # c = 10
  [ "]", '[x]' ],
]
multi = """                           # 12
[a.fake]
b = 5
"quoted" \\""" more
"""
lit = \'\'\'
[a.fake2]
it''s = 1\'\'\'
inline = { k = 1, deep = { l = 2 } }  # 20
x.y.z = 1

[a.sub."dotted.name"]
k = 1
[[arr]]                               # 25
n = 1
[[arr]]
n = 2
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (["title"], 2),
        (["a"], 4),
        (["a", "b"], 5),
        (["a", "c d"], 6),
        (["a", "e=f"], 7),
        (["a", "list"], 8),
        (["a", "multi"], 12),
        (["a", "lit"], 17),
        (["a", "inline"], 20),
        (["a", "inline", "deep", "l"], 20),
        (["a", "x", "y", "z"], 21),
        (["a", "x", "y"], 21),
        (["a", "sub"], 23),
        (["a", "sub", "dotted.name"], 23),
        (["a", "sub", "dotted.name", "k"], 24),
        (["arr"], 27),
        (["arr", "n"], 28),
        (["nowhere"], 0),
        (["fake"], 0),
    ],
)
def test_finds_the_line(path: list[str], line: int) -> None:
    tomllib.loads(TEXT)
    assert find_line(TEXT, path) == line


def test_a_missing_key_of_a_table_gives_the_line_of_the_table() -> None:
    assert find_line(TEXT, ["a", "missing"]) == 4


def test_other_line_endings_count_the_same() -> None:
    assert find_line(TEXT.replace("\n", "\r\n"), ["a", "sub", "dotted.name", "k"]) == 24


KEYS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=6)
STRINGS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=12)


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\u007f")
    return f'"{escaped}"'


def value_text(value: Any) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return "[\n" + "".join(f"  {value_text(each)}, # ] = {{\n" for each in value) + "]"
    return str(value)


@given(
    st.dictionaries(
        KEYS,
        st.dictionaries(
            KEYS, st.one_of(STRINGS, st.integers(), st.lists(STRINGS, max_size=3)), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_key_of_a_generated_file_is_found(tables: dict[str, dict[str, Any]]) -> None:
    lines: list[str] = []
    expected: dict[tuple[str, str], int] = {}
    for name, values in tables.items():
        lines.append(f"[{quoted(name)}]")
        for key, value in values.items():
            expected[name, key] = len(lines) + 1
            lines += f"{quoted(key)} = {value_text(value)}".split("\n")
    text = "\n".join(lines)
    assert tomllib.loads(text) == tables
    assert {path: find_line(text, path) for path in expected} == expected
