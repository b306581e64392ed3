"""What the engines answered, kept to compare their greedy tokens. Informational: in bf16 near ties fall either way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Outputs = Sequence[Sequence[int]]
Run = tuple[str, int, int]  # workload, seed, tokens


@dataclass(frozen=True, slots=True)
class Agreement:
    """How one arm's tokens compare with another's on the same prompts."""

    arm: str
    num_outputs: int
    first_percent: float  # outputs whose first token is equal
    all_percent: float  # positions up to and including the first that differs, which are equal


@dataclass
class Answers:
    """Every run's outputs. Mutated only by Entrants, through `note`."""

    _runs: dict[Run, dict[str, Outputs]] = field(default_factory=dict)

    def note(self, workload: str, seed: int, max_tokens: int, arm: str, outputs: Outputs) -> None:
        """Keep the outputs of one run."""
        self._runs.setdefault((workload, seed, max_tokens), {})[arm] = outputs

    def agreement(self, reference: str) -> list[Agreement]:
        """Of every arm that answered what the reference answered too."""
        arms = dict.fromkeys(arm for run in self._runs.values() for arm in run if arm != reference)
        found = [_agreement(arm, self._pairs(arm, reference)) for arm in arms]
        return [agreement for agreement in found if agreement.num_outputs]

    def _pairs(self, arm: str, reference: str) -> list[tuple[Sequence[int], Sequence[int]]]:
        runs = [run for run in self._runs.values() if arm in run and reference in run]
        return [pair for run in runs for pair in zip(run[arm], run[reference], strict=True)]


def _agreement(arm: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Agreement:
    if not pairs:
        return Agreement(arm, 0, 0.0, 0.0)
    first = sum(one[0] == other[0] for one, other in pairs)
    equal = sum(_num_equal(one, other) for one, other in pairs)
    compared = sum(min(_num_equal(one, other) + 1, len(one)) for one, other in pairs)
    return Agreement(arm, len(pairs), 100 * first / len(pairs), 100 * equal / compared)


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that are equal; after the first other one, the texts are different."""
    return next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
