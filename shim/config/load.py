"""Finds, reads, merges and checks the configuration file.

What: `load_config` gives a `Config`: the [runtime], the chosen agent's and the chosen hypervisor's
section, complete and validated. The other [hypervisor.*] and [agent.*] sections are not looked at.
Why: Kata's files work as they are, but a mistake in one is told before anything is started, with
file, line, key and the nearest name (design D5).
Order: the files are read and merged (`shim.config.source`); then types and keys, the plugin's
`adjust_config`, existence of the files named, rules between keys, the plugin's `validate_config`.
Invariants: all that is wrong is a ConfigError with phase "config" (the plugin may also say HostError).
Reading blocks for about a millisecond; nothing is imported for messages that are not needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from devices.errors import ConfigError, KataError
from shim.config.fill import Table, fill, nearest
from shim.config.schema import (
    AGENT_INACTIVE,
    HYPERVISOR_ALIASES,
    HYPERVISOR_INACTIVE,
    RUNTIME_INACTIVE,
    TOP_LEVEL,
    AgentConfig,
    Inactive,
    RuntimeConfig,
)
from shim.config.source import Source

if TYPE_CHECKING:
    from hypervisors.base import HypervisorPlugin

__all__ = ["SEARCH_PATH", "Config", "ConfigFileError", "find_config", "load_config"]

SEARCH_PATH = (
    "/etc/kata-containers/configuration.toml",
    "/opt/kata-shim/share/defaults/kata-containers/configuration.toml",
)
DEFAULT_HYPERVISOR = "qemu"
DEFAULT_AGENT = "kata"

# Keys of a hypervisor section that name files, and what must be true of those that are set.
PATH_KEYS: Mapping[str, str] = {
    "path": "program",
    "virtio_fs_daemon": "program",
    "vsock_daemon": "program",
    "jailer_path": "program",
    "kernel": "file",
    "initrd": "file",
    "image": "file",
    "firmware": "file",
    "entropy_source": "any",
}


class ConfigFileError(ConfigError):
    """Several mistakes in one file. The cause tells the first; `problems` has them all."""

    def __init__(self, path: str, problems: list[str], *, hint: str = "correct the file") -> None:
        more = f" (and {len(problems) - 1} more: `kata-ctl config check {path}`)" if problems[1:] else ""
        super().__init__(f"{problems[0]}{more}", phase="config", hint=hint)
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A complete configuration.

    `path` is the base file, `files` all files that were read, `hypervisor` the plugin's section after
    adjust and validate, `inactive` the keys in it that have no effect yet.
    """

    path: str
    files: tuple[str, ...]
    runtime: RuntimeConfig
    agent: AgentConfig
    hypervisor_name: str
    hypervisor: Any
    inactive: tuple[Inactive, ...]


