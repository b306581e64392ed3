"""Medians, and ratios that are taken pair by pair."""

from __future__ import annotations

from benchmarks.benchmark import Measured
from benchmarks.results import cells, counts, failures, paired_ratio
from benchmarks.trial import Trial


def trial(arm: str, round_index: int, value: float) -> Trial:
    return Trial("w", arm, round_index, Measured({"x_ms": value}))


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    trials = [trial("a", index, value) for index, value in enumerate([1.0, 10.0, 100.0])]
    trials += [trial("b", index, value) for index, value in enumerate([2.0, 10.0, 300.0])]
    a, b = cells(trials, "a")
    assert (a.median, a.ratio) == (10.0, 1.0)
    assert (b.median, b.ratio) == (10.0, 2.0)


def test_warm_up_rounds_are_not_counted() -> None:
    (cell,) = cells([trial("a", -1, 1000.0), trial("a", 0, 1.0), trial("a", 1, 3.0)], "a")
    assert cell.values == (1.0, 3.0)


def test_rounds_without_a_partner_are_left_out_of_the_ratio() -> None:
    assert paired_ratio({0: 4.0, 1: 6.0, 2: 9.0}, {0: 2.0, 2: 0.0}) == 2.0
    assert paired_ratio({0: 4.0}, {}) is None


def test_counts_sum_over_all_rounds_with_the_warm_up() -> None:
    trials = [Trial("w", "a", index, Measured({}, errors={"WorkerLost": 1})) for index in (-1, 0, 1)]
    assert [(count.kind, count.number) for count in counts(trials)] == [("WorkerLost", 3)]


def test_failures_are_those_that_raised() -> None:
    failed = Trial("w", "a", 0, error="OSError: gone")
    assert failures([trial("a", 0, 1.0), failed]) == [failed]
