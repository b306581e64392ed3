"""What drafters' probabilities are worth: how often nodes of a claimed probability have been right.

A drafter's own numbers are only an order: copying claims more the longer the match, recycling what its ranks were worth
elsewhere. Here they are turned into frequencies, for all sequences together and then for the one at hand.
"""

from __future__ import annotations

from workers.speculative.protocol import Key
from workers.speculative.tree import ROOT, DraftTree

NUM_LEVELS = 16  # of claimed probability
MEMORY = 200.0  # nodes of a level after which what was seen counts half
PRIOR_WEIGHT = 4.0  # nodes that the claim itself counts for
OWN_MEMORY = 24.0  # the same for one sequence
OWN_WEIGHT = 6.0
RELAXED = 0.8  # of it is left after a step in which the sequence's draft was declined
HIGHEST = 0.99


class Calibration:
    """Frequencies by source and claimed probability. Mutated only by Controller."""

    def __init__(self) -> None:
        self._levels: dict[tuple[int, int], tuple[float, float]] = {}  # right, tried
        self._own: dict[Key, tuple[float, float]] = {}  # right, expected to be right

    def path_probabilities(self, key: Key, draft: DraftTree) -> list[float]:
        """That all nodes from the root to each are right, by what has proved true."""
        right, expected = self._own.get(key, (0.0, 0.0))
        factor = (right + OWN_WEIGHT) / (expected + OWN_WEIGHT)
        paths: list[float] = []
        for parent, source, claimed in zip(draft.parents, draft.sources, draft.probabilities, strict=True):
            probability = min(HIGHEST, factor * self._frequency(source, claimed))
            paths.append(probability if parent == ROOT else paths[parent] * probability)
        return paths

    def observe(self, key: Key, claimed: DraftTree, nodes: tuple[int, ...]) -> None:
        """`claimed`: the draft as its drafters made it; `nodes`: what was right. A node counts if its parent was."""
        reached = {ROOT, *nodes}
        accepted = set(nodes)
        right, expected = self._own.get(key, (0.0, 0.0))
        for node, parent in enumerate(claimed.parents):
            if parent in reached:
                source, claim = claimed.sources[node], claimed.probabilities[node]
                is_right = node in accepted
                fade = 0.5 ** (1 / OWN_MEMORY)
                right, expected = right * fade + is_right, expected * fade + self._frequency(source, claim)
                self._count(source, claim, is_right)
        self._own[key] = right, expected

    def relax(self, key: Key) -> None:
        """Nothing of the sequence's draft was admitted: what is held against it counts for less and less."""
        right, expected = self._own.get(key, (0.0, 0.0))
        self._own[key] = right * RELAXED, expected * RELAXED

    def forget(self, key: Key) -> None:
        self._own.pop(key, None)

    def _frequency(self, source: int, claimed: float) -> float:
        right, tried = self._levels.get((source, _level(claimed)), (0.0, 0.0))
        return (right + PRIOR_WEIGHT * claimed) / (tried + PRIOR_WEIGHT)

    def _count(self, source: int, claimed: float, is_right: bool) -> None:
        level = source, _level(claimed)
        right, tried = self._levels.get(level, (0.0, 0.0))
        fade = 0.5 ** (1 / MEMORY)
        self._levels[level] = right * fade + is_right, tried * fade + 1


def _level(claimed: float) -> int:
    return min(int(claimed * NUM_LEVELS), NUM_LEVELS - 1)
