"""From ranks to an answer: the lowest rank wins, and equals stand in the order that their key gives them."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest

from router.routing.protocol import Decision, Estimate, Reason
from router.routing.rendezvous import rendezvous

Ranked = tuple[tuple[float, ...], Estimate]


def ordered(key: int, ranked: Sequence[Ranked]) -> list[Estimate]:
    """All estimates, best first."""
    return [estimate for _, estimate in sorted(ranked, key=lambda pair: (pair[0], rendezvous(key, pair[1].worker_id)))]


def choose(key: int, ranked: Sequence[Ranked], reason: Reason) -> Decision:
    """The first of `ordered`, without ordering the rest; `reason` unless there was no choice. Needs one at least."""
    return decision(reason, _first_two(key, ranked) if len(ranked) > 1 else [ranked[0][1]])


def decision(reason: Reason, best_first: Sequence[Estimate]) -> Decision:
    """For the first one, with the second as runner-up if there is one."""
    best = best_first[0]
    if len(best_first) == 1:
        return Decision(best.worker_id, "only", best.cost, best.cached_tokens, best.fetchable_tokens)
    next_id, next_cost = best_first[1].worker_id, best_first[1].cost
    return Decision(best.worker_id, reason, best.cost, best.cached_tokens, best.fetchable_tokens, next_id, next_cost)


def _first_two(key: int, ranked: Sequence[Ranked]) -> list[Estimate]:
    """Hashes are taken only of those that can be among them."""
    second = nsmallest(2, [rank for rank, _ in ranked])[1]
    return ordered(key, [pair for pair in ranked if pair[0] <= second])[:2]
