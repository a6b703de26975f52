"""The targets that read documents of OCI and JSON: config.json, an exec's process, an update's resources.

What: enters them into `targets.TARGETS`. A spec that is taken goes on through everything that looks at one
before a VM is started. `spec_values` changes a whole spec where the input says so, since a fuzzer that has to
keep JSON's commas right sees little else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from devices import foreign_json, strict_json
from devices.errors import CallerError, KataError
from shim.config.options import config_path
from shim.hooks.hook_process import read_hooks, state_json
from shim.sandbox.pod_config import parse_options, sandbox_spec, shares_pids
from shim.spec import oci_fields
from shim.spec.device_rules import device_rules
from shim.spec.documents import checked, load_spec, process_of, resources_of
from shim.spec.guest_devices import check_devices, host_devices
from shim.spec.guest_spec import guest_spec, plan_volumes, wants_sandbox_pidns
from shim.spec.limits import fold_unified, wanted
from shim.spec.oci import process_from_json, resources_from_json, spec_from_json
from shim.spec.pod_role import container_type
from shim.spec.shape import copied
from shim.state.bundle import MEMBER, BundleError, Group, find_group
from tests.fuzz.targets import directory, target
from tests.unit.shim.spec.oci_documents import example

__all__: list[str] = []

_CODES = frozenset({"INVALID_ARGUMENT", "UNIMPLEMENTED"})


def _told(error: KataError, what: str) -> None:
    """Whoever wrote the document is told what is wrong with it, in one line that says which one it is."""
    text = str(error)
    assert isinstance(error, CallerError), repr(error)
    assert error.code in _CODES, error.code
    assert text.isprintable(), text
    assert what in text, text
    assert len(text) < 2000, len(text)


def _place_is_told(error: KataError, data: bytes) -> None:
    """Of a document that is JSON the place of what is wrong is told, beginning with one of its keys."""
    try:
        document = strict_json.parse(data)
    except strict_json.JsonError:
        return
    if isinstance(document, dict):
        told = re.search(r'config\.json: (\["|[\w.-]+)', str(error))
        assert told, str(error)
        assert told[1] == '["' or any(key.startswith(told[1][:1]) for key in document), str(error)


def _whole_way(spec: dict[str, Any]) -> None:
    """What looks at a spec until its guest gets it."""
    before = json.dumps(spec)
    kind = container_type(spec)
    oci_fields.check(spec)
    read_hooks(spec)
    check_devices(spec)
    disks = host_devices(spec)
    volumes = plan_volumes(spec, "c")
    assert all(volume.source.startswith("/") and "/" not in volume.share_name for volume in volumes)
    wants_sandbox_pidns(spec)
    device_rules(spec)
    made, _ = guest_spec(
        spec, container_id="c", bundle="/b", container_type=kind, volumes=volumes, devices=disks
    )
    message, _rest = spec_from_json(made)
    size = wanted(message.Linux.Resources)
    assert math.isfinite(size.vcpus)
    assert size.memory >= 0
    state_json(spec, "c", "/b", "created", 1)
    assert json.dumps(spec) == before, "nobody changes the spec that others read, too"


def _group(bundle: str) -> Group | None:
    """What `start` makes of it."""
    try:
        return find_group(bundle, "c")
    except BundleError:
        return None


@target
def config_json(data: bytes) -> None:
    """A bundle's config.json; `start` and the daemon understand the same of it."""
    bundle = directory("config.json", data)
    group = _group(bundle)
    try:
        spec, _ = load_spec(bundle)
    except KataError as error:
        _told(error, "config.json")
        _place_is_told(error, data)
        return
    try:
        kind = container_type(spec)
    except CallerError:
        assert group is None, "what start takes for a pod's, the daemon refuses"
        return
    assert group is not None
    if group.is_member:
        assert kind == MEMBER
    try:
        _whole_way(spec)
    except KataError as error:
        _told(error, "config.json")


_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 63, 1 << 64, 10**39, 1e308, 0.5, -0.0),
    *("", "/", "..", "/..", "/dev/shm", "\u202e", "\ud800", "\0", "x" * 300, "max", "0-3,8", "rbind", "ro"),
    *([], [[]], [None], [""], [0], [{}], [[{}]], {}, {"": ""}, {"path": 5}, {"type": None}, [{}] * 70),
)


