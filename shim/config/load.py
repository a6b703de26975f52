"""Finds, reads, merges and checks the configuration file.

What: `load_config` gives a `Config`: the [runtime], the chosen agent's and the chosen hypervisor's
section, complete and validated. The other [hypervisor.*] and [agent.*] sections are not looked at.
Why: Kata's files work as they are, but a mistake in one is told before anything is started, with
file, line, key and the nearest name (design D5).
Order: the files are read and merged (`shim.config.source`); then types and keys, the pod's annotations
(`shim.config.annotations`), the plugin's `adjust_config`, existence of the files named, rules between
keys, the plugin's `validate_config`.
Invariants: all that is wrong is a ConfigError with phase "config" (the plugin may also say HostError).
Reading blocks for about a millisecond; nothing is imported for messages that are not needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from devices.errors import ConfigError, KataError
from shim.config.fill import Table, fill, known_keys, nearest
from shim.config.find import SEARCH_PATH, existing, find_config
from shim.config.rules import PATH_HINT, check_agent, check_paths, check_patterns, check_runtime
from shim.config.schema import (
    AGENT_INACTIVE,
    HYPERVISOR_ALIASES,
    HYPERVISOR_INACTIVE,
    RUNTIME_INACTIVE,
    TOP_LEVEL,
    AgentConfig,
    AnnotationPolicy,
    FactoryConfig,
    Inactive,
    RuntimeConfig,
)
from shim.config.source import Source

if TYPE_CHECKING:
    from hypervisors.base import HypervisorPlugin
    from shim.config.annotations import PodAnnotations

__all__ = ["SEARCH_PATH", "Config", "ConfigFileError", "find_config", "load_config"]

DEFAULT_HYPERVISOR = "qemu"
DEFAULT_AGENT = "kata"
_FACTORY = "factory"


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
    adjust and validate, `policy` what a pod's annotations may change, `annotations` those that did,
    `inactive` the keys that have no effect yet, `source` the files' content, for who asks what came whence.
    `stock_root`: the device that a stock image's root is on, "" if that is the image itself.
    """

    path: str
    files: tuple[str, ...]
    runtime: RuntimeConfig
    agent: AgentConfig
    hypervisor_name: str
    hypervisor: Any
    factory: FactoryConfig = field(default_factory=FactoryConfig)
    policy: AnnotationPolicy
    annotations: tuple[str, ...]
    inactive: tuple[Inactive, ...]
    stock_root: str = ""
    source: Source = field(compare=False, repr=False)


def load_config(
    path: str | None = None,
    *,
    options_path: str | None = None,
    env: Mapping[str, str] | None = None,
    runtime_class: str = "",
    annotations: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    get_plugin: Callable[[str], HypervisorPlugin[Any]] | None = None,
) -> Config:
    """Find, read, merge and check. Raises ConfigError (or HostError, from the hypervisor's plugin).

    `env` is where KATA_CONF_FILE is looked up. `annotations` are a pod's; see shim.config.annotations.
    `texts`: as in `Source.read`, to check what is not written yet.
    `get_plugin` is for tests; by default the registry's.
    """
    base = find_config(path, options_path=options_path, env=env, runtime_class=runtime_class)
    if get_plugin is None:
        from hypervisors.registry import get_plugin as from_registry

        get_plugin = from_registry
    pod: PodAnnotations | None = None
    try:
        if any(name.startswith("io.katacontainers.config") for name in annotations or ()):
            from shim.config.annotations import CONFIG_PATH, PodAnnotations  # most pods have none

            assert annotations is not None
            if CONFIG_PATH in annotations:
                base = _asked_for(base, annotations[CONFIG_PATH])
            pod = PodAnnotations(annotations)
        return _check(Source.read(base, texts), base, get_plugin, pod)
    except KataError as error:
        asked = f", or the pod's annotations ({', '.join(pod.used)})" if pod and pod.used else ""
        error.with_context(phase="config", hint=f"correct {base}{asked}")
        raise


def _asked_for(base: str, wanted: Any) -> str:
    """The file that the annotation io.katacontainers.config_path names, if `base` lists it."""
    from shim.config.annotations import CONFIG_PATH, listed_path

    table = Source.read(base).table("runtime")
    runtime, _, problems = fill(table, RuntimeConfig, inactive=_RUNTIME_KEYS)
    if problems:
        raise ConfigFileError(base, problems)
    if not isinstance(wanted, str) or not listed_path(wanted, runtime.get("valid_config_paths", ())):
        raise ConfigError(
            f"annotation {CONFIG_PATH} names a file that [runtime] valid_config_paths "
            f"({table.at('valid_config_paths')}) does not list",
            phase="config",
            hint="the administrator can list it there; else remove the annotation",
        )
    return existing(f"annotation {CONFIG_PATH}", wanted)


