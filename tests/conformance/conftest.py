"""All of them run a real VMM, and need root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """All of them run a real VMM."""
    if HERE in item.path.parents:
        item.add_marker(pytest.mark.e2e)
        if os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="network namespaces and virtiofsd need root"))
        lie = getattr(getattr(item, "cls", None), "lie", None)
        if lie is not None and item.name.partition("[")[0] == lie.test:
            item.add_marker(pytest.mark.xfail(strict=True, reason="the lie of this driver is found out"))
