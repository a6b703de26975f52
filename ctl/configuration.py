"""`kata-ctl config show|check`: the configuration as the shim reads it.

`show` prints TOML: every key that counts, with the value it has after defaults and adjustments, or only what
the files say; with `origin` also where each value comes from.
`check` tells all that is wrong in a file, not only the first, the keys that have no effect, and those that
Kata itself has renamed or given up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ctl.kata_history import changes
from devices.errors import ConfigError, KataError
from shim.config import Config, ConfigFileError, load_config
from shim.config.fill import kind_of_field
from shim.config.schema import HYPERVISOR_ALIASES, is_secret, toml_value

__all__ = ["check", "explain", "show"]


def _load(path: str | None) -> Config:
    return load_config(os.path.abspath(path) if path else None, env=os.environ)


def _section(config: Config, name: str, values: Any, *, origin: bool) -> Iterator[str]:
    """The lines of one dataclass; a resolved name that is the section's own is none of its keys."""
    for field in fields(values):
        if name.startswith("agent.") and field.name == "name":
            continue
        value = getattr(values, field.name)
        line = f"{field.name} = {toml_value(value)}"
        yield f"{line}  # {_origin(config, name, field, value)}" if origin else line


def _origin(config: Config, section: str, field: Any, value: Any) -> str:
    """Where a value of the effective configuration comes from, in a few words."""
    table = config.source.table(*section.split("."))
    aliases = [alias for alias, key in HYPERVISOR_ALIASES.items() if key == field.name]
    written = next((key for key in (field.name, *aliases) if key in table.values), None)
    if written is None:
        return "default" if value == field.default else "chosen for this host and guest"
    said = table.values[written]
    same = (tuple(said) if kind_of_field(field) == "strings" else said) == value
    return table.at(written) if same else f"{table.at(written)} says {toml_value(said)}"


def show(path: str | None, *, written: bool = False, origin: bool = False) -> int:
    """Print the configuration; returns the exit code. Raises ConfigError."""
    config = _load(path)
    lines = [f"# from {file}" for file in config.files]
    if written:
        lines += _written(config, config.source.values, (), origin=origin)
    else:
        hypervisor = f"hypervisor.{config.hypervisor_name}"
        lines += ["", "[runtime]", *_section(config, "runtime", config.runtime, origin=origin)]
        agent = f"agent.{config.agent.name}"
        lines += ["", f"[{agent}]", *_section(config, agent, config.agent, origin=origin)]
        lines += ["", f"[{hypervisor}]", *_section(config, hypervisor, config.hypervisor, origin=origin)]
        lines += _section(config, hypervisor, config.policy, origin=origin)
    print("\n".join(lines))
    return 0


def _written(
    config: Config, table: Mapping[str, Any], name: tuple[str, ...], *, origin: bool
) -> Iterator[str]:
    """What the files say, merged: plain keys of a table first, then its tables."""
    if name and any(not isinstance(value, dict) for value in table.values()):
        yield from ("", f"[{'.'.join(name)}]")
    for key, value in table.items():
        if not isinstance(value, dict):
            line = f"{key} = {toml_value('...' if is_secret(key) else value)}"
            file, number = config.source.locate(*name, key)
            yield f"{line}  # {file}:{number}" if origin else line
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _written(config, value, (*name, key), origin=origin)


def check(path: str | None) -> int:
    """Print all mistakes to stderr and all keys without effect; returns the exit code."""
    try:
        config = _load(path)
    except KataError as error:
        explain(error)
        return 1
    quiet = [each for each in config.inactive if each.harmless]
    for text in changes(config):
        print(f"note: {text}")
    for each in config.inactive:
        if not each.harmless:
            print(f"note: {each}")
    if quiet:
        print(f"note: {len(quiet)} more keys have no effect yet, but ask for what happens anyway")
    print(f"{config.path}: good, for {config.hypervisor_name}")
    return 0


def explain(error: KataError) -> None:
    """Print an error of the configuration to stderr: each problem on its line, then what to try."""
    if isinstance(error, ConfigFileError):
        lines = [*error.problems, f"try: {error.hint}"]
    elif isinstance(error, ConfigError):
        lines = [error.cause + (f"; try: {error.hint}" if error.hint else "")]
    else:
        lines = [str(error)]
    print("\n".join(lines), file=sys.stderr)
