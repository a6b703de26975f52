"""CDI: from a device's name, "vendor.com/class=name", to the nodes that the host's specifications list.

What: `find_device` reads the specifications (JSON) of the host's CDI directories and answers one device's
nodes and environment; `guest_kind` is Kata's name of a device inside the guest.
Why strict: these files are the administrator's, or a device plugin's; what is in them runs nothing here. A
hook would run as root on the host, for a container that lives in a VM: hooks are told and left out.
Invariants: at most `MAX_FILES` files of `MAX_SIZE` bytes are read; a file that is no specification is the
error when no other has the device; a device that two files of one directory define is refused; of two
directories the later one counts.
Source: the Container Device Interface's SPEC.md, version 0.8; kata.md 1.11.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.errors import CallerError, HostError
from devices.small_file import read_small
from devices.strict_json import parse

__all__ = ["ANNOTATION", "DIRECTORIES", "CdiDevice", "annotated", "find_device", "guest_kind"]

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
"""The specification's own; what is in the second one, which programs write, goes before the first."""
ANNOTATION = "cdi.k8s.io/"
MAX_FILES = 128
MAX_SIZE = 1 << 20
_MAX_NODES = 256
_MAX_NAMES = 32  # of devices in all annotations of a container

_NAME = re.compile(
    r"(?P<kind>[a-z0-9][a-z0-9._-]{0,126}/[A-Za-z0-9][A-Za-z0-9_-]{0,62})=(?P<name>[A-Za-z0-9][\w.:-]{0,126})",
    re.ASCII,
)
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*")
_LISTS = ("deviceNodes", "env", "hooks", "mounts")
_PHASE = "devices"
# Vendor and the first three digits of the class, as in Kata.
_KINDS = {
    (0x10DE, 0x030): "nvidia.com/gpu",
    (0x1002, 0x030): "amd.com/gpu",
    (0x8086, 0x030): "intel.com/gpu",
    (0x15B3, 0x020): "nvidia.com/nic",
}


@dataclass(frozen=True, slots=True)
class CdiDevice:
    """`nodes`: paths of the host, in the specification's order; `env`: "NAME=value"; `left_out`: what else
    the specification asks for."""

    name: str
    nodes: tuple[str, ...]
    env: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def guest_kind(vendor: int, class_code: int) -> str:
    """The kind by which a specification in the guest knows such a device; "" where Kata has none."""
    return _KINDS.get((vendor, class_code >> 12), "")


def annotated(annotations: Mapping[str, Any]) -> list[str]:
    """The devices that a container's annotations `cdi.k8s.io/...` name, each once, in the order of the keys.

    Raises CallerError for a value that is no list of names, and for more than 32.
    """
    names: dict[str, None] = {}
    for key in sorted(key for key in annotations if key.startswith(ANNOTATION)):
        value = annotations[key]
        for name in value.split(",") if isinstance(value, str) and len(value) < 8192 else [""]:
            if not _NAME.fullmatch(name):
                raise CallerError(
                    f'annotation {key[:100]}: {name[:100]!r} is no device\'s name "vendor.com/class=name"',
                    phase=_PHASE,
                    code="INVALID_ARGUMENT",
                )
            names[name] = None
    if len(names) > _MAX_NAMES:
        raise CallerError(
            f"the annotations {ANNOTATION}* name more than {_MAX_NAMES} devices",
            phase=_PHASE,
            code="INVALID_ARGUMENT",
        )
    return list(names)


