"""What is read is what the table says, in its spelling, or an error that names the place and no secret."""

from __future__ import annotations

from typing import Any

import pytest

from shim.spec.shape import Flag, Integer, ListOf, MapOf, Opaque, ShapeError, Table, Text, copied, fit

INNER = Table({"name": Text(), "size": Integer(0, 255)})
TABLE = Table(
    {
        "oneWord": Text("a", "b"),
        "path": Text(longest=6),
        "Count": Integer(-1, 7),
        "on": Flag(),
        "words": ListOf(Text(), 3),
        "parts": ListOf(INNER, 2),
        "map": MapOf(Text(), 2),
        "tables": MapOf(INNER, 2),
        "other": Opaque(),
        "kinds": ListOf(Integer(1, 5), 4),
    }
)


def test_what_is_right_is_taken_as_it_is() -> None:
    document: dict[str, Any] = {
        "oneWord": "b",
        "path": "/\u00fc\u00fc",
        "Count": -1,
        "on": False,
        "words": ["x", ""],
        "parts": [{"name": "n", "size": 255}, {}],
        "map": {"Any Key": "v"},
        "tables": {"k": {"size": 0}},
        "other": {"deep": [[{}]]},
        "kinds": [],
    }
    found, strange = fit(TABLE, document)

    assert (found, strange) == (document, [])
    found["words"].append("changed")
    found["parts"][0]["name"] = "changed"
    assert document["words"] == ["x", ""], "it is a copy"
    assert document["parts"][0]["name"] == "n"


def test_null_is_nothing_or_the_zero_value_of_a_list() -> None:
    """As Go's decoder has it."""
    found, _ = fit(
        TABLE,
        {
            "oneWord": None,
            "on": None,
            "words": ["a", None],
            "parts": [None, {"name": None}],
            "map": {"k": None},
            "tables": {"k": None},
            "kinds": [None],
        },
    )

    assert found == {
        "words": ["a", ""],
        "parts": [{}, {}],
        "map": {"k": ""},
        "tables": {"k": {}},
        "kinds": [1],
    }


@pytest.mark.parametrize("key", ["oneword", "ONEWORD", "OneWord", "oneWoRD"])
def test_a_key_is_the_same_in_any_letters(key: str) -> None:
    assert fit(TABLE, {key: "a", "count": 1})[0] == {"oneWord": "a", "Count": 1}


def test_two_letters_beyond_ascii_are_the_same_too() -> None:
    """As for Go: the long s, and the sign of Kelvin."""
    found, _ = fit(TABLE, {"word\u017f": ["x"], "\u212aind\u017f": [1]})

    assert found == {"words": ["x"], "kinds": [1]}


def test_keys_of_maps_are_the_documents_own() -> None:
    assert fit(TABLE, {"map": {"a": "1", "A": "2"}})[0] == {"map": {"a": "1", "A": "2"}}


def test_what_means_nothing_is_left_out_and_told_with_its_place() -> None:
    found, strange = fit(
        TABLE, {"fancy": {"a": 1}, "parts": [{}, {"Nam": 1}], "tables": {"x/y": {"z": 1}}}, "linux.it"
    )

    assert found == {"parts": [{}, {}], "tables": {"x/y": {}}}
    assert strange == ["linux.it.fancy", "linux.it.parts[1].Nam", 'linux.it.tables["x/y"].z']
    _, many = fit(TABLE, {f"k{number}": 1 for number in range(5000)})
    assert len(many) == 50


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ([], "it must be an object, not a list"),
        ("SECRET", "it must be an object, not a string"),
        ({"oneWord": "SECRET"}, "oneWord must be one of a, b"),
        ({"oneWord": 1}, "oneWord must be a string, not 1"),
        ({"path": "1234567"}, "path has more than 6 bytes"),
        ({"path": "\u00fc" * 4}, "path has more than 6 bytes"),
        ({"Count": 8}, "Count must be an integer from -1 to 7, not 8"),
        ({"COUNT": True}, "COUNT must be an integer from -1 to 7, not true"),
        ({"Count": 1.0}, "Count must be an integer from -1 to 7, not 1.0"),
        ({"Count": "SECRET"}, "Count must be an integer from -1 to 7, not a string"),
        ({"on": 1}, "on must be true or false, not 1"),
        ({"words": "SECRET"}, "words must be a list, not a string"),
        ({"words": ["a", 2]}, "words[1] must be a string, not 2"),
        ({"words": [""] * 4}, "words has 4 entries, and may have 3"),
        ({"parts": [{}, {"size": 256}]}, "parts[1].size must be an integer from 0 to 255, not 256"),
        ({"parts": [[]]}, "parts[0] must be an object, not a list"),
        ({"map": {"a": "", "b": "", "c": ""}}, "map has 3 entries, and may have 2"),
        ({"map": {"x.y/z": ["SECRET"]}}, 'map["x.y/z"] must be a string, not a list'),
        ({"map": [None]}, "map must be an object, not a list"),
        ({"tables": {"k": {"SIZE": -1}}}, "tables.k.SIZE must be an integer from 0 to 255, not -1"),
        ({"other": []}, "other must be an object, not a list"),
        ({"on": True, "ON": True}, "ON is there twice, the other one as on"),
        ({"On": None, "ON": None}, "ON is there twice, the other one as On"),
    ],
)
def test_what_is_wrong_is_named_by_its_place_and_without_its_text(document: Any, why: str) -> None:
    with pytest.raises(ShapeError) as caught:
        fit(TABLE, document)

    assert str(caught.value) == why


def test_what_nobody_looks_into_has_a_depth() -> None:
    deep: Any = {}
    for _ in range(62):
        deep = {"a": deep}
    assert fit(TABLE, {"other": deep})[0] == {"other": deep}
    with pytest.raises(ShapeError, match="other is nested deeper than 64"):
        fit(TABLE, {"other": {"a": {"a": [deep]}}})


def test_a_copy_shares_nothing() -> None:
    document = {"a": [{"b": [1, "x", None, True]}]}
    copy = copied(document)
    copy["a"][0]["b"].append(2)

    assert document == {"a": [{"b": [1, "x", None, True]}]}
