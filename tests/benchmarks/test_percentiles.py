"""Percentiles: against numpy, at the edges, and named."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.percentiles import named_percentiles, percentile


@pytest.mark.parametrize("num", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 99.9, 100])
def test_agrees_with_numpy(num: int, percent: float) -> None:
    values = [random.Random(num).gauss(0, 1) for _ in range(num)]
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@pytest.mark.parametrize("percent", [-1, 100.5])
def test_percent_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        percentile([1.0], percent)


def test_names_carry_the_percentile_and_the_unit() -> None:
    assert named_percentiles("ttft", "ms", [3.0, 1.0, 2.0]) == {
        "ttft_p50_ms": 2.0,
        "ttft_p90_ms": pytest.approx(2.8),
        "ttft_p99_ms": pytest.approx(2.98),
    }


def test_what_was_not_measured_has_no_percentiles() -> None:
    assert named_percentiles("itl", "ms", []) == {}
