"""The bench's arithmetic is right, and its table and plot show every row and whether its target is met."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.bench.figures import Row, Series, interval, quantile
from tests.bench.report import svg, table


def row(ours: float, *, target: float | None = 2.0, more: bool = False) -> Row:
    return Row(
        key="x",
        title="a & b",
        unit="ms",
        ours=Series("ours", (ours, ours, ours)),
        peer=Series("peer", (10.0, 10.0, 10.0)),
        target=target,
        more_is_better=more,
    )


def test_quantiles_interpolate() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([7], 0.9) == 7


def test_an_interval_holds_the_ratio_and_is_the_same_each_time() -> None:
    ours, peer = [20.0, 22, 21, 25, 19], [10.0, 11, 9, 10, 12]
    low, high = interval(ours, peer)

    assert low <= 2.1 <= high
    assert (low, high) == interval(ours, peer)


@pytest.mark.parametrize(
    ("ours", "more", "met"),
    [(20.0, False, True), (21.0, False, False), (20.0, True, True), (9.0, True, False)],
)
def test_targets(ours: float, more: bool, met: bool) -> None:
    assert row(ours, more=more).met is met
    assert row(ours, target=None).met is None


def test_table_and_plot_show_the_rows() -> None:
    text = table([row(20.0), row(30.0)])
    picture = svg([row(20.0), row(30.0)], "caption <1>")

    assert "2.00x (2.00-2.00)" in text
    assert "<= 2x MISSED" in text
    assert len(ElementTree.fromstring(picture).findall("{*}rect")) == 3, "the background and a bar a row"
