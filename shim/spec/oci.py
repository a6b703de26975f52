"""OCI runtime-spec JSON to the agent's protobuf Spec, field by field, by descriptor.

What: `spec_from_json` and `process_from_json` turn `config.json` (or an exec's process) into
`proto.oci_pb2` messages. The protobuf names are the JSON names in another case (`noNewPrivileges`,
`NoNewPrivileges`), so one walk over the descriptors serves all messages; the few names that differ
stand in `_RENAMED`.
Why not google.protobuf.json_format: it wants exact names, and refuses what it does not know.
Each answers the message and `Rest`: what of the document is not in it.
Invariants: what cannot be served is refused (`oci_fields.check`) before anything else; a key without
a counterpart in the agent's protocol is never dropped silently, it is in the rest. A value of the
wrong type or out of the field's range is a CallerError that names its place, such as
`process.user.uid`.
Source: runtime-spec 1.0.2 `config.md` and `config-linux.md`; Kata's oci.proto.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from devices.errors import CallerError
from proto import oci_pb2
from shim.spec import oci_fields

__all__ = ["Rest", "process_from_json", "resources_from_json", "spec_from_json"]

#: (message, JSON key in lower case) -> protobuf field in lower case, where more than the case differs.
_RENAMED = {("Spec", "ociversion"): "version"}


@dataclass(frozen=True, slots=True)
class Rest:
    """What of a document is not in its message.

    `dropped`: a line for the log for each field that has no effect; `beyond`: what goes to the agent
    beside the message, in OCI's shape from the root of config.json (`oci_fields.BEYOND`).
    """

    dropped: list[str] = field(default_factory=list)
    beyond: dict[str, Any] = field(default_factory=dict)


def spec_from_json(document: Mapping[str, Any]) -> tuple[oci_pb2.Spec, Rest]:
    """The whole `config.json`. Raises CallerError with the place of what is wrong or not supported."""
    spec = oci_pb2.Spec()
    return spec, _convert(spec, document, "")


def process_from_json(document: Mapping[str, Any]) -> tuple[oci_pb2.Process, Rest]:
    """The `process` object alone, as an exec brings it. Raises CallerError as `spec_from_json`."""
    process = oci_pb2.Process()
    return process, _convert(process, document, "process")


def resources_from_json(document: Mapping[str, Any]) -> tuple[oci_pb2.LinuxResources, Rest]:
    """The `linux.resources` object alone, as an update brings it. Raises CallerError likewise."""
    resources = oci_pb2.LinuxResources()
    return resources, _convert(resources, document, "linux.resources")


def _convert(message: Message, document: Mapping[str, Any], place: str) -> Rest:
    if not isinstance(document, Mapping):
        raise _wrong(place or "the document", "an object", document)
    part: Any = copy.deepcopy(dict(document))
    whole: dict[str, Any] = part
    for step in reversed(place.split(".") if place else ()):
        whole = {step: whole}
    oci_fields.check(whole)
    rest = Rest(oci_fields.drop(whole), oci_fields.take_beyond(whole))
    _fill(message, part, place, rest.dropped)
    return rest


@cache
def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    return {field.name.lower(): field for field in descriptor.fields}


def _fill(message: Message, document: object, place: str, ignored: list[str]) -> None:
    if not isinstance(document, Mapping):
        raise _wrong(place or "the document", "an object", document)
    descriptor = message.DESCRIPTOR
    fields = _fields(descriptor)
    for key, value in document.items():
        where = f"{place}.{key}" if place else str(key)
        if value is None:
            continue
        lowered = str(key).lower()
        field = fields.get(_RENAMED.get((descriptor.name, lowered), lowered))
        if field is None:
            ignored.append(where)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(getattr(message, field.name), value, where)
        elif field.is_repeated:
            _fill_list(getattr(message, field.name), field, value, where, ignored)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            child.SetInParent()
            _fill(child, value, where, ignored)
        else:
            try:
                setattr(message, field.name, value)
            except (TypeError, ValueError) as error:
                raise _wrong(where, _type_name(field), value) from error


def _fill_map(target: Any, value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object of strings", value)
    for key, item in value.items():
        try:
            target[key] = item
        except (TypeError, ValueError) as error:
            raise _wrong(f"{where}[{key!r}]", "a string", item) from error


def _fill_list(target: Any, field: FieldDescriptor, value: object, where: str, ignored: list[str]) -> None:
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    for index, item in enumerate(value):
        if field.message_type is not None:
            _fill(target.add(), item, f"{where}[{index}]", ignored)
        else:
            try:
                target.append(item)
            except (TypeError, ValueError) as error:
                raise _wrong(f"{where}[{index}]", _type_name(field), item) from error


_TYPE_NAMES = {
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_INT32: "an integer of 32 bits",
    FieldDescriptor.CPPTYPE_INT64: "an integer of 64 bits",
    FieldDescriptor.CPPTYPE_UINT32: "an integer from 0 to 4294967295",
    FieldDescriptor.CPPTYPE_UINT64: "an integer from 0 to 2^64-1",
}


def _type_name(field: FieldDescriptor) -> str:
    return _TYPE_NAMES.get(field.cpp_type, "another type")


def _wrong(where: str, wanted: str, value: object) -> CallerError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return CallerError(
        f"config.json: {where} must be {wanted}, not {shown}", phase="bundle", code="INVALID_ARGUMENT"
    )
