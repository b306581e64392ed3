"""From trials to results: medians, ranges, and ratios against the baseline arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from benchmarks.benchmark import Measured
from benchmarks.trial import Trial

Mishap = Literal["errors", "refusals"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one arm on one workload, over the counted rounds."""

    workload: str
    arm: str
    metric: str
    values: tuple[float, ...]
    ratio: float | None  # median over rounds of value / the baseline's value; None if no round has both

    @property
    def median(self) -> float:
        return median(self.values)


@dataclass(frozen=True, slots=True)
class Count:
    """How often one kind of error or refusal came, over all rounds, warm-up ones included."""

    workload: str
    arm: str
    mishap: Mishap
    kind: str
    number: int


def cells(trials: Sequence[Trial], baseline: str) -> list[Cell]:
    """Every metric of every arm, in the order first seen."""
    by_round: dict[tuple[str, str, str], dict[int, float]] = {}
    for trial in trials:
        if trial.measured is None or trial.round_index is None or trial.round_index < 0:
            continue
        for metric, value in trial.measured.values.items():
            by_round.setdefault((trial.workload, trial.arm, metric), {})[trial.round_index] = value
    return [
        Cell(workload, arm, metric, tuple(values.values()), paired_ratio(values, base))
        for (workload, arm, metric), values in by_round.items()
        for base in [by_round.get((workload, baseline, metric), {})]
    ]


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """The median of the ratios taken round by round; rounds without a partner, or with a zero one, are left out.

    Pairs stand minutes closer together than medians do, so drift of the machine cancels.
    """
    ratios = [value / baseline[index] for index, value in values.items() if baseline.get(index)]
    return median(ratios) if ratios else None


def counts(trials: Sequence[Trial]) -> list[Count]:
    """Errors and refusals by kind, summed: a median would hide the round in which they came."""
    totals: Counter[tuple[str, str, Mishap, str]] = Counter()
    for trial in trials:
        if trial.measured is None:
            continue
        for mishap, numbers in mishaps(trial.measured).items():
            for kind, number in numbers.items():
                totals[trial.workload, trial.arm, mishap, kind] += number
    return [Count(*key, number) for key, number in totals.items()]


def mishaps(measured: Measured) -> Mapping[Mishap, Mapping[str, int]]:
    """Both kinds of count of one measurement."""
    return {"errors": measured.errors, "refusals": measured.refusals}


def failures(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that raised, warm-up ones included."""
    return [trial for trial in trials if trial.error is not None]
