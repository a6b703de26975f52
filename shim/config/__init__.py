"""Kata's configuration, read strictly: configuration.toml, drop-ins and annotations.

Enters: Kata's files and a pod's annotations; the runtime options of a request.
Leaves: a `Config` in which every value is checked, or a ConfigError with file, line and key.
May import: none of its siblings.
"""

from __future__ import annotations

from shim.config.load import Config, ConfigFileError, load_config
from shim.config.schema import AgentConfig, Inactive, RuntimeConfig

__all__ = ["AgentConfig", "Config", "ConfigFileError", "Inactive", "RuntimeConfig", "load_config"]