class _Reading:
    """What `_check` gathers on its way: problems, keys without effect, and keys that mean another field."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[str] = []
        self.inactive: list[Inactive] = []
        self.moved: dict[str, Any] = {}

    def section(
        self,
        *name: str,
        schema: type[Any] | None,
        inactive: Mapping[str, Any],
        moved: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments of a section. `moved`: further keys, which go to `self.moved`."""
        values, found, wrong = fill(
            self.source.table(*name), schema, inactive={**inactive, **(moved or {})}, aliases=aliases
        )
        self.problems += wrong
        for each in found:
            if each.section == ".".join(name) and each.key in (moved or ()):
                self.moved[each.key] = each.value
            elif each.key == _FACTORY and name[:1] == ("hypervisor",):
                continue  # a section of its own
            else:
                self.inactive.append(each)
        return values


def _check(
    source: Source,
    base: str,
    get_plugin: Callable[[str], HypervisorPlugin[Any]],
    pod: PodAnnotations | None,
) -> Config:
    known = {"runtime": "table", "agent": "table", "hypervisor": "table"} | dict.fromkeys(TOP_LEVEL, "table")
    reading = _Reading(source)
    problems, inactive = reading.problems, reading.inactive
    for name in source.values:
        if name not in known:
            file, line = source.locate(name)
            problems.append(f'{file}:{line}: there is no section "{name}"; {nearest(name, known)}')

    runtime = reading.section(
        "runtime", schema=RuntimeConfig, inactive=RUNTIME_INACTIVE, moved=_RUNTIME_READ_HERE
    )
    hypervisor_name = runtime.get("hypervisor_name") or _only_section(
        source, "hypervisor", DEFAULT_HYPERVISOR
    )
    agent_name = runtime.get("agent_name") or _only_section(source, "agent", DEFAULT_AGENT)
    if pod:
        own = _section_name(source, hypervisor_name)
        policy, where = _policy(source, own), source.table("hypervisor", own).at
        sections = source.table("hypervisor").values, source.table("agent").values
        hypervisor_name = pod.section_name("hypervisor", hypervisor_name, policy, where, sections[0])
        agent_name = pod.section_name("agent", agent_name, policy, where, sections[1])
    agent_table = source.table("agent", agent_name)
    agent = reading.section(
        "agent", agent_name, schema=AgentConfig, inactive=AGENT_INACTIVE, moved=_AGENT_READ_HERE
    )
    factory: dict[str, Any] = {}
    for name, keys in TOP_LEVEL.items():
        factory |= reading.section(name, schema=FactoryConfig, inactive=keys)

    plugin: HypervisorPlugin[Any] | None = None
    hint = "correct the file"
    try:
        plugin = get_plugin(hypervisor_name)
    except ConfigError as error:  # told with everything else that is wrong
        place = source.table("runtime").at("hypervisor_name") if "hypervisor_name" in runtime else base
        problems.append(f"{place}: {error.cause}")
        hint = error.hint or hint
    hypervisor_name = _section_name(source, hypervisor_name)
    table = source.table("hypervisor", hypervisor_name)
    values = reading.section(
        "hypervisor",
        hypervisor_name,
        schema=plugin.section if plugin else None,
        inactive=HYPERVISOR_INACTIVE,
        moved=_POLICY_KEYS,
        aliases=HYPERVISOR_ALIASES,
    )
    if isinstance(table.values.get(_FACTORY, {}), dict):
        factory |= reading.section("hypervisor", hypervisor_name, _FACTORY, schema=FactoryConfig, inactive={})
    policy = _policy(source, hypervisor_name)
    problems += check_patterns(policy, table)
    if problems or plugin is None:
        raise ConfigFileError(base, problems, hint=hint)
    if pod:
        inactive += _overlay(pod, policy, table, plugin, runtime, agent, values)

    with _placed(base, table, pod):
        section = plugin.adjust_config(plugin.section(**values))
    problems += check_paths(section, table)
    if problems:
        raise ConfigFileError(base, problems, hint=PATH_HINT)
    ours = bool(getattr(section, "initrd", "")) and bool(getattr(section, "image", ""))
    agent_config = _agent({"home_call": ours, **agent, "name": agent_name}, reading.moved)
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
    problems += check_runtime(runtime_config, source.table("runtime"))
    problems += check_agent(agent_config, agent_table)
    factory_config = FactoryConfig(**factory)
    if factory_config.enable_template:
        from shim.config.factory import check_factory  # few configurations have one

        wrong, without_effect = check_factory(
            factory_config, runtime_config, agent_config, plugin, section, source, hypervisor_name
        )
        problems += wrong
        inactive += without_effect
        if without_effect:
            factory_config = replace(factory_config, enable_template=False)
    if problems:
        raise ConfigFileError(base, problems)
    with _placed(base, table, pod):
        plugin.validate_config(section)
    return Config(
        path=base,
        files=tuple(source.files),
        runtime=runtime_config,
        agent=agent_config,
        hypervisor_name=hypervisor_name,
        hypervisor=section,
        factory=factory_config,
        policy=policy,
        annotations=tuple(pod.used) if pod else (),
        inactive=tuple(inactive),
        stock_root="" if agent_config.home_call else _stock_root(getattr(section, "image", "")),
        source=source,
    )