@cache
def _example() -> str:
    """A spec with every field that is served."""
    spec = example()

    def leave_out(parent: dict[str, Any], key: str, _where: str) -> None:
        del parent[key]

    for place in oci_fields.REFUSED:
        oci_fields._each(spec, place, leave_out)
    spec["linux"]["devices"][0]["type"] = "b"
    _whole_way(spec)
    return json.dumps(spec)


@target
def spec_values(data: bytes) -> None:
    """A whole spec with up to four changes, each made of a way into it and a value."""
    document = json.loads(_example())
    at = iter(data)
    for _ in range(4):
        parent, key = _somewhere(document, at)
        if parent is None:
            break
        _change(parent, key, next(at, 0))
    config_json(json.dumps(document).encode())


def _somewhere(document: Any, at: Iterator[int]) -> tuple[Any, Any]:
    """(parent, key) of the place that the next bytes lead to; it ends by a byte of 200 or more."""
    parent, key, here = None, None, document
    for byte in at:
        if (byte >= 200 and parent is not None) or not isinstance(here, dict | list) or not here:
            break
        keys = list(here) if isinstance(here, dict) else range(len(here))
        parent, key = here, keys[byte % len(keys)]
        here = parent[key]
    return parent, key


def _change(parent: Any, key: Any, how: int) -> None:
    if how < len(_ODD):
        parent[key] = copied(_ODD[how])  # further changes may be in it
    elif isinstance(parent, list):
        parent.extend(copied(parent[key]) for _ in range(how % 16))
    elif how % 3 == 0:
        del parent[key]
    elif how % 3 == 1:
        parent[key.upper()] = copied(parent[key])
    else:
        parent[key[:1].upper() + key[1:]] = parent.pop(key)


@target
def exec_process(data: bytes) -> None:
    """The process that an exec brings."""
    try:
        document, _ = process_of(data)
        process_from_json(document)
    except KataError as error:
        _told(error, "process")


@target
def update_resources(data: bytes) -> None:
    """The limits that an update brings."""
    try:
        document, _ = resources_of(data)
        message, _rest = resources_from_json(fold_unified(document))
    except KataError as error:
        _told(error, "resources")
        return
    assert math.isfinite(wanted(message).vcpus)


@target
def sandbox_options(data: bytes) -> None:
    """What the Sandbox API says a pod is to be, and which configuration containerd names."""
    try:
        config_path(AnyMessage(type_url="x/runtimeoptions.v1.Options", value=data))
    except CallerError as error:
        assert error.code == "INVALID_ARGUMENT"
    try:
        config = parse_options(AnyMessage(type_url="x/runtime.v1.PodSandboxConfig", value=data))
        shares_pids(config)
        spec = sandbox_spec({}, config, sandbox_id="s", netns="/n", annotations={}, files={"/etc/x": "/x"})
        spec = checked(spec, "the sandbox")
    except KataError as error:
        assert isinstance(error, CallerError)
        assert error.code == "INVALID_ARGUMENT"
        return
    assert container_type(spec) != MEMBER


# --- JSON itself


@target
def json_strict(data: bytes) -> None:
    """A value that can be written and read again, or what is wrong."""
    try:
        value = strict_json.parse(data)
    except strict_json.JsonError as error:
        assert str(error).isprintable()
        return
    again = strict_json.parse(json.dumps(value, allow_nan=True).replace("Infinity", "1e999").encode())
    assert again == value


@target
def json_foreign(data: bytes) -> None:
    """A value in which each number has 64 bits, or a ValueError."""
    try:
        value = foreign_json.loads(data)
    except ValueError:
        return
    _check_foreign(value, 0)


def _check_foreign(value: Any, depth: int) -> None:
    assert depth <= foreign_json.DEPTH + 1
    if isinstance(value, dict):
        for member in value.values():
            _check_foreign(member, depth + 1)
    elif isinstance(value, list):
        for member in value:
            _check_foreign(member, depth + 1)
    elif isinstance(value, int):
        assert -(1 << 63) <= value < 1 << 64
    elif isinstance(value, float):
        assert math.isfinite(value)
