"""The bench's results for people: a table for the terminal and one SVG plot.

Invariants: both show every row that was measured, with its target where it has one; the plot needs no
library and renders the same for the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.bench.figures import Row, interval

__all__ = ["svg", "table"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{'>=' if row.more_is_better else '<='} {row.target:g}x {'met' if row.met else 'MISSED'}"


def table(rows: Sequence[Row]) -> str:
    """One line a row: medians with their 10-90 % spread, the ratio with its 95 % interval, the target."""
    cells = [("row", "what", "ours", "peer", "ratio (95 %)", "target")]
    for row in rows:
        low, high = interval(row.ours.samples, row.peer.samples)
        sides = [
            f"{_number(side.median)} {row.unit} ({_number(side.spread[0])}-{_number(side.spread[1])})"
            f" {side.name}"
            for side in (row.ours, row.peer)
        ]
        ratio = f"{row.ratio:.2f}x ({low:.2f}-{high:.2f})"
        cells.append((row.key, row.title, sides[0], sides[1], ratio, _target(row)))
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


_WIDTH, _LEFT, _RIGHT, _STEP, _TOP = 900, 330, 150, 34, 60


def svg(rows: Sequence[Row], caption: str) -> str:
    """A bar a row: its ratio to the peer, with the interval as a whisker and the target as a red line."""
    limits = [interval(row.ours.samples, row.peer.samples) for row in rows]
    most = max([1.0, *(high for _, high in limits), *(row.target or 0 for row in rows)]) * 1.05
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    height = _TOP + _STEP * len(rows) + 30
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
            ' font-family="sans-serif" font-size="13">'
        ),
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        '<text x="16" y="24" font-size="16" font-weight="bold">kata-shim against its peers, as ratios</text>',
        f'<text x="16" y="44" fill="#555">{escape(caption)}</text>',
    ]
    one = _LEFT + scale
    bottom = height - 22
    out.append(f'<line x1="{one:.1f}" y1="{_TOP - 6}" x2="{one:.1f}" y2="{bottom}" stroke="#999"/>')
    out.append(f'<text x="{one:.1f}" y="{height - 6}" text-anchor="middle" fill="#555">1x: the peer</text>')
    for index, (row, (low, high)) in enumerate(zip(rows, limits, strict=True)):
        y = _TOP + index * _STEP
        middle = y + 11
        colour = "#b9503c" if row.met is False else "#3c78b9"
        title = escape(f"({row.key}) {row.title}")
        peer = escape(f"against {row.peer.name}")
        out += [
            f'<text x="{_LEFT - 8}" y="{y + 9}" text-anchor="end">{title}</text>',
            f'<text x="{_LEFT - 8}" y="{y + 22}" text-anchor="end" font-size="10" fill="#777">{peer}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{row.ratio * scale:.1f}" height="22" fill="{colour}"/>',
            (
                f'<line x1="{_LEFT + low * scale:.1f}" y1="{middle}"'
                f' x2="{_LEFT + high * scale:.1f}" y2="{middle}" stroke="black"/>'
            ),
            f'<text x="{_LEFT + max(row.ratio, high) * scale + 8:.1f}" y="{y + 16}">{row.ratio:.2f}x</text>',
        ]
        if row.target is not None:
            x = _LEFT + row.target * scale
            out.append(
                f'<line x1="{x:.1f}" y1="{y - 4}" x2="{x:.1f}" y2="{y + 26}" stroke="#d00" stroke-width="2"/>'
            )
    out.append(f'<text x="{_WIDTH - 16}" y="24" text-anchor="end" fill="#d00">| target</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"
