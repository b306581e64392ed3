"""Percentiles of measured values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

QUANTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated linearly between neighbours (Hyndman and Fan's
    type 7, as in numpy). Raises ValueError if there are no values or `percent` is outside [0, 100].
    """
    if not values:
        raise ValueError("a percentile of no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent}, outside [0, 100]")
    return _of_sorted(sorted(values), percent)


def named_percentiles(name: str, unit: str, values: Sequence[float]) -> Mapping[str, float]:
    """`{name}_p50_{unit}` and so on for 50, 90 and 99; empty if there are no values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {f"{name}_p{percent}_{unit}": _of_sorted(ordered, percent) for percent in QUANTILES}


def _of_sorted(ordered: Sequence[float], percent: float) -> float:
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
