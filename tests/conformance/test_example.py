"""Somebody else's VMM keeps the contract too: docs/example-plugin, save for what its capabilities exclude."""

from __future__ import annotations

import sys

from conformance.contract import HypervisorContract
from conformance.subject import Subject
from testing.guest import PROJECT, guest_files

sys.path.append(str(PROJECT / "docs" / "example-plugin"))  # tests/e2e/test_plugin.py installs it properly

from kata_tinyvmm.plugin import TinyConfig, plugin


def _vsock_daemon() -> str:
    local = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
    return str(local) if local.exists() else ""


def _section() -> TinyConfig:
    guest = {key: str(path) for key, path in guest_files().items()}
    return TinyConfig(
        default_memory=256,
        vsock_daemon=_vsock_daemon(),
        kernel=guest["kernel"],
        initrd=guest["initrd"],
        image=guest["image"],
    )


class TestTiny(HypervisorContract):
    """QEMU by its arguments alone."""

    subject = Subject(plugin=plugin, section=_section, vsock_daemon=_vsock_daemon())
