"""Histograms that the consumers of a group add up in MongoDB, so that whoever asks sees all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MESSAGES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6)
BOUNDS = {'function': SECONDS, 'latency': SECONDS, 'sizes': MESSAGES}


@dataclass(frozen=True)
class Histogram:
    """How often something was how large: ``counts[i]`` values are at most ``bounds[i]`` and more than the bound before;
    the last count is of those above all bounds. `sum` is the sum of all values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """The mean value, 0.0 of none."""
        return self.sum / self.count if self.count else 0.0


def observed(**values: float) -> dict[str, float]:
    """What to add to the counters of a group for one value of each histogram."""
    counts: dict[str, float] = {}
    for name, value in values.items():
        counts[f'{name}.sum'] = value
        counts[f'{name}.b{bisect_left(BOUNDS[name], value)}'] = 1
    return counts


def histogram(doc: Mapping[str, Any], name: str) -> Histogram:
    """A histogram as the document of a group has it."""
    stored, bounds = doc.get(name) or {}, BOUNDS[name]
    counts = tuple(int(stored.get(f'b{i}', 0)) for i in range(len(bounds) + 1))
    return Histogram(bounds, counts, float(stored.get('sum', 0.0)))
