"""The real Cloud Hypervisor, where there is one: KATA_CLH names it, or it is on PATH."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from hypervisors.cloud_hypervisor.config import ClhConfig
from testing.guest import guest_files
from tests.benchhost.conftest import KERNEL_PARAMS

__all__ = ["clh", "keys", "needs_clh", "section"]


def clh() -> str:
    """Its path; "" if there is none."""
    return os.environ.get("KATA_CLH") or shutil.which("cloud-hypervisor") or ""


needs_clh = pytest.mark.skipif(
    not clh(), reason="no cloud-hypervisor: KATA_CLH names none, and there is none on PATH"
)


def keys() -> dict[str, Any]:
    """[hypervisor.clh]."""
    return {
        "path": clh(),
        **{key: str(file) for key, file in guest_files().items()},
        "default_vcpus": 1,
        "default_memory": 256,
        "kernel_params": KERNEL_PARAMS,
    }


def section(**more: Any) -> ClhConfig:
    """The same as the plugin has it."""
    return ClhConfig(**keys() | more)
