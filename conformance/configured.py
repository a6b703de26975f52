"""A subject from a configuration: any plugin that is installed, without a line of code of its author's.

Raises what the shim would for the same file, so a mistake in it is told with file and line.
"""

from __future__ import annotations

import dataclasses

from conformance.subject import Subject
from hypervisors.registry import get_plugin, names_of
from shim.config import load_config

__all__ = ["configured"]

_SMALL = {"default_vcpus": 1.0, "default_memory": 256}  # what a test needs; the tests boot a dozen VMs
_PATIENCE = 240.0  # seconds for a boot, in a nested machine too


def configured(name: str, path: str = "") -> Subject:
    """The plugin `name` with its section of the file at `path`, "" for the shim's own. Raises ConfigError."""
    from devices.errors import ConfigError

    config = load_config(path or None)
    if config.hypervisor_name not in names_of(name):
        raise ConfigError(
            f"{config.path} configures {config.hypervisor_name}, not {name}",
            phase="config",
            hint=f'name a file whose [runtime] has hypervisor_name = "{name}"',
        )
    plugin = get_plugin(name)
    section = dataclasses.replace(config.hypervisor, **_SMALL)
    return Subject(
        plugin=plugin,
        section=lambda: section,
        vsock_daemon=getattr(section, "vsock_daemon", ""),
        tap_by_name=plugin.capabilities.tap_by_name,
        resumes_vsock=False,
        patience=_PATIENCE,
    )
