"""Kata's configuration file, read strictly: see `shim.config.load` and `shim.config.schema`."""

from __future__ import annotations

from shim.config.load import Config, ConfigFileError, load_config
from shim.config.schema import AgentConfig, Inactive, RuntimeConfig

__all__ = ["AgentConfig", "Config", "ConfigFileError", "Inactive", "RuntimeConfig", "load_config"]
