"""A histogram that the engine loop can afford to observe for every token: one bisection and one addition.

Exported exactly as prometheus_client's own, which takes a lock and several calls for each observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Histogram(Collector):
    """Counts of observed values by upper bound. Observed by one thread, collected by any."""

    def __init__(self, name: str, meaning: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        """`bounds` are the buckets' inclusive upper bounds, ascending, without infinity."""
        self._name, self._meaning, self._labels = name, meaning, dict(labels)
        self._bounds = [*map(float, bounds)]
        self._counts = [0] * (len(self._bounds) + 1)  # not cumulative; the last is above every bound
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """The same value, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def total(self) -> tuple[int, float]:
        """The number of values, and their sum."""
        return sum(self._counts), self._sum

    def collect(self) -> Iterator[Metric]:
        """The one metric, with what had been observed when a scrape asked."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(self._counts), strict=True)]
        family = HistogramMetricFamily(self._name, self._meaning, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family
