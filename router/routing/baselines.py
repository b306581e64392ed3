"""Policies that do not look at matches: what the default is measured against, and what an operator may fall back to.

They know what is cached where, so that a prediction stands beside every decision, but it does not move them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from router.routing.cost import CostModel
from router.routing.protocol import Ask, Candidate, Decision, Estimate
from router.routing.ranking import Ranked, choose, decision, ordered
from router.routing.rendezvous import rendezvous


class LeastLoaded:
    """The least work ahead; ties go to fewer outputs, then by rendezvous hash."""

    name = "least_loaded"

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def pick(self, ask: Ask, candidates: Sequence[Candidate]) -> Decision | None:
        ranked = self._ranked(ask, candidates)
        return choose(ask.key, ranked, "balanced") if ranked else None

    def explain(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
        return ordered(ask.key, self._ranked(ask, candidates))

    def _ranked(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Ranked]:
        return [self._rank(ask, candidate) for candidate in candidates]

    def _rank(self, ask: Ask, candidate: Candidate) -> Ranked:
        blind = self._cost.estimate(ask, candidate._replace(cached_tokens=0, live_tokens=0, fetchable_tokens=0))
        estimate = self._cost.estimate(ask, candidate)._replace(cost=blind.cost)
        return (estimate.cost, candidate.reserved.num_outputs), estimate


class RoundRobin:
    """Each worker in turn, by id. Its state is the last choice."""

    name = "round_robin"

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._last = ""

    def pick(self, ask: Ask, candidates: Sequence[Candidate]) -> Decision | None:
        if not candidates:
            return None
        order = self._order(candidates)
        self._last = order[0].worker_id
        return decision("turn", _estimates(self._cost, ask, order[:2]))

    def explain(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
        return _estimates(self._cost, ask, self._order(candidates))

    def _order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=lambda candidate: (candidate.worker_id <= self._last, candidate.worker_id))


class Random:
    """Each worker with the same probability. Its state is the number of draws; the seed decides them all."""

    name = "random"

    def __init__(self, cost: CostModel, *, seed: int) -> None:
        self._cost = cost
        self._seed = seed
        self._num_draws = 0

    def pick(self, ask: Ask, candidates: Sequence[Candidate]) -> Decision | None:
        if not candidates:
            return None
        order = self._order(candidates)
        self._num_draws += 1
        return decision("random", _estimates(self._cost, ask, order[:2]))

    def explain(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
        return _estimates(self._cost, ask, self._order(candidates))

    def _order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        by_id = sorted(candidates, key=lambda candidate: candidate.worker_id)
        start = int(random.Random(f"{self._seed}/{self._num_draws}").random() * len(by_id))
        return by_id[start:] + by_id[:start]


class ConsistentHash:
    """The first worker in the key's order that holds fewer than its share of outputs.

    The order is a rendezvous hash; the share is that of consistent hashing with bounded loads (Mirrokni, Thorup and
    Zadimoghaddam, SODA 2018): ceil(factor x mean), the newcomer counted. Overloaded workers come last.
    """

    name = "consistent_hash"

    def __init__(self, cost: CostModel, *, factor: float = 1.25) -> None:
        self._cost = cost
        self._factor = factor

    def pick(self, ask: Ask, candidates: Sequence[Candidate]) -> Decision | None:
        if not candidates:
            return None
        return decision("hash", _estimates(self._cost, ask, self._order(ask, candidates)[:2]))

    def explain(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
        return _estimates(self._cost, ask, self._order(ask, candidates))

    def _order(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Candidate]:
        held = {candidate.worker_id: _num_outputs(candidate) for candidate in candidates}
        share = math.ceil(self._factor * (sum(held.values()) + ask.num_outputs) / max(1, len(held)))
        return sorted(candidates, key=lambda c: (held[c.worker_id] >= share, rendezvous(ask.key, c.worker_id)))


def _num_outputs(candidate: Candidate) -> int:
    return max(candidate.reserved.num_outputs, candidate.load.num_running + candidate.load.num_waiting)


def _estimates(cost: CostModel, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
    return [cost.estimate(ask, candidate) for candidate in candidates]
