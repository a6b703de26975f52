"""Dragonball keeps the contract in the bench host, with a shared directory and without.

It is a library: KATA_DRAGONBALL names a process around it (docs/dragonball.md), or one is on PATH; else these
are skipped.
"""

from __future__ import annotations

import pytest

from conformance.contract import HypervisorContract
from conformance.subject import Subject
from hypervisors.dragonball.plugin import plugin
from tests.benchhost.dragonballs import needs_dragonball, section


@pytest.mark.benchhost
@needs_dragonball
class TestDragonball(HypervisorContract):
    """As it is configured by default: it serves the directory itself."""

    subject = Subject(plugin=plugin, section=section, patience=240.0, tap_by_name=True, powers_off=False)


@pytest.mark.benchhost
@needs_dragonball
class TestDragonballAlone(HypervisorContract):
    """Without one: a VM is saved, and another begins with it."""

    subject = Subject(
        plugin=plugin,
        section=lambda: section(shared_fs="none", disable_vhost_net=True, default_vcpus=2),
        patience=240.0,
        tap_by_name=True,
        powers_off=False,
    )
