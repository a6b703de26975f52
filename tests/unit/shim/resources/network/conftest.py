"""A network namespace for each test, gone with it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.netlab import NetLab


@pytest.fixture
def lab() -> Iterator[NetLab]:
    """A pod's and a host's, and a veth pair between them."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with NetLab() as made:
        yield made
