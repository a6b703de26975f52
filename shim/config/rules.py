"""Rules that values have to obey, beyond their type: ranges, relations, files that must exist.

What: one function for each section; each returns the problems it finds as text with file and line.
Why here and not in a plugin: these hold for every hypervisor, and a path that is wrong is told before
anything is started. A program, kernel or image that everybody may write is refused, as the file itself is
(`shim.config.source`): who may write it chooses what runs as root.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Any

from shim.config.fill import Table
from shim.config.schema import AgentConfig, AnnotationPolicy, RuntimeConfig

__all__ = ["PATH_HINT", "check_agent", "check_paths", "check_patterns", "check_runtime"]

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

_MODELS = ("", "tcfilter", "macvtap", "none")
_VFIO_MODES = ("guest-kernel", "vfio")
_ON_SHIM_DEATH = ("end", "keep")
_HEALTH_ACTIONS = ("none", "end")
MAX_MODULES = 256
_MODULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LOG_LEVELS = ("trace", "debug", "info", "warn", "warning", "error", "critical")


def check_runtime(runtime: RuntimeConfig, table: Table) -> list[str]:
    """Problems of [runtime]."""
    problems = []
    if runtime.name != "virt_container":
        problems.append(f'{table.at("name")}: [runtime] name must be "virt_container", not "{runtime.name}"')
    if runtime.log_level not in _LOG_LEVELS:
        problems.append(
            f"{table.at('log_level')}: [runtime] log_level must be one of {', '.join(_LOG_LEVELS)}, "
            f'not "{runtime.log_level}"'
        )
    if runtime.vfio_mode not in _VFIO_MODES:
        problems.append(
            f"{table.at('vfio_mode')}: [runtime] vfio_mode must be one of {', '.join(_VFIO_MODES)}, "
            f'not "{runtime.vfio_mode}"'
        )
    if runtime.on_shim_death not in _ON_SHIM_DEATH:
        problems.append(
            f"{table.at('on_shim_death')}: [runtime] on_shim_death must be one of "
            f'{", ".join(_ON_SHIM_DEATH)}, not "{runtime.on_shim_death}"'
        )
    model = runtime.internetworking_model
    if model not in _MODELS:
        why = "is not supported" if model == "l3forwarding" else "is no model"
        problems.append(
            f'{table.at("internetworking_model")}: [runtime] internetworking_model = "{model}" {why}; '
            f"there are {', '.join(_MODELS[1:])}"
        )
    elif runtime.disable_new_netns and model != "none":
        problems.append(
            f"{table.at('disable_new_netns')}: [runtime] disable_new_netns leaves the pod without a network, "
            'and needs internetworking_model = "none"'
        )
    return problems


def check_agent(agent: AgentConfig, table: Table) -> list[str]:
    """Problems of [agent.NAME]."""
    problems = []

    def expect(good: bool, key: str, rule: str) -> None:
        if not good:
            problems.append(
                f"{table.at(key)}: [{table.name}] {key} must be {rule}, not {getattr(agent, key)}"
            )

    expect(0 < agent.server_port < 1 << 32, "server_port", "a vsock port (1 to 4294967295)")
    lines = [line.split() for line in agent.kernel_modules]
    expect(
        len(lines) <= MAX_MODULES and all(words and _MODULE.fullmatch(words[0]) for words in lines),
        "kernel_modules",
        f"at most {MAX_MODULES} names of modules, each with its parameters",
    )
    expect(agent.dial_timeout_ms > 0, "dial_timeout_ms", "above 0")
    expect(
        agent.reconnect_timeout_ms >= agent.dial_timeout_ms,
        "reconnect_timeout_ms",
        f"at least dial_timeout_ms ({agent.dial_timeout_ms})",
    )
    expect(agent.create_container_timeout > 0, "create_container_timeout", "above 0 (seconds)")
    expect(1 <= agent.kill_timeout <= 300, "kill_timeout", "from 1 to 300 (seconds)")
    every = agent.health_check_interval
    expect(every == 0 or 1 <= every <= 86400, "health_check_interval", "0, or from 1 to 86400 (seconds)")
    expect(
        0 < agent.health_check_request_timeout_ms <= 600_000,
        "health_check_request_timeout_ms",
        "above 0 and at most 600000",
    )
    expect(
        agent.health_check_action in _HEALTH_ACTIONS,
        "health_check_action",
        f"one of {', '.join(_HEALTH_ACTIONS)}",
    )
    return problems


PATH_HINT = "correct the path, or install what it names (`make guest` builds kernel, initrd and image)"


def check_paths(section: Any, table: Table) -> list[str]:
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
        elif kind != "any" and os.stat(path).st_mode & stat.S_IWOTH:
            problems.append(f"{what} may be written by everybody (try: chmod o-w)")
        elif not os.access(path, os.X_OK if kind == "program" else os.R_OK):
            problems.append(f"{what} is not {'executable' if kind == 'program' else 'readable'}")
    return problems


def check_patterns(policy: AnnotationPolicy, table: Table) -> list[str]:
    """Patterns of enable_annotations that are none."""
    problems = []
    if policy.enable_annotations:
        import re

        for pattern in policy.enable_annotations:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(
                    f"{table.at('enable_annotations')}: [{table.name}] enable_annotations has "
                    f'"{pattern}", which is no regular expression: {error}'
                )
    return problems
