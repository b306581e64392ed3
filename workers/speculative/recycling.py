"""Token recycling: the target's own most probable tokens, those it did not choose too, are the next drafts.

Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", arXiv
2408.08696: a matrix gives for every token the candidates that followed it last (section 3.1), and a tree of fixed shape
is filled from it level by level (section 3.2). Here two tokens are looked up first, then one (a trigram table as in
"Adaptive Draft-Verification", arXiv 2407.12021), and the shape follows how often each rank has been right.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import ROOT, DraftTree

NUM_RANKS = 8
MAX_SALTS = 16  # whose tables are kept: the latest used
MAX_PAIRS = 1 << 16  # of tokens, in one salt's table; beyond, the oldest are forgotten
MIN_PROBABILITY = 0.02  # of a path worth a node
RESHAPE_AFTER = 256  # rows learnt between two looks at the tree's shape
PRIOR = (0.5, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)  # that a rank is right, before anything is known
PRIOR_WEIGHT = 32.0  # rows
MEMORY = 4096.0  # rows after which what was seen counts half

_Candidates = Sequence[int]


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tree by ranks: node i is the rank-th candidate after its parent."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(slots=True)
class _Table:
    """One salt's candidates, best first. Mutated only by Recycling."""

    by_token: dict[int, _Candidates] = field(default_factory=dict)
    by_pair: dict[tuple[int, int], _Candidates] = field(default_factory=dict)

    def candidates(self, before: int, token_id: int) -> _Candidates:
        """What may follow two tokens, as last seen; empty if even the second is unknown."""
        found = self.by_pair.get((before, token_id))
        return self.by_token.get(token_id, ()) if found is None else found

    def remember(self, before: int, token_id: int, candidates: _Candidates) -> None:
        self.by_token[token_id] = candidates
        self.by_pair[before, token_id] = candidates
        if len(self.by_pair) > MAX_PAIRS:
            for pair in list(self.by_pair)[: MAX_PAIRS // 8]:
                del self.by_pair[pair]


class Recycling:
    """A Drafter of candidates that the target itself has named. Each salt has tables of its own."""

    name = "recycle"
    num_top_ids = NUM_RANKS

    def __init__(self) -> None:
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._hits = [probability * PRIOR_WEIGHT for probability in PRIOR]
        self._num_seen = PRIOR_WEIGHT
        self._rates: Sequence[float] = PRIOR
        self._shapes: dict[int, _Shape] = {}
        self._num_unshaped = 0

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter."""
        shape = self._shapes.get(max_nodes)
        if shape is None:
            shape = self._shapes[max_nodes] = _shape(self._rates, max_nodes)
        return [self._fill(shape, context) for context in contexts]

    def learn(self, verified: Sequence[Verified]) -> None:
        for one in verified:
            if one.top_ids:
                self._learn(one)
        if self._num_unshaped >= RESHAPE_AFTER:
            self._num_unshaped = 0
            self._rates = tuple([hits / self._num_seen for hits in self._hits])
            self._shapes.clear()

    def forget(self, key: Key) -> None:
        """Nothing is kept of a single sequence."""

    def _table(self, salt: str) -> _Table:
        table = self._tables.get(salt)
        if table is None:
            table = self._tables[salt] = _Table()
            if len(self._tables) > MAX_SALTS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(salt)
        return table

    def _fill(self, shape: _Shape, context: Context) -> DraftTree:
        """The shape's tokens; a node without a candidate is left out with all that would follow it."""
        table, rates = self._table(context.salt), self._rates
        last, before_last = context.tokens[-1], _before_last(context.tokens)
        tokens: list[int] = []
        parents: list[int] = []
        probabilities: list[float] = []
        candidates = [table.candidates(before_last, last)]  # by row
        place = [0] * (len(shape.ranks) + 1)  # by row of the shape: its row here; 0 where it was left out
        for row, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True), start=1):
            at = place[parent + 1]
            if (at == 0 and parent != ROOT) or rank >= len(candidates[at]):
                continue
            token_id = candidates[at][rank]
            candidates.append(table.candidates(tokens[at - 1] if at else last, token_id))
            tokens.append(token_id)
            parents.append(at - 1)
            probabilities.append(rates[rank])
            place[row] = len(tokens)
        return DraftTree(tuple(tokens), tuple(parents), tuple(probabilities), (1,) * len(tokens))

    def _learn(self, one: Verified) -> None:
        """Remember the candidates of every row, and count which rank was right on the way taken."""
        table, draft = self._table(one.context.salt), one.draft
        num_old = len(one.context.tokens) - one.num_new
        recent = [ROOT, *one.context.tokens[max(num_old - 2, 0) :]][-one.num_new - 2 :]  # from two old ones on
        before, root, *chosen = recent
        for first, second, third in zip(recent, recent[1:], chosen, strict=False):
            self._count(table.candidates(first, second), third)
        table.remember(before, root, one.top_ids[0])
        for token_id, parent, found in zip(draft.tokens, draft.parents, one.top_ids[1:], strict=False):
            table.remember(root if parent == ROOT else draft.tokens[parent], token_id, found)

    def _count(self, candidates: _Candidates, chosen: int) -> None:
        if self._num_seen > MEMORY:
            self._num_seen /= 2
            self._hits = [hits / 2 for hits in self._hits]
        self._num_seen += 1
        self._num_unshaped += 1
        if chosen in candidates:
            self._hits[candidates.index(chosen)] += 1


def _before_last(tokens: Sequence[int]) -> int:
    return tokens[-2] if len(tokens) > 1 else ROOT


def _shape(rates: Sequence[float], max_nodes: int) -> _Shape:
    """The nodes that are most probably right, best first, if a rank is right equally often everywhere."""
    parents: list[int] = []
    ranks: list[int] = []
    heap = [(-rates[0], ROOT, 0)]
    while heap and len(parents) < max_nodes:
        path, parent, rank = heapq.heappop(heap)
        if -path < MIN_PROBABILITY:
            break
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        heapq.heappush(heap, (path * rates[0], node, 0))
        if rank + 1 < NUM_RANKS and rates[rank] > 0:
            heapq.heappush(heap, (path / rates[rank] * rates[rank + 1], parent, rank + 1))
    return _Shape(tuple(parents), tuple(ranks))
