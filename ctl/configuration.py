"""`kata-ctl config show|check`: the configuration as the shim reads it.

`show` prints TOML: every key that counts, with the value it has after defaults and adjustments.
`check` tells all that is wrong in a file, not only the first, and the keys that have no effect.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from typing import Any

from devices.errors import ConfigError, KataError
from shim.config import ConfigFileError, load_config
from shim.config.schema import toml_value

__all__ = ["check", "show"]


def _load(path: str | None) -> Any:
    return load_config(os.path.abspath(path) if path else None, env=os.environ)


def _section(name: str, values: Any) -> list[str]:
    lines = [f"[{name}]"]
    lines += [f"{field.name} = {toml_value(getattr(values, field.name))}" for field in fields(values)]
    return [*lines, ""]


def show(path: str | None) -> int:
    """Print the complete configuration; returns the exit code. Raises ConfigError."""
    config = _load(path)
    agent = [line for line in _section(f"agent.{config.agent.name}", config.agent) if line[:7] != "name = "]
    lines = [f"# from {file}" for file in config.files]
    lines += ["", *_section("runtime", config.runtime), *agent]
    lines += _section(f"hypervisor.{config.hypervisor_name}", config.hypervisor)
    print("\n".join(lines).rstrip())
    return 0


def check(path: str | None) -> int:
    """Print all mistakes to stderr and all keys without effect; returns the exit code."""
    try:
        config = _load(path)
    except ConfigFileError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        print(f"try: {error.hint}", file=sys.stderr)
        return 1
    except KataError as error:
        print(_plain(error), file=sys.stderr)
        return 1
    quiet = [each for each in config.inactive if each.harmless]
    for each in config.inactive:
        if not each.harmless:
            print(f"note: {each}")
    if quiet:
        print(f"note: {len(quiet)} more keys have no effect yet, but ask for what happens anyway")
    print(f"{config.path}: good, for {config.hypervisor_name}")
    return 0


def _plain(error: KataError) -> str:
    if isinstance(error, ConfigError):
        return error.cause + (f"; try: {error.hint}" if error.hint else "")
    return str(error)
