"""The real Dragonball, where there is a process around it: KATA_DRAGONBALL names it, or it is on PATH."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from hypervisors.dragonball.config import DragonballConfig
from testing.guest import GUEST, guest_files
from tests.benchhost.conftest import KERNEL_PARAMS

__all__ = ["dragonball", "keys", "needs_dragonball", "section"]


def dragonball() -> str:
    """The path of the process; "" if there is none."""
    return os.environ.get("KATA_DRAGONBALL") or shutil.which("dragonball-process") or ""


needs_dragonball = pytest.mark.skipif(
    not dragonball(), reason="no dragonball-process: KATA_DRAGONBALL names none, and there is none on PATH"
)


def keys() -> dict[str, Any]:
    """[hypervisor.dragonball]. The kernel is the one that brings its own ACPI tables."""
    return {
        "path": dragonball(),
        **{key: str(file) for key, file in guest_files().items()},
        "kernel": str(GUEST / "vmlinux.acpi"),
        "default_vcpus": 1,
        "default_memory": 256,
        "kernel_params": KERNEL_PARAMS,
    }


def section(**more: Any) -> DragonballConfig:
    """The same as the plugin has it."""
    return DragonballConfig(**keys() | more)
