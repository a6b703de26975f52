"""Fixtures of the tests inside the bench host: a private containerd whose VMs boot fast there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testing.containerd import Containerd
from testing.guest import Value
from testing.images import busybox_image

BUSYBOX = "local/busybox:1"
# Emulated SVM makes each exit from the guest dear: no work-arounds of CPU bugs, no timer calibration.
KERNEL_PARAMS = "mitigations=off no_timer_check tsc=reliable noreplace-smp random.trust_cpu=on"
PATIENCE = 240.0  # seconds for a call that boots a VM: 8 s on a quiet machine


@pytest.fixture(scope="module")
def overrides() -> dict[str, dict[str, Value | None]]:
    """{section: {key: value}} beyond what all VMs here have; a module may have its own."""
    return {}


@pytest.fixture(scope="module")
def containerd(
    tmp_path_factory: pytest.TempPathFactory, overrides: dict[str, dict[str, Value | None]]
) -> Iterator[Containerd]:
    """A containerd with the busybox image."""
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    merged = {name: dict(values) for name, values in overrides.items()}
    merged.setdefault("hypervisor.qemu", {}).setdefault("kernel_params", KERNEL_PARAMS)
    merged.setdefault("agent.kata", {}).setdefault("reconnect_timeout_ms", int(PATIENCE * 1000))
    with Containerd(debug=True, overrides=merged) as daemon:
        daemon.ctr("image", "import", str(archive), timeout=PATIENCE)
        yield daemon
