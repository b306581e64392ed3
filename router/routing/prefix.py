"""The default policy: the worker on which the group costs least, what it has of the prompt and its load together.

Affinity is bounded for each request by itself: a holder is preferred only while its load costs less than computing the
prefix elsewhere, so a hot prefix spreads, at low load it is drawn together again, and one hot worker changes nothing
for requests that have nothing there. Where nothing is shared, only load remains. `CostModel` says what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.routing.cost import CostModel
from router.routing.protocol import Ask, Candidate, Decision, Estimate, Reason
from router.routing.ranking import Ranked, choose, ordered


class PrefixAffinity:
    """Least cost; ties go to where more is live, to the longer match, to fewer outputs, then by rendezvous hash.

    The hash makes routers that do not talk choose the same home for a prefix, and scatters cold ones evenly.
    """

    name = "prefix"

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost

    def pick(self, ask: Ask, candidates: Sequence[Candidate]) -> Decision | None:
        ranked = self._ranked(ask, candidates)
        return choose(ask.key, ranked, self._reason(ranked)) if ranked else None

    def explain(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
        return ordered(ask.key, self._ranked(ask, candidates))

    def _ranked(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Ranked]:
        return [_rank(self._cost.estimate(ask, candidate), candidate) for candidate in candidates]

    def _reason(self, ranked: Sequence[Ranked]) -> Reason:
        longest = max(estimate.cached_tokens for _, estimate in ranked)
        if longest == 0:
            return "cold"
        best = min(ranked, key=_rank_of)[1]
        if best.cached_tokens == longest:
            return "affinity"
        return "fetch" if best.fetchable_tokens else "spread"


def _rank(estimate: Estimate, candidate: Candidate) -> Ranked:
    return (estimate.cost, -estimate.live_tokens, -estimate.cached_tokens, candidate.reserved.num_outputs), estimate


def _rank_of(ranked: Ranked) -> tuple[float, ...]:
    return ranked[0]
