"""The table of what each VMM costs: medians, and ratios to the peer."""

from __future__ import annotations

from tests.bench.vmms import BEGIN, END, FIGURES, PAGE, PEER, table


def _same(value: float) -> dict[str, list[float]]:
    return {figure: [value] * 3 for figure in FIGURES}


def test_each_vmm_has_a_row_with_its_ratio_to_the_peer() -> None:
    lines = table({PEER: _same(200.0), "tiny": _same(50.0)}).splitlines()

    assert lines[2] == f"| {PEER} | 200 | 200 | 200 | 200 |"
    cell = "50: 0.25 (0.25-0.25)"
    assert lines[3] == f"| tiny | {cell} | {cell} | {cell} | {cell} |"


def test_where_there_is_nothing_there_is_no_ratio() -> None:
    """A VMM without daemons beside one that has some."""
    none = _same(50.0) | {"daemons": [0.0] * 3}
    rows = table({PEER: _same(200.0), "tiny": none}).splitlines()

    assert rows[3].endswith("| 0 |")


def test_the_page_has_a_place_for_it() -> None:
    head, begin, rest = PAGE.read_text().partition(BEGIN)

    assert head
    assert begin
    assert END in rest
