"""One arm's measurement of one workload in one round."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.benchmark import Measured


def round_name(round_index: int | None) -> str:
    """What people call it: rounds count from 1."""
    if round_index is None:
        return "outside the rounds"
    return "warm-up" if round_index < 0 else f"round {round_index + 1}"


@dataclass(frozen=True, slots=True)
class Trial:
    """Either what was found, or why it failed."""

    workload: str
    arm: str
    round_index: int | None  # negative: a warm-up round, whose values are not counted; None: set-up or teardown
    measured: Measured | None = None
    error: str | None = None

    @property
    def is_clean(self) -> bool:
        """Whether nothing failed and no request went wrong. Refusals are a result, not a failure."""
        return self.measured is not None and not self.measured.errors
