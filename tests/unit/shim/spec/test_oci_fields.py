"""Every field with a fate of its own is refused, told or passed beside, and docs/compatibility.md says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from devices.errors import CallerError
from shim.spec import oci_fields

TABLE = (Path(__file__).resolve().parents[4] / "docs" / "compatibility.md").read_text()


def document(place: str, value: Any) -> dict[str, Any]:
    """A document with just this field."""
    for step in reversed(place.split(".")):
        value = {step.removesuffix("[]"): [value]} if step.endswith("[]") else {step: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("place", oci_fields.REFUSED)
def test_refused(place: str) -> None:
    with pytest.raises(CallerError) as caught:
        oci_fields.check(document(place, "x"))

    assert place.replace("[]", "[0]") in str(caught.value)
    assert oci_fields.REFUSED[place] in str(caught.value)
    assert caught.value.code == "UNIMPLEMENTED"


@pytest.mark.parametrize("place", oci_fields.DROPPED)
def test_dropped_with_a_line_in_the_log(place: str) -> None:
    wanted = document(place, "x")
    oci_fields.check(wanted)

    assert oci_fields.drop(wanted) == [f"{place} ({oci_fields.DROPPED[place]})"]
    assert oci_fields.drop(wanted) == [], "it is gone"


@pytest.mark.parametrize("place", oci_fields.BEYOND)
def test_passed_beside_the_message(place: str) -> None:
    wanted = document(place, 0)
    oci_fields.check(wanted)

    assert oci_fields.take_beyond(wanted) == document(place, 0)
    assert oci_fields.take_beyond(wanted) == {}


@pytest.mark.parametrize("place", [*oci_fields.REFUSED, *oci_fields.DROPPED, *oci_fields.BEYOND])
@pytest.mark.parametrize("value", [None, "", [], {}, False])
def test_what_asks_for_nothing_is_let_pass(place: str, value: object) -> None:
    wanted = document(place, value)
    oci_fields.check(wanted, guest_selinux=True)

    assert oci_fields.drop(wanted) == []
    assert oci_fields.take_beyond(wanted) == {}


@pytest.mark.parametrize("place", ["process.selinuxLabel", "linux.mountLabel"])
def test_selinux_labels_are_refused_where_the_configuration_wants_them_enforced(place: str) -> None:
    with pytest.raises(CallerError, match=place):
        oci_fields.check(document(place, "system_u:object_r:x:s0"), guest_selinux=True)


@pytest.mark.parametrize(
    ("namespaces", "why"),
    [
        ([{"type": "pid"}, {}], "linux.namespaces[1] needs a type"),
        ([{"type": "pid"}, {"path": "/x"}], "linux.namespaces[1] needs a type"),
        (
            [{"type": "network", "path": "/a"}, {"type": "ipc"}, {"type": "network"}],
            "linux.namespaces[2] is a second one of type network",
        ),
    ],
)
def test_namespaces_that_mean_nothing_or_two_things_are_invalid(namespaces: Any, why: str) -> None:
    with pytest.raises(CallerError) as caught:
        oci_fields.check({"linux": {"namespaces": namespaces}})

    assert why in str(caught.value)
    assert caught.value.code == "INVALID_ARGUMENT"


def row(place: str) -> str:
    for line in TABLE.splitlines():
        if line.startswith(f"| {place.replace('[]', '')} |"):
            return line.split("|")[3].strip()
    raise AssertionError(f"docs/compatibility.md has no row for {place}")


def test_the_table_in_the_docs_says_the_same() -> None:
    said = {place: row(place) for place in [*oci_fields.REFUSED, *oci_fields.DROPPED, *oci_fields.BEYOND]}

    assert {place for place, word in said.items() if word == "refused"} == set(oci_fields.REFUSED)
    assert {place for place, word in said.items() if word == "ignored"} == set(oci_fields.DROPPED)
