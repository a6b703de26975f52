"""Samples, medians and ratios: the arithmetic of the bench, without I/O.

Why ratios: absolute times of this machine say little about another one; two things measured
alternately in one run share its noise (facts/performance.md A.6).
Invariants: a ratio's interval is a bootstrap over both samples with a fixed seed, so the same
samples give the same figures.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Row", "Series", "interval", "quantile"]

_RESAMPLES = 1000


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the samples lie, interpolated."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interval(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(ours) / median(peer)."""
    chance = random.Random(20_261_123)
    ratios = sorted(
        statistics.median(chance.choices(ours, k=len(ours)))
        / statistics.median(chance.choices(peer, k=len(peer)))
        for _ in range(_RESAMPLES)
    )
    return ratios[int(_RESAMPLES * 0.025)], ratios[int(_RESAMPLES * 0.975)]


@dataclass(frozen=True, slots=True)
class Series:
    """What one contender did: its name and its samples, all in the row's unit."""

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile."""
        return quantile(self.samples, 0.1), quantile(self.samples, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: ours against a peer. `target` is the largest ratio that we promise.

    Where more is better (MB/s) the ratio is still ours / peer, and `target` a least one.
    """

    key: str
    title: str
    unit: str
    ours: Series
    peer: Series
    target: float | None = None
    more_is_better: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.ours.median / self.peer.median

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.more_is_better else self.ratio <= self.target

    def as_json(self) -> dict[str, Any]:
        """Everything, raw samples included."""
        low, high = interval(self.ours.samples, self.peer.samples)
        return {
            "key": self.key,
            "title": self.title,
            "unit": self.unit,
            "ratio": round(self.ratio, 4),
            "ratio_95": [round(low, 4), round(high, 4)],
            "target": self.target,
            "met": self.met,
            "more_is_better": self.more_is_better,
            "series": {
                each.name: {
                    "median": round(each.median, 4),
                    "p10": round(each.spread[0], 4),
                    "p90": round(each.spread[1], 4),
                    "samples": [round(sample, 4) for sample in each.samples],
                }
                for each in (self.ours, self.peer)
            },
            "notes": self.notes,
        }
