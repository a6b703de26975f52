"""What a guest, a bundle or a caller wrote is one plain line wherever it is shown, by one function."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.errors import CallerError, GuestError, HypervisorError
from devices.plain import plain, plain_lines

ROOT = Path(__file__).resolve().parents[3]
#: Writing directions, zero-width signs, soft hyphen, tags, annotations: all of the category Cf.
INVISIBLE = [
    *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C,
    0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x00AD, 0xE0041, 0xFFF9,
]  # fmt: skip
CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
SEPARATORS = [0x2028, 0x2029, 0x85, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E]


@pytest.mark.parametrize("code", [*INVISIBLE, *CONTROLS, *SEPARATORS, 0xD800, 0xDFFF, 0xE000, 0xFFFF])
def test_nothing_of_it_is_left(code: int) -> None:
    assert plain(f"a{chr(code)}b") in ("ab", "a b")
    assert "\n" not in str(CallerError(f"a{chr(code)}b"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, gr\u00fcn \u4e2d\u6587", "plain, gr\u00fcn \u4e2d\u6587"),
        ("two\nlines\tand\r\nmore", "two lines and  more"),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07!", "red !"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("one\u2028two\u2029three\u00a0four", "one two three four"),
        ("ro\u200bot", "root"),
        ("", ""),
    ],
)  # fmt: skip
def test_examples(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text())
def test_it_prints_and_loses_no_letter(text: str) -> None:
    shown = plain(text)

    assert shown.isprintable()
    assert plain(shown) == shown
    if "\x1b" not in text:  # of a sequence letters are dropped too
        letters = [each for each in text if unicodedata.category(each)[0] in "LNPS" and each.isprintable()]
        assert [each for each in shown if unicodedata.category(each)[0] in "LNPS"] == letters


def test_lines_stay_lines_and_only_a_newline_makes_one() -> None:
    assert plain_lines("a\r\nb\u2028c\x0bd\n\x1b[Ke") == ["a", "b c d", "e"]


def test_an_error_quotes_nothing_else() -> None:
    """Cause, hint, phase and evidence: whatever a part came from."""
    evil = "x\u202ey\x1b[2J\x07\u2028z"
    errors = [
        GuestError(evil, phase=evil, hint=evil, details={"guest console": f"{evil}\n{evil}"}),
        HypervisorError(evil),
        CallerError(evil).with_context(phase=evil, details={evil: evil}),
    ]

    assert [str(error) for error in errors if not str(error).isprintable()] == []
    assert str(errors[1]) == "xy z"


def test_there_is_no_other_such_function() -> None:
    """Whoever shows foreign text takes this one: each other one has forgotten something so far."""
    own = re.compile(r"isprintable|unicodedata|202[A-Ea-e]|\\x9[bB]|\\x7[fF]")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("ctl", "devices", "hypervisors", "shim")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "devices" / "plain.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if own.search(line)
    ]

    assert found == []
