"""`kata-ctl config set KEY VALUE`: change one key of the configuration and nothing else in its file.

What: edits the text with tomlkit, so that comments and order stay, checks what the shim would make of
it, and only then replaces the file.
Invariants: a configuration that would not load is never written, nor one in which the change has no
effect because a drop-in says otherwise. The file is replaced at once (rename), with its mode and owner;
a symbolic link stays one.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import MutableMapping
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from ctl.configuration import explain
from devices.errors import ConfigError, KataError
from shim.config import load_config
from shim.config.find import find_config
from shim.config.schema import is_secret, toml_value
from shim.config.source import drop_in_directory

__all__ = ["set_key"]


def set_key(key: str, text: str, *, path: str | None = None, drop_in: str | None = None) -> int:
    """Set `key` ("hypervisor.qemu.default_memory") to the TOML value `text`; returns the exit code.

    What is no TOML value is a string. `path`: the base file instead of the shim's. `drop_in`: write into
    config.d/<drop_in> beside it instead. Raises ConfigError for what cannot be edited.
    """
    names = key.split(".")
    if len(names) < 2 or not all(names):
        raise ConfigError(
            f'"{key}" is no key',
            phase="config",
            hint="name it with its section: hypervisor.qemu.default_memory",
        )
    base = os.path.realpath(find_config(os.path.abspath(path) if path else None, env=os.environ))
    target = _target(base, drop_in)
    before = _read(target)
    after, value = _edit(target, before, names, text)
    try:
        config = load_config(base, env=os.environ, texts={target: after})
    except KataError as error:
        explain(error)
        print(f"{target}: not changed")
        return 1
    origin = config.source.origin(*names)
    if origin != target:
        raise ConfigError(
            f"{origin} sets {key} after {target}, so the change would have no effect",
            phase="config",
            hint=f"change it there: --drop-in {os.path.basename(origin)}",
        )
    for each in config.inactive:
        if names == [*each.section.split("."), each.key] and not each.harmless:
            print(f"note: {each}")
    if after == before:
        print(f"{target}: {key} is that already")
        return 0
    _replace(target, after)
    print(f"{target}: {key} = {'...' if is_secret(names[-1]) else toml_value(value)}")
    return 0


def _target(base: str, drop_in: str | None) -> str:
    if drop_in is None:
        return base
    name = drop_in if drop_in.endswith(".toml") else drop_in + ".toml"
    if os.path.basename(name) != name or name.startswith("."):
        raise ConfigError(f"{drop_in!r} is no name of a drop-in", phase="config", hint="such as 50-memory")
    return os.path.realpath(os.path.join(drop_in_directory(base), name))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", phase="config") from error


def _edit(path: str, before: str, names: list[str], text: str) -> tuple[str, Any]:
    """(the new text, the value)."""
    try:
        value = tomllib.loads(f"value = {text}")
        new = value["value"] if value.keys() == {"value"} else text
    except tomllib.TOMLDecodeError:
        new = text
    try:
        document = tomlkit.parse(before)
        table: MutableMapping[str, Any] = document
        for name in names[:-1]:
            if name not in table:
                table[name] = tomlkit.table(is_super_table=name != names[-2])
            table = table[name]
            if not isinstance(table, MutableMapping):
                raise ConfigError(f"{path}: {name} is no table", phase="config")
        if names[-1] not in table or table[names[-1]] != new:
            table[names[-1]] = new
        return tomlkit.dumps(document), new
    except TOMLKitError as error:
        raise ConfigError(
            f"{path}: not TOML: {error}", phase="config", hint="correct the syntax by hand first"
        ) from error


def _replace(path: str, text: str) -> None:
    """Write beside the file and rename; never a half of it, whatever happens."""
    directory = os.path.dirname(path)
    temporary = f"{path}.{os.getpid()}.new"
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(path)
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), old.st_mode & 0o7777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise ConfigError(f"{path} cannot be written: {error.strerror}", phase="config") from error
