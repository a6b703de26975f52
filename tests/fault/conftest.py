"""Fixtures of the tests that break things: VMs without a containerd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.vms import Boot, booting


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    """Boots VMs under QEMU; keywords change the section of the configuration."""
    async with booting(tmp_path) as boots:
        yield boots
