"""Forecasts from histories that are made up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.forecast import HALF_LIFE_S, MAX_AGE_S, MIN_OBSERVATIONS, OPTIMISM, Forecast

tokens = st.integers(0, 100_000)


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def seen(clock: Clock, *, drain: float = 1000.0, prefill: float = 2000.0, decode: float = 50.0) -> Forecast:
    """A fleet with these rates, in tokens per second, and prompts of 1000 tokens."""
    forecast = Forecast(clock)
    for _ in range(MIN_OBSERVATIONS):
        clock.now += 0.1
        forecast.observe_drain(0.1 * drain, 0.1)
        forecast.observe_first_token(1000, 1000 / prefill)
        forecast.observe_decode(20, 20 / decode)
    return forecast


def test_nothing_is_known_at_first() -> None:
    forecast = Forecast(Clock())
    assert forecast.drain_s(1) is None
    assert forecast.first_token_s(0, 1) is None
    assert forecast.first_token_s(1, 0) is None
    assert forecast.end_s(0, 0, 1) is None


def test_no_work_takes_no_time_known_or_not() -> None:
    forecast = Forecast(Clock())
    assert forecast.drain_s(0) == 0
    assert forecast.end_s(0, 0, 0) == 0


def test_each_kind_must_be_seen_often_enough() -> None:
    forecast = Forecast(Clock())
    for _ in range(MIN_OBSERVATIONS - 1):
        forecast.observe_decode(10, 1)
    assert forecast.end_s(0, 0, 10) is None
    forecast.observe_decode(10, 1)
    assert forecast.end_s(0, 0, 10) == pytest.approx(1 / OPTIMISM)
    assert forecast.end_s(0, 5, 10) is None
    assert forecast.end_s(5, 0, 10) is None


def test_a_steady_fleet_is_forecast_as_it_was_but_hopefully() -> None:
    forecast = seen(Clock())
    assert forecast.drain_s(3000) == pytest.approx(3.0)
    assert forecast.first_token_s(3000, 1000) == pytest.approx((3.0 + 0.5) / OPTIMISM)
    assert forecast.end_s(3000, 1000, 100) == pytest.approx((3.0 + 0.5 + 2.0) / OPTIMISM)


def test_a_smaller_prompt_takes_its_share_and_a_larger_one_no_less() -> None:
    forecast = seen(Clock())
    assert forecast.prefill_s(100) == pytest.approx(0.05)
    assert forecast.prefill_s(10_000) == pytest.approx(0.5)


def test_prompts_that_take_as_long_whatever_their_size_refuse_no_large_one() -> None:
    """Ten tokens in 20 ms are not 500 tokens a second."""
    forecast = Forecast(Clock())
    for _ in range(MIN_OBSERVATIONS):
        forecast.observe_first_token(10, 0.02)
    assert forecast.prefill_s(5000) == pytest.approx(0.02)


def test_large_prompts_are_known_beside_many_small_ones() -> None:
    forecast = Forecast(Clock())
    for _ in range(MIN_OBSERVATIONS):
        forecast.observe_first_token(8000, 4.0)
        for _ in range(100):
            forecast.observe_first_token(10, 0.02)
    assert forecast.prefill_s(8000) == pytest.approx(4.0)
    assert forecast.prefill_s(4000) == pytest.approx(2.0)
    assert forecast.prefill_s(10) == pytest.approx(0.02)


def test_a_change_counts_by_half_after_a_half_life() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    for _ in range(MIN_OBSERVATIONS):
        forecast.observe_drain(100, 1.0)
    clock.now += HALF_LIFE_S
    for _ in range(MIN_OBSERVATIONS // 2):
        forecast.observe_drain(300, 1.0)
    assert forecast.drain_s(200) == pytest.approx(1.0)


def test_what_was_long_ago_is_not_believed_and_does_not_come_back() -> None:
    clock = Clock()
    forecast = seen(clock)
    clock.now += MAX_AGE_S
    assert forecast.drain_s(10) is not None
    clock.now += 0.001
    assert forecast.drain_s(10) is None
    assert forecast.first_token_s(0, 10) is None
    assert forecast.end_s(0, 0, 10) is None
    for _ in range(MIN_OBSERVATIONS):
        assert forecast.drain_s(10) is None
        forecast.observe_drain(50, 1.0)
    assert forecast.drain_s(50) == pytest.approx(1.0)


def test_a_burst_in_one_moment_counts_with_the_time_around_it() -> None:
    forecast = Forecast(Clock())
    for _ in range(MIN_OBSERVATIONS):
        forecast.observe_drain(10, 0.0)
        forecast.observe_drain(10, 1.0)
    assert forecast.drain_s(20) == pytest.approx(1.0)


@given(st.tuples(tokens, tokens, tokens), st.tuples(tokens, tokens, tokens))
def test_more_work_never_takes_less(some: tuple[int, int, int], more: tuple[int, int, int]) -> None:
    forecast = seen(Clock())
    less, least = forecast.end_s(*map(max, some, more)), forecast.end_s(*some)
    assert less is not None
    assert least is not None
    assert less >= least >= 0


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 10**6), st.floats(1e-6, 100)), min_size=1, max_size=60))
def test_forecasts_lie_between_the_best_and_the_worst_that_was_seen(history: list[tuple[float, int, float]]) -> None:
    clock = Clock()
    forecast = Forecast(clock)
    for pause, num_tokens, seconds in history:
        clock.now += pause
        forecast.observe_decode(num_tokens, seconds)
    end_s = forecast.end_s(0, 0, 1000)
    if end_s is not None:
        paces = [seconds / num_tokens for _, num_tokens, seconds in history]
        assert min(paces) * (1 - 1e-9) <= end_s * OPTIMISM / 1000 <= max(paces) * (1 + 1e-9)
