"""Costs of attention: the fit, the calibration and the correction."""

from __future__ import annotations

import random
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.cost import (
    BUDGET_S,
    CALIBRATION_KEYS,
    CALIBRATION_ROWS,
    DEFAULT_COST,
    REPEATS,
    Corrected,
    FittedCost,
    Sample,
    calibrate,
)

TRUTH = FittedCost(fixed_s=12e-6, rows=(1, 8, 64), per_key_s=(90e-9, 120e-9, 700e-9), merge_row_s=0.3e-6)
KEYS = (64, 512, 4096)


def sampled(cost: FittedCost, *, noise: float = 0.0) -> list[Sample]:
    generator = random.Random(5)
    return [
        Sample(rows, keys, cost.segment(rows, keys) * (1 + generator.uniform(-noise, noise)))
        for rows in cost.rows
        for keys in KEYS
    ]


def test_a_fit_recovers_the_model_that_made_the_samples() -> None:
    fitted = FittedCost.fit(sampled(TRUTH), merge_row_s=TRUTH.merge_row_s)
    assert fitted.fixed_s == pytest.approx(TRUTH.fixed_s, rel=1e-6)
    assert fitted.per_key_s == pytest.approx(TRUTH.per_key_s, rel=1e-6)
    assert (fitted.rows, fitted.merge_row_s) == (TRUTH.rows, TRUTH.merge_row_s)


def test_a_fit_of_noisy_samples_predicts_within_the_noise() -> None:
    fitted = FittedCost.fit(sampled(TRUTH, noise=0.1), merge_row_s=0.0)
    for sample in sampled(TRUTH):
        assert fitted.segment(sample.num_rows, sample.num_keys) == pytest.approx(sample.seconds, rel=0.15)


def test_rates_lie_on_lines_between_and_beyond_the_rows_that_were_measured() -> None:
    def rate(num_rows: int) -> float:
        return TRUTH.segment(num_rows, 1) - TRUTH.segment(num_rows, 0)

    assert rate(8) == pytest.approx(120e-9)
    assert rate(36) == pytest.approx(410e-9)  # half-way from 8 to 64
    assert rate(120) == pytest.approx(1280e-9)  # as far beyond 64 as 8 lies before it
    few = FittedCost(0.0, (4, 8), (10.0, 12.0), 0.0)
    assert few.segment(1, 1) == 10.0
    one = FittedCost(0.0, (4,), (10.0,), 0.0)
    assert [one.segment(num_rows, 1) for num_rows in (1, 4, 8)] == [10.0, 10.0, 20.0]


@given(
    st.lists(
        st.builds(Sample, st.integers(1, 300), st.integers(1, 10_000), st.floats(1e-7, 1.0)), min_size=1, max_size=20
    )
)
def test_whatever_was_measured_costs_never_fall(samples: list[Sample]) -> None:
    fitted = FittedCost.fit(samples, merge_row_s=1e-7)
    assert fitted.fixed_s >= 0
    for keys in (1, 1000):
        by_rows = [fitted.segment(rows, keys) for rows in range(1, 400, 7)]
        assert by_rows[0] >= 0
        assert all(less <= more * (1 + 1e-9) for less, more in pairwise(by_rows))
    by_keys = [fitted.segment(17, keys) for keys in range(0, 4000, 100)]
    assert all(less <= more for less, more in pairwise(by_keys))
    assert fitted.merge(0) == 0 < fitted.merge(1) < fitted.merge(2)


def test_rates_out_of_order_are_averaged() -> None:
    crooked = [Sample(rows, keys, keys * rate) for rows, rate in ((1, 3.0), (2, 1.0), (4, 5.0)) for keys in KEYS]
    fitted = FittedCost.fit(crooked, merge_row_s=0.0)
    assert fitted.per_key_s == pytest.approx((2.0, 2.0, 5.0))


def test_calibration_takes_the_least_of_its_measurements() -> None:
    calls = count()

    def disturbed() -> float:
        """How much longer it took: two measurements of three are disturbed."""
        return (1.0, 2.5, 3.5)[next(calls) % 3]

    fitted = calibrate(lambda m, keys: TRUTH.segment(m, keys) * disturbed(), lambda m: TRUTH.merge(m) * disturbed())
    for rows in TRUTH.rows:
        for keys in CALIBRATION_KEYS:
            if rows in CALIBRATION_ROWS:
                assert fitted.segment(rows, keys) == pytest.approx(TRUTH.segment(rows, keys), rel=1e-6)
    assert fitted.merge(100) == pytest.approx(TRUTH.merge(100))


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-6, REPEATS), (BUDGET_S, 1)])
def test_calibration_repeats_within_its_budget(seconds: float, rounds: int) -> None:
    measured: list[tuple[int, int]] = []

    def measure(num_rows: int, num_keys: int) -> float:
        measured.append((num_rows, num_keys))
        return seconds

    calibrate(measure, lambda num_rows: seconds)
    assert sorted(measured) == sorted(rounds * [(m, keys) for m in CALIBRATION_ROWS for keys in CALIBRATION_KEYS])


def test_a_clock_that_saw_nothing_still_gives_costs() -> None:
    fitted = calibrate(lambda num_rows, num_keys: 0.0, lambda num_rows: 0.0)
    assert 0 <= fitted.segment(256, 2048) < 1e-8
    assert fitted.merge(100) == 0


def test_the_default_breaks_even_after_fewer_keys_the_more_share_them() -> None:
    def break_even(num_branches: int) -> float:
        alone = num_branches * (DEFAULT_COST.segment(1, 1) - DEFAULT_COST.segment(1, 0))
        together = DEFAULT_COST.segment(num_branches, 1) - DEFAULT_COST.segment(num_branches, 0)
        return (DEFAULT_COST.segment(num_branches, 0) + DEFAULT_COST.merge(num_branches)) / (alone - together)

    assert 5 < break_even(32) < break_even(8) < 30
    assert 100 < break_even(2) < 200


def test_corrections_converge_on_what_steps_take() -> None:
    corrected = Corrected(TRUTH)
    predicted, merges = TRUTH.segment(8, 1000), TRUTH.merge(8)
    for _ in range(200):
        corrected.observe(predicted, 1.7 * predicted, merges, 0.4 * merges)
    assert corrected.segment(8, 1000) == pytest.approx(1.7 * predicted, rel=1e-3)
    assert corrected.merge(8) == pytest.approx(0.4 * merges, rel=1e-3)


def test_one_bad_step_moves_little_and_many_are_clipped() -> None:
    corrected = Corrected(TRUTH, weight=0.1, limit=4.0)
    corrected.observe(1.0, 1e9, 1.0, 1e-9)
    assert corrected.segment_factor == pytest.approx(4**0.1)
    assert corrected.merge_factor == pytest.approx(0.25**0.1)
    for _ in range(500):
        corrected.observe(1.0, 1e9, 1.0, 1e-9)
    assert corrected.segment_factor == pytest.approx(4.0)
    assert corrected.merge_factor == pytest.approx(0.25)


def test_a_step_that_says_nothing_corrects_nothing() -> None:
    corrected = Corrected(TRUTH)
    corrected.observe(1.0, 2.0, 0.0, 0.0)
    assert corrected.segment_factor > 1
    assert corrected.merge_factor == 1
    before = corrected.segment_factor
    corrected.observe(0.0, 1.0, 1.0, 0.0)
    assert (corrected.segment_factor, corrected.merge_factor) == (before, 1)
