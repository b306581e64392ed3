"""Costs of attention: measured on the machine at start, corrected while it runs.

Stands beside the planner, which asks what a segment and a merge cost before it chooses. A segment's time is taken as
a fixed part (starting it, folding its rows in) and, for every key, a rate that depends on the number of rows: with few
rows the keys' bytes set it, with many the arithmetic.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from workers.attention.planner import CostModel

CALIBRATION_ROWS: Final = (1, 4, 16, 64, 256)
CALIBRATION_KEYS: Final = (256, 2048)
MERGE_ROWS: Final = 64
REPEATS: Final = 5
BUDGET_S: Final = 0.3
LEAST_S: Final = 1e-9  # seconds: what a clock too coarse for a call is taken to have shown


@dataclass(frozen=True, slots=True)
class Sample:
    """What one segment took."""

    num_rows: int
    num_keys: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FittedCost:
    """segment(m, L) = fixed_s + L * per_key(m) and merge(n) = n * merge_row_s.

    per_key runs straight between the measured numbers of rows, on along the last line beyond the largest, and stays as
    it is below the smallest. It never falls as rows grow.
    """

    fixed_s: float
    rows: tuple[int, ...]  # ascending, at least one
    per_key_s: tuple[float, ...]  # seconds per key, for each of `rows`; never falling
    merge_row_s: float

    def __post_init__(self) -> None:
        assert self.rows
        assert len(self.rows) == len(self.per_key_s)
        assert list(self.rows) == sorted(set(self.rows))
        assert list(self.per_key_s) == sorted(self.per_key_s)

    @classmethod
    def fit(cls, samples: Sequence[Sample], *, merge_row_s: float) -> FittedCost:
        """The line through the samples with the least squared relative error.

        Rates that fall as rows grow are noise: they are averaged with their neighbours until none does. Each number
        of rows should come with two numbers of keys or more, or fixed_s cannot be told from the rates.
        """
        rows = tuple(sorted({sample.num_rows for sample in samples}))
        seconds = np.array([sample.seconds for sample in samples])
        keys = np.array([sample.num_keys for sample in samples])
        design = np.zeros((len(samples), 1 + len(rows)))
        design[:, 0] = 1.0
        design[np.arange(len(samples)), [1 + rows.index(sample.num_rows) for sample in samples]] = keys
        design /= seconds[:, None]
        fixed_s = float(np.linalg.lstsq(design, np.ones(len(samples)))[0][0])
        fixed_s = min(max(0.0, fixed_s), float(seconds.min()))
        rates = [_rate(fixed_s, [sample for sample in samples if sample.num_rows == count]) for count in rows]
        return cls(fixed_s, rows, tuple(_never_falling(rates)), merge_row_s)

    def segment(self, num_rows: int, num_keys: int) -> float:
        """Seconds of one layer for num_rows rows on num_keys keys that all of them see."""
        return self.fixed_s + num_keys * self._per_key(num_rows)

    def merge(self, num_rows: int) -> float:
        """Seconds of one layer for adding one more part to each of num_rows rows."""
        return num_rows * self.merge_row_s

    def _per_key(self, num_rows: int) -> float:
        rows, rates = self.rows, self.per_key_s
        if num_rows <= rows[0]:
            return rates[0]
        if len(rows) == 1:
            return rates[0] * num_rows / rows[0]
        right = min(bisect_left(rows, num_rows), len(rows) - 1)
        left = right - 1
        slope = (rates[right] - rates[left]) / (rows[right] - rows[left])
        return rates[left] + (num_rows - rows[left]) * slope


# Eight heads on four of keys and values, 64 wide, on two cores: until a machine has been measured.
DEFAULT_COST: Final = FittedCost(
    fixed_s=10e-6, rows=(1, 256), per_key_s=(95e-9, 1750e-9), merge_row_s=0.4e-6
)  # per key and head of keys 22 ns, and 0.81 ns more for every row and head that attends to it


def calibrate(
    measure: Callable[[int, int], float],
    measure_merge: Callable[[int], float],
    *,
    rows: Sequence[int] = CALIBRATION_ROWS,
    keys: Sequence[int] = CALIBRATION_KEYS,
    budget_s: float = BUDGET_S,
) -> FittedCost:
    """Fit this machine's costs.

    `measure(num_rows, num_keys)` runs one segment in one layer and `measure_merge(num_rows)` one merge; both return
    the seconds it took. Every point is measured at least once, then over again, until it has been REPEATS times or
    the seconds measured add up to `budget_s`; the least counts, as disturbances only ever add.
    """
    points = [(num_rows, num_keys) for num_rows in rows for num_keys in keys]
    least = dict.fromkeys(points, math.inf)
    merge_s, spent_s = math.inf, 0.0
    for _ in range(REPEATS):
        for num_rows, num_keys in points:
            seconds = measure(num_rows, num_keys)
            least[num_rows, num_keys] = min(least[num_rows, num_keys], seconds)
            spent_s += seconds
        seconds = measure_merge(MERGE_ROWS)
        merge_s = min(merge_s, seconds)
        spent_s += seconds
        if spent_s >= budget_s:
            break
    samples = [Sample(*point, max(LEAST_S, seconds)) for point, seconds in least.items()]
    return FittedCost.fit(samples, merge_row_s=max(0.0, merge_s) / MERGE_ROWS)


class Corrected:
    """A cost model times two factors that follow what steps really took. Mutated only by the runner that made it.

    The factors are exponential averages of measured by predicted seconds, taken of their logarithms so that twice and
    half weigh the same. A single measurement counts as at most `limit` times or one `limit`th of the prediction, hence
    so does any number of them.
    """

    def __init__(self, base: CostModel, *, weight: float = 0.05, limit: float = 4.0) -> None:
        assert 0 < weight <= 1
        assert limit >= 1
        self.base = base
        self._weight = weight
        self._limit = limit
        self._segment_factor = 1.0
        self._merge_factor = 1.0

    @property
    def segment_factor(self) -> float:
        return self._segment_factor

    @property
    def merge_factor(self) -> float:
        return self._merge_factor

    def segment(self, num_rows: int, num_keys: int) -> float:
        """Seconds of one layer for num_rows rows on num_keys keys that all of them see."""
        return self._segment_factor * self.base.segment(num_rows, num_keys)

    def merge(self, num_rows: int) -> float:
        """Seconds of one layer for adding one more part to each of num_rows rows."""
        return self._merge_factor * self.base.merge(num_rows)

    def observe(self, predicted_segment_s: float, segment_s: float, predicted_merge_s: float, merge_s: float) -> None:
        """Learn from a step: what `base` predicted and what was measured, in seconds.

        Predictions are those of `base`, not of this: they stay right however old the plan is. A pair in which either
        is not above zero says nothing (a step without shares merges nothing) and is left out.
        """
        self._segment_factor = self._moved(self._segment_factor, predicted_segment_s, segment_s)
        self._merge_factor = self._moved(self._merge_factor, predicted_merge_s, merge_s)

    def _moved(self, factor: float, predicted_s: float, measured_s: float) -> float:
        if not (predicted_s > 0 and measured_s > 0):
            return factor
        seen = min(self._limit, max(1 / self._limit, measured_s / predicted_s))
        return float(factor ** (1 - self._weight) * seen**self._weight)


def _rate(fixed_s: float, samples: Sequence[Sample]) -> float:
    """Seconds per key of samples with equally many rows, past the fixed part: least squared relative error."""
    scaled = [(sample.num_keys / sample.seconds, 1 - fixed_s / sample.seconds) for sample in samples]
    return sum(x * y for x, y in scaled) / sum(x * x for x, _ in scaled)


def _never_falling(values: Iterable[float]) -> list[float]:
    """The nearest values, by squares, that never fall: neighbours out of order are replaced by their mean."""
    pools: list[tuple[float, int]] = []  # mean, values
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
