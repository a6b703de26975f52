"""Asserts of the shared contract are explained like those of a test module."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.conformance.contract")

HERE = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """All of them run a real VMM."""
    if HERE in item.path.parents:
        item.add_marker(pytest.mark.e2e)
        if os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="network namespaces and virtiofsd need root"))
