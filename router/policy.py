"""Which worker runs a packed group: scorers in [0, 1] with weights, one picker.

Stands between admission, which asks, and the session, which reserves. Pure: decisions depend on the arguments only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protos.messages import Load, Request


@dataclass(frozen=True, slots=True)
class Work:
    """Token-work: rows that a worker has still to compute."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_outputs: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could run a group now."""

    worker_id: str
    load: Load  # as the worker last said, over all routers
    reserved: Work  # what this router gave it and has not had back


class Scorer(Protocol):
    """One reason to prefer a worker."""

    @property
    def name(self) -> str:
        """What explanations call it."""

    def score(self, requests: Sequence[Request], candidate: Candidate) -> float:
        """How well the candidate suits the packed group, in [0, 1]; 1 is best."""


class LeastLoaded:
    """Prefers the worker with the least token-work, reserved and reported."""

    name = "least_loaded"

    def __init__(self, *, half_tokens: int = 4096, foreign_output_tokens: int = 128) -> None:
        self._half_tokens = half_tokens  # the work that scores one half
        self._foreign_output_tokens = foreign_output_tokens  # guessed rest of an output that another router sent

    def score(self, requests: Sequence[Request], candidate: Candidate) -> float:
        return self._half_tokens / (self._half_tokens + self.work_tokens(candidate))

    def work_tokens(self, candidate: Candidate) -> int:
        """Work ahead of a newcomer. A report repeats part of what we reserved, so the larger counts."""
        load, reserved = candidate.load, candidate.reserved
        foreign_outputs = max(0, load.num_running + load.num_waiting - reserved.num_outputs)
        prefill_tokens = max(load.pending_prefill_tokens, reserved.prefill_tokens)
        return prefill_tokens + reserved.decode_tokens + foreign_outputs * self._foreign_output_tokens


@dataclass(frozen=True, slots=True)
class Weighted:
    """A scorer and how much it counts."""

    scorer: Scorer
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Policy:
    """The picker: the highest weighted score wins; ties go to fewer outputs, then to the smaller worker id."""

    scorers: tuple[Weighted, ...]

    def pick(self, requests: Sequence[Request], candidates: Sequence[Candidate]) -> Candidate | None:
        """The best candidate, or None if there are none. The same arguments always give the same answer."""
        return min(candidates, key=lambda candidate: self._rank(requests, candidate), default=None)

    def _rank(self, requests: Sequence[Request], candidate: Candidate) -> tuple[float, int, str]:
        return -self.score(requests, candidate), candidate.reserved.num_outputs, candidate.worker_id

    def score(self, requests: Sequence[Request], candidate: Candidate) -> float:
        """The weighted sum of all scorers."""
        return sum(weighted.weight * weighted.scorer.score(requests, candidate) for weighted in self.scorers)


def default_policy() -> Policy:
    """What a router uses unless told otherwise."""
    return Policy((Weighted(LeastLoaded()),))
