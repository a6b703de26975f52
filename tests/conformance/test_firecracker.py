"""Firecracker keeps the contract in the bench host, jailed and not."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.plugin import plugin
from tests.benchhost.firecrackers import section

from .contract import HypervisorContract
from .subject import Subject


@functools.cache
def _section(jailed: bool) -> FirecrackerConfig:
    """Made once, in there: the programs are copied."""
    keys = section(Path(tempfile.mkdtemp(prefix="firecracker-")), jailed=jailed)
    return FirecrackerConfig(**keys)  # type: ignore[arg-type]


@pytest.mark.benchhost
class TestFirecracker(HypervisorContract):
    """A plain process."""

    subject = Subject(plugin=plugin, section=lambda: _section(False), patience=240.0, tap_by_name=True)


@pytest.mark.benchhost
class TestJailedFirecracker(HypervisorContract):
    """As user 1234, in a chroot and a cgroup."""

    subject = Subject(plugin=plugin, section=lambda: _section(True), patience=240.0, tap_by_name=True)
