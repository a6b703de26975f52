"""docs/limits.md says the numbers that the code has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

_PAGE = Path(__file__).parents[2] / "docs/limits.md"
_NUMBER = re.compile(r"`([a-z_.]+)\.([A-Z_]+)` = (\d+)( KiB| MiB)?")
_UNIT = {"": 1, " KiB": 1 << 10, " MiB": 1 << 20}
FOUND = _NUMBER.findall(_PAGE.read_text())


@pytest.mark.parametrize(("module", "name", "number", "unit"), FOUND, ids=[each[1] for each in FOUND])
def test_each_number(module: str, name: str, number: str, unit: str) -> None:
    assert getattr(importlib.import_module(module), name) == int(number) * _UNIT[unit]


def test_there_are_some() -> None:
    assert len(FOUND) > 15
    most = importlib.import_module("shim.resources.network.scan").MOST
    assert set(most.values()) == {1024}
