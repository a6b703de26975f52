"""Firecracker keeps the contract in the bench host, jailed and not."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from conformance.contract import HypervisorContract
from conformance.subject import Subject
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.plugin import plugin
from tests.benchhost.firecrackers import section


@functools.cache
def _section(jailed: bool) -> FirecrackerConfig:
    """Made once, in there: the programs are copied."""
    keys = section(Path(tempfile.mkdtemp(prefix="firecracker-")), jailed=jailed)
    return FirecrackerConfig(**keys)  # type: ignore[arg-type]


def _subject(*, jailed: bool) -> Subject:
    return Subject(
        plugin=plugin,
        section=functools.partial(_section, jailed),
        patience=240.0,
        tap_by_name=True,
        powers_off=False,  # it knows no other end than a reset
    )


@pytest.mark.benchhost
class TestFirecracker(HypervisorContract):
    """A plain process."""

    subject = _subject(jailed=False)


@pytest.mark.benchhost
class TestJailedFirecracker(HypervisorContract):
    """As user 1234, in a chroot and a cgroup."""

    subject = _subject(jailed=True)
