"""Cloud Hypervisor keeps the contract in the bench host, with a shared directory and without.

It is in no package registry: KATA_CLH names a binary, or it is on PATH; else these are skipped.
"""

from __future__ import annotations

import pytest

from conformance.contract import HypervisorContract
from conformance.subject import Subject
from hypervisors.cloud_hypervisor.plugin import plugin
from tests.benchhost.clhs import needs_clh, section


@pytest.mark.benchhost
@needs_clh
class TestCloudHypervisor(HypervisorContract):
    """As it is configured by default: directories are shared, and a VM cannot be saved."""

    subject = Subject(plugin=plugin, section=lambda: section(shared_fs="virtio-fs"), patience=240.0)


@pytest.mark.benchhost
@needs_clh
class TestCloudHypervisorAlone(HypervisorContract):
    """Without one: a VM is saved; memory comes and goes by virtio-mem."""

    subject = Subject(
        plugin=plugin,
        section=lambda: section(shared_fs="none", enable_virtio_mem=True),
        patience=240.0,
    )