def find_config(
    path: str | None, *, options_path: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    """The configuration file to use: `path`, else the runtime options' config_path, else
    $KATA_CONF_FILE, else the first that exists on SEARCH_PATH. Raises ConfigError.
    """
    for origin, named in (
        ("the given file", path),
        ("Options.config_path", options_path),
        ("$KATA_CONF_FILE", (env or {}).get("KATA_CONF_FILE")),
    ):
        if named:
            if not os.path.isabs(named):
                raise ConfigError(f"{origin} must be an absolute path, not {named!r}", phase="config")
            if not os.path.exists(named):
                raise ConfigError(
                    f"{origin} does not exist: {named}", phase="config", hint="correct the path"
                )
            return named
    for candidate in SEARCH_PATH:
        if os.path.exists(candidate):
            return candidate
    raise ConfigError(
        f"there is no configuration file; looked for {', '.join(SEARCH_PATH)}",
        phase="config",
        hint="`make install` puts one there; or name one by $KATA_CONF_FILE or the runtime option ConfigPath",
    )


def load_config(
    path: str | None = None,
    *,
    options_path: str | None = None,
    env: Mapping[str, str] | None = None,
    get_plugin: Callable[[str], HypervisorPlugin[Any]] | None = None,
) -> Config:
    """Find, read, merge and check. Raises ConfigError (or HostError, from the hypervisor's plugin).

    `env` is where KATA_CONF_FILE is looked up. `get_plugin` is for tests; by default the registry's.
    """
    base = find_config(path, options_path=options_path, env=env)
    if get_plugin is None:
        from hypervisors.registry import get_plugin as from_registry

        get_plugin = from_registry
    try:
        source = Source.read(base)
        return _check(source, base, get_plugin)
    except KataError as error:
        error.with_context(phase="config", hint=f"correct {base}")
        raise


def _check(source: Source, base: str, get_plugin: Callable[[str], HypervisorPlugin[Any]]) -> Config:
    known = {"runtime": "table", "agent": "table", "hypervisor": "table"} | dict.fromkeys(TOP_LEVEL, "table")
    problems: list[str] = []
    inactive: list[Inactive] = []
    for name in source.values:
        if name not in known:
            file, line = source.locate(name)
            problems.append(f'{file}:{line}: there is no section "{name}"; {nearest(name, known)}')

    runtime, found, wrong = fill(source.table("runtime"), RuntimeConfig, inactive=_RUNTIME_KEYS)
    problems += wrong
    inactive += (each for each in found if each.key not in _RUNTIME_READ_HERE)
    moved = {each.key: each.value for each in found if each.key in _RUNTIME_READ_HERE}

    hypervisor_name = runtime.get("hypervisor_name") or _only_section(
        source, "hypervisor", DEFAULT_HYPERVISOR
    )
    agent_name = runtime.get("agent_name") or _only_section(source, "agent", DEFAULT_AGENT)
    agent_table = source.table("agent", agent_name)
    agent, found, wrong = fill(agent_table, AgentConfig, inactive=_AGENT_KEYS)
    problems += wrong
    inactive += (each for each in found if each.key not in _AGENT_READ_HERE)
    moved |= {each.key: each.value for each in found if each.key in _AGENT_READ_HERE}

    for name, keys in TOP_LEVEL.items():
        _, found, wrong = fill(source.table(name), None, inactive=keys)
        problems += wrong
        inactive += found

    plugin = get_plugin(hypervisor_name)
    table = source.table("hypervisor", hypervisor_name)
    values, found, wrong = fill(
        table, plugin.section, inactive=HYPERVISOR_INACTIVE, aliases=HYPERVISOR_ALIASES
    )
    problems += wrong
    inactive += found
    if problems:
        raise ConfigFileError(base, problems)

    section = plugin.adjust_config(plugin.section(**values))
    problems += _check_paths(section, table)
    if problems:
        raise ConfigFileError(base, problems, hint=_PATH_HINT)
    ours = bool(getattr(section, "initrd", "")) and bool(getattr(section, "image", ""))
    agent_config = _agent({"home_call": ours, **agent, "name": agent_name}, moved)
    if not agent_config.home_call and runtime.pop("use_passfd_io", False):
        locate = partial(source.locate, "runtime", "use_passfd_io")
        inactive.append(Inactive("runtime", "use_passfd_io", True, False, locate))
    runtime_config = RuntimeConfig(
        **{
            "use_passfd_io": agent_config.home_call,
            **runtime,
            "hypervisor_name": hypervisor_name,
            "agent_name": agent_name,
        }
    )
    problems += _check_runtime(runtime_config, source.table("runtime"))
    problems += _check_agent(agent_config, agent_table)
    if problems:
        raise ConfigFileError(base, problems)
    plugin.validate_config(section)
    return Config(
        path=base,
        files=tuple(source.files),
        runtime=runtime_config,
        agent=agent_config,
        hypervisor_name=hypervisor_name,
        hypervisor=section,
        inactive=tuple(inactive),
    )


# Keys that have an effect, but through a field of another name or section.
_RUNTIME_READ_HERE: Mapping[str, Any] = {"create_container_timeout": 30.0}
_AGENT_READ_HERE: Mapping[str, Any] = {"dial_timeout": 0}
_RUNTIME_KEYS = {**RUNTIME_INACTIVE, **_RUNTIME_READ_HERE}
_AGENT_KEYS = {**AGENT_INACTIVE, **_AGENT_READ_HERE}


def _only_section(source: Source, kind: str, default: str) -> str:
    """The name of the only [kind.*] section, or the default. Files of Kata's Go runtime name neither."""
    names = [name for name, value in source.table(kind).values.items() if isinstance(value, dict)]
    return names[0] if len(names) == 1 else default


def _agent(arguments: dict[str, Any], moved: Mapping[str, Any]) -> AgentConfig:
    """The agent's section with what other keys say of it, where it does not itself.

    [runtime] create_container_timeout and [agent] dial_timeout in seconds are of Kata's Go runtime. A
    dial_timeout_ms above reconnect_timeout_ms's default raises that: Kata's own Firecracker file relies
    on it.
    """
    if "create_container_timeout" in moved:
        arguments.setdefault("create_container_timeout", moved["create_container_timeout"])
    if "dial_timeout" in moved:
        arguments.setdefault("reconnect_timeout_ms", moved["dial_timeout"] * 1000)
    agent = AgentConfig(**arguments)
    if "reconnect_timeout_ms" not in arguments and agent.dial_timeout_ms > agent.reconnect_timeout_ms:
        agent = replace(agent, reconnect_timeout_ms=agent.dial_timeout_ms)
    return agent


_LOG_LEVELS = ("trace", "debug", "info", "warn", "warning", "error", "critical")


def _check_runtime(runtime: RuntimeConfig, table: Table) -> list[str]:
    problems = []
    if runtime.name != "virt_container":
        problems.append(f'{table.at("name")}: [runtime] name must be "virt_container", not "{runtime.name}"')
    if runtime.log_level not in _LOG_LEVELS:
        problems.append(
            f"{table.at('log_level')}: [runtime] log_level must be one of {', '.join(_LOG_LEVELS)}, "
            f'not "{runtime.log_level}"'
        )
    return problems


def _check_agent(agent: AgentConfig, table: Table) -> list[str]:
    problems = []

    def expect(good: bool, key: str, rule: str) -> None:
        if not good:
            problems.append(
                f"{table.at(key)}: [{table.name}] {key} must be {rule}, not {getattr(agent, key)}"
            )

    expect(0 < agent.server_port < 1 << 32, "server_port", "a vsock port (1 to 4294967295)")
    expect(agent.dial_timeout_ms > 0, "dial_timeout_ms", "above 0")
    expect(
        agent.reconnect_timeout_ms >= agent.dial_timeout_ms,
        "reconnect_timeout_ms",
        f"at least dial_timeout_ms ({agent.dial_timeout_ms})",
    )
    expect(agent.create_container_timeout > 0, "create_container_timeout", "above 0 (seconds)")
    return problems


_PATH_HINT = "correct the path, or install what it names (`make guest` builds kernel, initrd and image)"


def _check_paths(section: Any, table: Table) -> list[str]:
    """What the section names must be there: said now, not when the VMM has been started."""
    problems = []
    for key, kind in PATH_KEYS.items():
        path = getattr(section, key, "")
        if not path or (key == "virtio_fs_daemon" and getattr(section, "shared_fs", "") == "none"):
            continue
        where = f"{table.at(key)}: " if key in table.values else ""
        what = f"{where}[{table.name}] {key} = {path!r}"
        if not os.path.isabs(path):
            problems.append(f"{what} must be an absolute path")
        elif not os.path.exists(path):
            problems.append(f"{what} does not exist")
        elif kind != "any" and not os.path.isfile(path):
            problems.append(f"{what} is not a regular file")
        elif not os.access(path, os.X_OK if kind == "program" else os.R_OK):
            problems.append(f"{what} is not {'executable' if kind == 'program' else 'readable'}")
    return problems
