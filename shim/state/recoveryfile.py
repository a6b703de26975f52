"""What the next shim must know to take a sandbox over and the journal does not say: `recovery.json`.

What: `Saved` with its parts, `write`, `read` and `remove`. The file is in the state directory of a sandbox
whose VM may outlive its shim (`on_shim_death = "keep"`), and nowhere else.
Why apart from the journal: that records what must be undone, to its last entry; this is how things stand, and
each change writes it whole.
Invariants: a reader sees the old state or the new one, never a part; it is bounded, of a version, and read
strictly: a file that is not exactly this is refused as a whole (`RecoveryError`), never guessed at. It is
there only while the VM runs and there is a container: what cannot be taken over is not offered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from devices.small_file import read_small
from devices.strict_json import JsonError, parse, place

__all__ = [
    "NAME",
    "RecoveryError",
    "Saved",
    "SavedContainer",
    "SavedDaemon",
    "SavedProcess",
    "SavedSandbox",
    "read",
    "remove",
    "take",
    "write",
]

NAME = "recovery.json"
VERSION = 1
MAX_SIZE = 16 << 20
"""Bytes: a pod of a thousand containers has one."""

_T = TypeVar("_T")


class RecoveryError(Exception):
    """It is no such file; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDaemon:
    """The daemon that is to come again: how it was started, and in which mount namespace (its inode) it was.

    `program`: the shim and its interpreter, to be run with flags behind.
    """

    id: str
    socket: str
    config_path: str
    publish_binary: str
    runtime_class: str
    alias: str
    debug: bool
    log_level: str
    mounts: int
    program: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSandbox:
    """What it is made of, as far as that counts while it runs. `section`: the hypervisor's, as configured;
    `vm`: its HypervisorState. Seconds: see `shim.protocols.Deadlines`, `shim.sandbox.health`."""

    hypervisor: str
    section: Mapping[str, Any]
    vm: Mapping[str, Any]
    is_pod: bool
    direct_stdio: bool
    agent_port: int
    boot: float
    request: float
    stop: float
    kill: float
    health_interval: float
    health_timeout: float
    health_ends: bool
    writing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedProcess:
    """`exit_status` is -1 until its exit was told. `spec` (an oci.Process in base64) and `beyond` are an
    exec's that has not been started."""

    exec_id: str
    stdin: str
    stdout: str
    stderr: str
    terminal: bool
    status: str
    input_over: bool
    exit_status: int = -1
    exited_at: int = 0
    spec: str = ""
    beyond: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedContainer:
    """Its init process first, then its execs."""

    id: str
    bundle: str
    processes: tuple[SavedProcess, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """All of it."""

    daemon: SavedDaemon
    sandbox: SavedSandbox
    containers: tuple[SavedContainer, ...]


def write(directory: str, saved: Saved) -> None:
    """Raises OSError. A few hundred microseconds on the tmpfs that /run is."""
    text = json.dumps({"version": VERSION, **dataclasses.asdict(saved)}, separators=(",", ":"))
    temporary = os.path.join(directory, f".{NAME}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(temporary, os.path.join(directory, NAME))


def remove(directory: str) -> None:
    """Nothing can be taken over here (any more). Idempotent. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, NAME))


def read(directory: str) -> Saved:
    """Raises FileNotFoundError where there is none, RecoveryError for what cannot be read."""
    path = os.path.join(directory, NAME)
    try:
        document = parse(read_small(path, MAX_SIZE))
        if not isinstance(document, dict) or document.pop("version", None) != VERSION:
            raise RecoveryError(f"{path} is not of version {VERSION}")
        return take(Saved, document, "")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecoveryError(f"{path} cannot be read: {error.strerror}") from None
    except JsonError as error:
        raise RecoveryError(f"{path} is no JSON: {error}") from None
    except TypeError as error:
        raise RecoveryError(f"{path}: {error}") from None


def take(kind: type[_T], value: Any, where: str) -> _T:
    """The dataclass `kind` of `value`, an object at `where` in the file that has exactly its fields. Raises
    TypeError."""
    if not isinstance(value, dict):
        raise TypeError(f"{where or 'it'} is no object")
    types_of = typing.get_type_hints(kind)
    strange = value.keys() ^ types_of.keys()
    if strange:
        raise TypeError(f"{place(where, min(strange))} is missing, or unknown")
    return kind(**{name: _member(types_of[name], value[name], place(where, name)) for name in types_of})


def _member(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return take(typing.cast("type[Any]", kind), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{where} is no array")
        one = typing.get_args(kind)[0]
        return tuple(_member(one, each, place(where, index)) for index, each in enumerate(value))
    if origin is not None:  # Mapping
        if not isinstance(value, dict):
            raise TypeError(f"{where} is no object")
        one = typing.get_args(kind)[1]
        return {name: _member(one, each, place(where, name)) for name, each in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not Any and type(value) is not kind:
        raise TypeError(f"{where} is no {kind.__name__}")
    return value
