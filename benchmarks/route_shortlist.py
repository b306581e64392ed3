"""The few of many workers that a policy has to look at, found without looking at the rest.

Workers are kept in the order of their load, and what is ahead is never less than that: once the load alone, with the
best match that anybody has, costs more than the two best found, nobody further on is chosen or the runner-up.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

from router.routing.cost import CostModel
from router.routing.index import Match
from router.routing.protocol import Ask, Candidate

_Place = tuple[int, int, str]  # load, outputs, worker id


class Shortlist:
    """Candidates in the order of their load. Owned by whoever calls the policy.

    A policy with the same CostModel decides on the short list as it would on the whole, reason and runner-up included:
    PrefixAffinity on `find` as long as no worker fetches prefixes from others, LeastLoaded on `find_blind`.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._candidates: dict[str, Candidate] = {}
        self._places: dict[str, _Place] = {}
        self._by_load: list[_Place] = []

    def __len__(self) -> int:
        return len(self._candidates)

    def put(self, candidate: Candidate) -> None:
        """Add a worker, or replace what is known of it. Its matches are those of a prompt and belong to `find`."""
        self.remove(candidate.worker_id)
        place = (self._cost.load_tokens(candidate), candidate.reserved.num_outputs, candidate.worker_id)
        self._candidates[candidate.worker_id] = candidate
        self._places[candidate.worker_id] = place
        insort(self._by_load, place)

    def remove(self, worker_id: str) -> None:
        """Forget a worker, if it is known."""
        place = self._places.pop(worker_id, None)
        if place is not None:
            del self._candidates[worker_id]
            del self._by_load[bisect_left(self._by_load, place)]

    def every(self, ask: Ask, matches: Mapping[str, Match], block_size: int) -> list[Candidate]:
        """All workers, with what they have of the prompt: for policies that do not compare costs."""
        return [matched(candidate, ask, matches, block_size) for candidate in self._candidates.values()]

    def find(self, ask: Ask, matches: Mapping[str, Match], block_size: int) -> list[Candidate]:
        """Those that no two others are sure to beat, and one with the longest match, which a reason refers to."""
        known = [worker_id for worker_id in matches if worker_id in self._candidates]
        longest = max(known, key=lambda worker_id: matches[worker_id].known, default=None)
        found = self._scan(ask, {worker_id: matches[worker_id] for worker_id in known}, block_size)
        if longest is not None and all(candidate.worker_id != longest for candidate in found):
            found.append(matched(self._candidates[longest], ask, matches, block_size))
        return found

    def find_blind(self, ask: Ask, matches: Mapping[str, Match], block_size: int) -> list[Candidate]:
        """The same for a policy to which matches do not count; they are told all the same."""
        return [matched(candidate, ask, matches, block_size) for candidate in self._scan(ask, {}, block_size)]

    def _scan(self, ask: Ask, matches: Mapping[str, Match], block_size: int) -> list[Candidate]:
        most_cached = min(max((match.known for match in matches.values()), default=0) * block_size, ask.num_tokens)
        found, best, second = list[Candidate](), float("inf"), float("inf")
        for load_tokens, _, worker_id in self._by_load:
            if self._cost.total(ask, load_tokens, cached_tokens=most_cached, live_tokens=most_cached) > second:
                break
            if worker_id in matches or self._cost.total(ask, load_tokens) <= second:
                candidate = matched(self._candidates[worker_id], ask, matches, block_size)
                best, second = sorted((best, second, self._cost.estimate(ask, candidate).cost))[:2]
                found.append(candidate)
        return found

    def check(self) -> None:
        """The order holds every candidate once, where its load puts it."""
        assert self._by_load == sorted(self._places.values())
        assert self._places.keys() == self._candidates.keys()
        for worker_id, (load_tokens, _, _) in self._places.items():
            assert load_tokens == self._cost.load_tokens(self._candidates[worker_id])


def matched(candidate: Candidate, ask: Ask, matches: Mapping[str, Match], block_size: int) -> Candidate:
    """The candidate with what it has of the prompt. The last token is always computed, so it never counts as cached."""
    match = matches.get(candidate.worker_id)
    if match is None:
        return candidate
    most = max(0, ask.num_tokens - 1)
    return candidate._replace(
        cached_tokens=min(match.known * block_size, most), live_tokens=min(match.live * block_size, most)
    )