def _stock_root(image: str) -> str:
    """Kata's images have a partition table, and their root in the first partition."""
    try:
        with open(image, "rb") as file:
            sector = file.read(512)
    except OSError:  # the plugin says it better
        return ""
    return "/dev/vda1" if sector[510:] == b"\x55\xaa" and sector[450] else ""


@contextlib.contextmanager
def _placed(base: str, table: Table, pod: PodAnnotations | None) -> Iterator[None]:
    """What the plugin refuses with a key gets the key's place."""
    try:
        yield
    except ConfigError as error:
        if not error.key:
            raise
        place = table.at(error.key) if table.values else base
        if pod:
            annotation = pod.origin.get((table.name, error.key))
            place = f"annotation {annotation}" if annotation else place
        what = "the annotation" if place.startswith("annotation") else "the file"
        hint = error.hint or f"correct {what}"
        raise ConfigFileError(base, [f"{place}: {error.cause}"], hint=hint) from error


def _section_name(source: Source, name: str) -> str:
    """The section of hypervisor `name`: its own, or the one under another name of the same VMM's."""
    from hypervisors.registry import names_of

    have = source.table("hypervisor").values
    return next((each for each in (name, *names_of(name)) if each in have), name)


def _policy(source: Source, hypervisor_name: str) -> AnnotationPolicy:
    """What the section says of annotations. Wrong types are told by whoever reads the whole section."""
    values = source.table("hypervisor", hypervisor_name).values
    lists = {key: values[key] for key in _POLICY_KEYS if isinstance(values.get(key), list)}
    return AnnotationPolicy(**{key: tuple(map(str, value)) for key, value in lists.items()})


def _overlay(
    pod: PodAnnotations,
    policy: AnnotationPolicy,
    table: Table,
    plugin: HypervisorPlugin[Any],
    runtime: dict[str, Any],
    agent: dict[str, Any],
    values: dict[str, Any],
) -> list[Inactive]:
    """The pod's annotations over the three sections' arguments; returns those without effect."""
    inactive: list[Inactive] = []
    for group, section, into, schema, without_effect in (
        ("runtime", "runtime", runtime, RuntimeConfig, RUNTIME_INACTIVE),
        ("agent", "agent", agent, AgentConfig, AGENT_INACTIVE),
        ("hypervisor", table.name, values, plugin.section, HYPERVISOR_INACTIVE),
    ):
        known = known_keys(schema, without_effect)
        if group == "runtime":
            known["create_container_timeout"] = "float"
        defaults = {each.name: each.default for each in fields(schema)}
        inactive += pod.overlay(
            group,
            into,
            known,
            policy,
            table.at,
            section=section,
            inactive={key: value for key, value in without_effect.items() if key not in defaults},
            defaults={**without_effect, **defaults},
        )
    if "create_container_timeout" in runtime:  # a field of the agent's section
        agent["create_container_timeout"] = runtime.pop("create_container_timeout")
    return inactive


# Keys that have an effect, but through a field of another name or section.
_RUNTIME_READ_HERE: Mapping[str, Any] = {"create_container_timeout": 30.0}
_AGENT_READ_HERE: Mapping[str, Any] = {"dial_timeout": 0}
_RUNTIME_KEYS = {**RUNTIME_INACTIVE, **_RUNTIME_READ_HERE}
_POLICY_KEYS: Mapping[str, Any] = dict.fromkeys(AnnotationPolicy.__dataclass_fields__, ())


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
