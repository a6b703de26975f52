"""OCI runtime-spec JSON to the agent's protobuf Spec, field by field, by descriptor.

What: `spec_from_json` and its siblings turn the documents of `shim.spec.documents` into `proto.oci_pb2`
messages. The protobuf names are the JSON names in another case (`noNewPrivileges`,
`NoNewPrivileges`), so one walk over the descriptors serves all messages; the few names that differ
stand in `_RENAMED`.
Why not google.protobuf.json_format: it wants exact names, and refuses what it does not know.
Each answers the message and `Rest`: what of the document is not in it.
Invariants: what cannot be served is refused (`oci_fields.check`) before anything else; a field without
a counterpart in the agent's protocol is never dropped silently, it is in the rest. Types and ranges were seen
to before (`shim.spec.oci_types`, whose ranges are no wider than the messages').
Source: runtime-spec 1.0.2 `config.md` and `config-linux.md`; Kata's oci.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from proto import oci_pb2
from shim.spec import oci_fields
from shim.spec.shape import copied

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
    part: dict[str, Any] = copied(dict(document))
    whole = part
    for step in reversed(place.split(".") if place else ()):
        whole = {step: whole}
    oci_fields.check(whole)
    rest = Rest(oci_fields.drop(whole), oci_fields.take_beyond(whole))
    _fill(message, part)
    return rest


@cache
def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    return {field.name.lower(): field for field in descriptor.fields}


def _fill(message: Message, document: Mapping[str, Any]) -> None:
    descriptor = message.DESCRIPTOR
    fields = _fields(descriptor)
    for key, value in document.items():
        lowered = key.lower()
        field = fields.get(_RENAMED.get((descriptor.name, lowered), lowered))
        if field is None:
            continue  # it asks for nothing, else it were in one of the tables of `oci_fields`
        if field.message_type is None:
            if field.is_repeated:
                getattr(message, field.name).extend(value)
            else:
                setattr(message, field.name, value)
        elif field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(value)
        elif field.is_repeated:
            for item in value:
                _fill(getattr(message, field.name).add(), item)
        else:
            child = getattr(message, field.name)
            child.SetInParent()
            _fill(child, value)
