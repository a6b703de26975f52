"""The OCI documents of a caller, read once: config.json, an exec's process, an update's resources.

What: `load_spec` reads a bundle's config.json, `process_of` and `resources_of` the JSON of a request,
`checked` looks at a spec that was put together here. All give what `shim.spec.oci_types` describes.
Why once, and here: whoever takes a spec from here need not ask for the type of anything in it, nor how often
it is there, nor in what letters its key was written.
Invariants: what is wrong is a CallerError INVALID_ARGUMENT with the key's place, before anything is done; no
value of a document is in it but numbers. config.json is the only file that this wing opens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from devices.errors import CallerError
from devices.small_file import read_small
from devices.strict_json import JsonError, check_strings, parse
from shim.spec.oci_types import PROCESS, RESOURCES, SPEC
from shim.spec.shape import Fitted, ShapeError, Table, fit
from shim.state.bundle import MAX_CONFIG

__all__ = ["checked", "load_spec", "process_of", "resources_of"]


def load_spec(bundle: str) -> Fitted:
    """The bundle's config.json. Raises CallerError. Blocks."""
    path = os.path.join(bundle, "config.json")
    try:
        data = read_small(path, MAX_CONFIG)
    except OSError as error:
        raise CallerError(
            f"cannot read {path}: {error.strerror}",
            phase="bundle",
            hint="a bundle needs the OCI spec of its container as config.json",
            code="INVALID_ARGUMENT",
        ) from error
    return _read(data, SPEC, "config.json")


def process_of(data: bytes) -> Fitted:
    """The process of an exec. Raises CallerError."""
    return _read(data, PROCESS, "the exec's process", root="process", phase="exec")


def resources_of(data: bytes) -> Fitted:
    """The resources of an update. Raises CallerError."""
    return _read(data, RESOURCES, "the update's resources", root="linux.resources", phase="update")


def checked(spec: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A spec that was made here of what others say; `what` is its name in errors. Raises CallerError."""
    try:
        found, _ = fit(SPEC, dict(spec))
        check_strings(found)
    except (JsonError, ShapeError) as error:
        raise _wrong(f"{what}: {error}", "bundle") from error
    return found


def _read(data: bytes, table: Table, what: str, *, root: str = "", phase: str = "bundle") -> Fitted:
    try:
        return fit(table, parse(data), root)
    except JsonError as error:
        raise _wrong(f"{what} cannot be read as an OCI document: {error}", phase) from error
    except ShapeError as error:
        raise _wrong(f"{what}: {error}", phase) from error


def _wrong(text: str, phase: str) -> CallerError:
    return CallerError(text, phase=phase, code="INVALID_ARGUMENT")
