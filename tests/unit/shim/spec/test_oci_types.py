"""The table of types has every field of OCI that anything here knows, no wider than the protocol; each list
has its number, and docs/oci-spec.md the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from devices.errors import CallerError
from proto import oci_pb2
from shim.hooks.hook_process import STAGES
from shim.spec import oci_fields
from shim.spec.documents import checked
from shim.spec.oci import spec_from_json
from shim.spec.oci_types import FIELDS, MOST, PROCESS, RESOURCES, SPEC
from shim.spec.shape import Flag, Integer, Kind, ListOf, MapOf, Opaque, Table, Text
from tests.unit.shim.spec.oci_documents import example

ROOT = Path(__file__).resolve().parents[4]
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
PLACES = {place.replace("[]", "").replace("{}", "") for place in FIELDS}


def folded(name: str) -> str:
    return {"version": "ociversion"}.get(name.lower(), name.lower())


def misfits(table: Table, message: Descriptor, where: str = "") -> Iterator[str]:
    """The fields of the protocol that the table has not, or takes more of than they hold."""
    kinds = {name.lower(): kind for name, kind in table.fields.items()}
    for field in message.fields:
        name = folded(field.name)
        if name in ("solaris", "windows"):
            continue
        kind: Kind | None = kinds.get(name)
        here = f"{where}{name}"
        if kind is None:
            yield f"{here} is missing"
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if not isinstance(kind, MapOf):
                yield f"{here} is a map"
            continue
        if field.is_repeated != isinstance(kind, ListOf):
            yield f"{here}: a list or not"
            continue
        inner = kind.kind if isinstance(kind, ListOf) else kind
        if field.message_type is not None:
            assert isinstance(inner, Table), here
            yield from misfits(inner, field.message_type, f"{here}.")
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            if not isinstance(inner, Text):
                yield f"{here} is a string"
        elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            if not isinstance(inner, Flag):
                yield f"{here} is a flag"
        else:
            low, high = RANGES[field.cpp_type]
            if not (isinstance(inner, Integer) and low <= inner.low <= inner.high <= high):
                yield f"{here} is from {low} to {high}"


def test_every_field_of_the_protocol_is_there_and_no_wider() -> None:
    assert list(misfits(SPEC, oci_pb2.Spec.DESCRIPTOR)) == []
    assert isinstance(PROCESS, Table)
    assert isinstance(RESOURCES, Table)


def test_every_field_with_a_fate_is_there() -> None:
    for place in (*oci_fields.REFUSED, *oci_fields.DROPPED, *oci_fields.BEYOND):
        name = place.replace("[]", "")
        assert any(each == name or each.startswith(f"{name}.") for each in PLACES), place


@pytest.mark.parametrize("place", FIELDS)
def test_every_field_reaches_the_guest_or_has_a_fate(place: str) -> None:
    """A field of the table that no message has, and no table of `oci_fields`, would be lost in silence."""
    kind = FIELDS[place]
    value: Any = example(kind) or True
    for step in reversed(place.split(".")):
        name = step.removesuffix("[]").removesuffix("{}")
        value = {name: [value] if step.endswith("[]") else {"k": value} if step.endswith("{}") else value}
    if place == "linux.rootfsPropagation":
        value = {"linux": {"rootfsPropagation": "shared"}}
    if place == "linux.namespaces[].path":
        value["linux"]["namespaces"][0]["type"] = "pid"
    document = checked(value, "config.json")
    try:
        message, rest = spec_from_json(document)
    except CallerError as error:
        assert error.code == "UNIMPLEMENTED"
        return
    assert rest.dropped or rest.beyond or message.ByteSize(), place


def lists(table: Table, above: str = "") -> Iterator[tuple[str, int]]:
    for name, kind in table.fields.items():
        here = f"{above}.{name}" if above else name
        inner: Kind = kind
        if isinstance(kind, ListOf | MapOf):
            yield here, kind.most
            inner = kind.kind
        if isinstance(inner, Table):
            yield from lists(inner, here)


def test_every_list_has_its_number_and_the_reason() -> None:
    assert dict(lists(SPEC)) == {place: most for place, (most, _) in MOST.items()}
    assert all(why for _, why in MOST.values())


def test_the_page_has_the_numbers() -> None:
    """A row may stand for several places of one kind."""
    page = (ROOT / "docs" / "oci-spec.md").read_text()
    section = page.split("\n## What is read, and how much\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| (`.+?) \| ([\d,]+) \| (.+?) \|$", section)
    told = {
        place: (int(number.replace(",", "")), why)
        for places, number, why in rows
        for place in re.findall(r"`([\w.]+)`", places)
    }

    assert told == dict(MOST)


def test_the_stages_of_hooks_are_the_hosts_and_one_of_the_guest() -> None:
    hooks = SPEC.fields["hooks"]
    assert isinstance(hooks, Table)
    assert set(hooks.fields) == {*STAGES, "startContainer"}


def test_only_what_belongs_to_other_platforms_is_not_looked_into() -> None:
    opaque = {name for name, kind in SPEC.fields.items() if isinstance(kind, Opaque)}

    assert opaque == {"solaris", "windows", "zos", "freebsd", "vm"}
    assert opaque <= set(oci_fields.DROPPED)
