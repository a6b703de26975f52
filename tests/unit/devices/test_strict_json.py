"""Any bytes are a JSON value with one meaning, or an error that says where they are none."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.strict_json import JsonError, parse, place

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)  # fmt: skip


@given(VALUES, st.booleans())
def test_what_is_json_is_read_as_python_reads_it(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if "\\u0000" in text:
        with pytest.raises(JsonError, match="NUL"):
            parse(text.encode())
    else:
        assert parse(text.encode()) == value


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:1eE.+-\\ud0nul NaI', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_an_error(data: bytes) -> None:
    try:
        parse(data)
    except JsonError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting value, in line 1, column 1"),
        (b'{"a": 1,\n "b" 2}', "in line 2, column 6"),
        (b"{} x", "Extra data"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b'{"a": "\xff"}', "it is not UTF-8, at byte 8"),
        ('{"a": 1}'.encode("utf-16"), "it is not UTF-8, at byte 1"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a":' * 1001 + b"1" + b"}" * 1001, "nested too deeply"),  # Python 3.13 and 3.14 read it
        (b"[" * 2000 + b"]" * 2000, "nested too deeply"),
        (b'{"a": 1, "b": [0, {"c": {"d": 1, "e": 2, "d": 3}}]}', "b[1].c.d is there twice"),
        (b'{"a": 1, "a": 1}', "a is there twice"),
        (b'{"annotations": {"x.y/z": "1", "x.y/z": "1"}}', 'annotations["x.y/z"] is there twice'),
        (b'{"a": 1, "a": 1', "in line 1"),
        (b'{"b": {"a": 1, "a": 1}, x', "a key is there twice"),
        (b'{"a": ["x\\u0000"]}', "a[0] has a NUL in it"),
        (b'{"a\\u0000": 1}', "has a NUL in it"),
        (b'{"a": {"b": "\\ud800x"}}', "a.b has half of a surrogate pair"),
        (b'{"a": {"\\uDFFF": 1}}', "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(data: bytes, why: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse(data)

    assert why in str(caught.value)
    assert str(caught.value).isprintable()


def test_many_members_are_not_deep() -> None:
    deep = b"[" * 800 + b"]" * 800
    assert len(parse(b"[" + b", ".join([deep] * 20) + b"]")) == 20
    assert len(parse(b"[" + b", ".join([b"{}"] * 5000) + b"]")) == 5000


def test_a_pair_is_one_character_and_a_written_escape_is_none() -> None:
    assert parse(b'["\\ud83d\\ude00", "\\\\u0000"]') == ["\N{GRINNING FACE}", "\\u0000"]


def test_a_number_of_any_length_is_read_and_a_long_one_is_no_integer() -> None:
    short, long, longer = parse(b"[%d, %s, -%s]" % (10**30, b"1" * 41, b"9" * 5000))

    assert short == 10**30
    assert (type(long), type(longer)) == (float, float)


@pytest.mark.parametrize(
    "data",
    [
        b"{" + b",".join(b'"%d":1' % number for number in range(200_000)) + b',"7":1}',
        b'["\\u0000x"' + b',""' * 500_000 + b"]",
        b'{"a":' * 500 + b"[" + b"1," * 400_000 + b'{"b":1,"b":2}]' + b"}" * 500,
    ],
    ids=["keys", "strings", "below"],
)
def test_a_large_one_is_refused_in_time_that_grows_with_its_size_only(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(JsonError):
        parse(data)

    assert time.process_time() - began < 10  # a second here; hours, if each key were compared with each


def test_places() -> None:
    assert place(place(place("", "linux"), "devices"), 3) == "linux.devices[3]"
    assert place("annotations", "a/b\u202ec") == 'annotations["a/bc"]'
    assert place("", "x" * 500) == "x" * 80
