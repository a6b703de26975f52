"""Draws phases as bars on a common time axis: as text for a terminal, as SVG for a document.

Invariants: text lines fit the terminal (80 columns where there is none); every phase has a visible bar,
however short; what comes from a file is escaped in SVG and free of control characters in text.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Protocol
from xml.sax.saxutils import escape

from devices.plain import plain

__all__ = ["Bar", "draw_svg", "draw_text"]


class Bar(Protocol):
    """What is drawn; times in seconds from anywhere."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def name(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def error(self) -> str: ...


def _clean(text: str, limit: int) -> str:
    shown = plain(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "~"


def _labels(bars: Sequence[Bar]) -> list[str]:
    """Phase names; with the id where several containers took part."""
    several = len({bar.id for bar in bars}) > 1
    return [_clean(f"{bar.name} {_clean(bar.id, 12)}" if several else bar.name, 34) for bar in bars]


def _blocks() -> tuple[str, str]:
    """(full, less than one cell) in what stdout can show."""
    try:
        "█▏".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#", "|"
    return "█", "▏"


def draw_text(title: str, bars: Sequence[Bar], width: int = 0) -> list[str]:
    """Lines: the title, a head, and for each phase its start, its milliseconds and its bar.

    `bars` in the order in which they are to be shown, at least one; `width` in columns, 0: the terminal's.
    """
    width = width or shutil.get_terminal_size((80, 24)).columns
    labels = _labels(bars)
    first = min(bar.start for bar in bars)
    total = max(bar.end for bar in bars) - first
    name_width = max(len("phase"), *(len(label) for label in labels))
    room = max(10, width - name_width - len("  9999999.9  9999999.9  "))
    full, sliver = _blocks()
    lines = [_clean(title, width), f"{'phase':<{name_width}}  {'at ms':>9}  {'ms':>9}"]
    for bar, label in zip(bars, labels, strict=True):
        at, took = bar.start - first, max(0.0, bar.end - bar.start)
        begin = min(room - 1, int(room * at / total)) if total > 0 else 0
        cells = round(room * took / total) if total > 0 else 0
        drawn = " " * begin + (full * min(cells, room - begin) or sliver)
        failed = f" {_clean(bar.error, 40)}" if bar.error else ""
        lines.append(f"{label:<{name_width}}  {at * 1000:9.1f}  {took * 1000:9.1f}  {drawn}{failed}".rstrip())
    return lines


# Dark on a white card, readable on any page; a failed phase is red.
_ROW, _LEFT, _RIGHT, _WIDTH, _TOP = 22, 230, 180, 940, 46
_COLOURS = ("#3366aa", "#bb3333")


def draw_svg(title: str, bars: Sequence[Bar]) -> str:
    """One SVG document with the bars below each other and a millisecond axis."""
    labels = _labels(bars)
    first = min(bar.start for bar in bars)
    total = max(max(bar.end for bar in bars) - first, 1e-6)
    height = _TOP + _ROW * len(bars) + 34
    plot = _WIDTH - _LEFT - _RIGHT
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
            f'height="{height}" font-family="sans-serif" font-size="12" role="img">'
        ),
        f"<title>{escape(plain(title))}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold" fill="#222222">{escape(plain(title))}</text>',
    ]
    bottom = _TOP + _ROW * len(bars)
    step = _tick(total * 1000)
    tick = 0.0
    while tick <= total * 1000 + 1e-9:
        x = _LEFT + plot * tick / (total * 1000)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555555">{tick:g}</text>'
        )
        tick += step
    parts.append(f'<text x="{_WIDTH - _RIGHT + 40}" y="{bottom + 16}" fill="#555555">ms</text>')
    for row, (bar, label) in enumerate(zip(bars, labels, strict=True)):
        y = _TOP + _ROW * row
        took = max(0.0, bar.end - bar.start)
        x = _LEFT + plot * (bar.start - first) / total
        wide = max(1.5, plot * took / total)
        after = f"{took * 1000:.1f}" + (f" {escape(_clean(bar.error, 24))}" if bar.error else "")
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end" fill="#222222">{escape(label)}</text>',
            (
                f'<rect x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="{_ROW - 7}" rx="2" '
                f'fill="{_COLOURS[bool(bar.error)]}"/>'
            ),
            f'<text x="{x + wide + 5:.1f}" y="{y + 14}" fill="#555555">{after}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _tick(span: float) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that gives 4 to 10 ticks on `span`."""
    size = 1e-3
    while True:
        for factor in (1, 2, 5):
            if span / (size * factor) <= 10:
                return size * factor
        size *= 10
