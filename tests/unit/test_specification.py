"""Every promise of SPECIFICATION.md names a test; that it exists, test_docs.py checks for each page."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "SPECIFICATION.md").read_text()


def test_each_promise_names_a_test_or_a_row_of_the_bench() -> None:
    promises = [line for line in TEXT.splitlines() if re.match(r"\d+\. ", line)]

    assert [line for line in promises if "`tests/" not in line and " Row " not in line] == []
    assert len(promises) > 30, "the pattern above still finds them"
