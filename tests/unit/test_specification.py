"""Every promise of SPECIFICATION.md names a test, and each test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SPECIFICATION.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT)


def test_each_test_that_is_named_exists() -> None:
    missing = []
    for file, name in NAMED:
        path = ROOT / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text()):
            missing.append(f"{file}::{name}")

    assert missing == []
    assert len(NAMED) > 30, "the pattern above still finds the names"


def test_each_promise_names_a_test_or_a_row_of_the_bench() -> None:
    promises = [line for line in TEXT.splitlines() if re.match(r"\d+\. ", line)]

    assert [line for line in promises if "`tests/" not in line and " Row " not in line] == []