def find_device(name: str, directories: Sequence[str] = DIRECTORIES) -> CdiDevice:
    """The device "kind=name". Blocks. Raises HostError if no specification has it, or a wrong one does."""
    wanted = _NAME.fullmatch(name)
    if wanted is None:
        raise CallerError(f"{name[:100]!r} is no CDI device", phase=_PHASE, code="INVALID_ARGUMENT")
    unread: list[str] = []
    broken: HostError | None = None
    for directory in reversed(directories):
        found: dict[str, CdiDevice] = {}
        for path in _files(directory, unread):
            try:
                spec = _load(path)
            except HostError as error:
                broken = broken or error
                continue
            if spec["kind"] != wanted["kind"]:
                continue
            for device in spec["devices"]:
                if device["name"] == wanted["name"]:
                    found[path] = _device(name, device, spec, path)
        if len(found) > 1:
            raise HostError(
                f"the CDI device {name} is defined in {' and in '.join(found)}",
                phase=_PHASE,
                hint="remove it from one of them",
            )
        if found:
            return next(iter(found.values()))
    if broken is not None:
        raise broken
    if unread:
        raise HostError(
            f"no CDI specification in JSON has the device {name}, and YAML is not read here: {unread[0]}",
            phase=_PHASE,
            hint=f"write it as JSON: {os.path.splitext(unread[0])[0]}.json",
        )
    raise HostError(
        f"no CDI specification of this host has the device {name} (looked in {', '.join(directories)})",
        phase=_PHASE,
    )


def _files(directory: str, unread: list[str]) -> Iterator[str]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    if len(names) > MAX_FILES:
        raise HostError(f"{directory} has more than {MAX_FILES} files", phase=_PHASE)
    for name in names:
        path = os.path.join(directory, name)
        if name.endswith(".json"):
            yield path
        elif name.endswith((".yaml", ".yml")):
            unread.append(path)


def _load(path: str) -> Any:
    try:
        spec = parse(read_small(path, MAX_SIZE))
        _check(spec)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", phase=_PHASE) from error
    except ValueError as error:
        raise HostError(f"{path} is no CDI specification: {error}", phase=_PHASE) from error
    return spec


def _check(spec: Any) -> None:
    """Raise ValueError unless it has the form that the specification gives it, as far as we read it."""
    if not isinstance(spec, dict) or not isinstance(spec.get("kind"), str):
        raise ValueError('it has no "kind"')
    version = spec.get("cdiVersion")
    if not isinstance(version, str) or not re.fullmatch(r"v?0\.[0-9]+\.[0-9]+|v?1\.[0-9]+\.[0-9]+", version):
        raise ValueError(f'its "cdiVersion" is {version!r}')
    devices = spec.get("devices")
    if not isinstance(devices, list) or not devices:
        raise ValueError('it has no "devices"')
    for device in devices:
        if not isinstance(device, dict) or not isinstance(device.get("name"), str):
            raise ValueError("one of its devices has no name")
    for part in (spec, *devices):
        edits = part.get("containerEdits")
        if edits is None and part is spec:
            continue
        if not isinstance(edits, dict):
            raise ValueError(f'"containerEdits" of {part.get("name", "all")} is no object')
        for key in _LISTS:
            if not isinstance(edits.get(key) or [], list):
                raise ValueError(f'"{key}" of {part.get("name", "all")} is no list')


def _device(name: str, device: Mapping[str, Any], spec: Mapping[str, Any], path: str) -> CdiDevice:
    nodes: list[str] = []
    env: list[str] = []
    left_out: list[str] = []
    for edits in (spec.get("containerEdits") or {}, device["containerEdits"]):
        for node in edits.get("deviceNodes") or []:
            where = (node.get("hostPath") or node.get("path")) if isinstance(node, dict) else None
            if not isinstance(where, str) or not where.startswith("/") or ".." in where.split("/"):
                raise HostError(f"{path}: {name} has a device node without a plain path", phase=_PHASE)
            nodes.append(where)
        for word in edits.get("env") or []:
            if not isinstance(word, str) or not _ENV.fullmatch(word):
                raise HostError(f"{path}: {name} has an env that is no NAME=value", phase=_PHASE)
            env.append(word)
        left_out += [
            f"{name}: {key}" for key in sorted(edits) if key not in ("deviceNodes", "env") and edits[key]
        ]
    if len(nodes) > _MAX_NODES:
        raise HostError(f"{path}: {name} has more than {_MAX_NODES} device nodes", phase=_PHASE)
    return CdiDevice(name, tuple(dict.fromkeys(nodes)), tuple(env), tuple(left_out))
