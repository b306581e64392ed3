"""The drafters of one worker, asked together: their drafts as one for each sequence, and of it as much as pays.

Between whatever runs the steps and the drafters; it knows no engine. It decides no token: whatever happens here, the
outputs are those of plain decoding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from workers.speculative.controller import FEW, Controller
from workers.speculative.fusion import fuse
from workers.speculative.pool.client import Pool
from workers.speculative.protocol import Context, Drafter, Key, Scout, Verified
from workers.speculative.stats import SpeculationStats
from workers.speculative.tree import MAX_NODES, DraftTree

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

SURE = 2.0  # tokens of a draft that are probably right; then nobody waits for another
REST = 20  # plain steps in a row of which nothing is noted: between steps Python is cold, and every look costs


class Step(Protocol):
    """A step to come in which every sequence decodes, as far as drafting goes. Looked at only where need be."""

    @property
    def num_sequences(self) -> int:
        """That decode."""

    @property
    def has_new(self) -> bool:
        """Whether some of them have just begun."""

    @property
    def is_sampled(self) -> bool:
        """Whether most of them draw their tokens."""

    def contexts(self) -> list[Context]:
        """Of those that may have a draft."""


class Panel:
    """Drafters and the controller that admits their drafts. Mutated only by its owner, which runs the steps.

    Before a step in which every sequence decodes: `draft`, before any other: `skip`. After it, unless it `is_resting`:
    `learn` and `note_drafted` if there were drafts or might have been, else `note_plain`.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        max_nodes: int,
        controller: Controller | None = None,
        pool: Pool | None = None,
        chains: bool = False,
    ) -> None:
        """`max_nodes`: of one sequence's draft; the controller admits a part of them. `pool`: if it is a drafter.

        `chains`: the target verifies one path of each draft only.
        """
        self._pool = pool
        self._drafters = drafters
        self._max_nodes = min(max_nodes, MAX_NODES)
        self._chains = chains
        learning = [number for number, drafter in enumerate(drafters) if drafter.num_top_ids]
        self._controller = controller or Controller(len(drafters), max_nodes=self._max_nodes, learning=learning)
        self._asked: Sequence[int] = ()  # drafters, for the step at hand
        self._broken: set[int] = set()
        self._num_plain = 0  # plain steps in a row
        self._num_resting = 0  # plain steps still to come, …
        self._resting_size = 0  # … of so many sequences
        self._is_resting = False
        self._num_drafts = 0
        self._accepted_by_depth = [0] * self._max_nodes
        self._drafted_by = dict.fromkeys([drafter.name for drafter in drafters], 0)
        self._accepted_by = dict(self._drafted_by)
        self._num_drafted = 0

    @property
    def num_top_ids(self) -> int:
        """How many of the target's most probable tokens the drafters that were asked last want of each row."""
        return max([self._drafters[number].num_top_ids for number in self._asked], default=0)

    @property
    def broken(self) -> frozenset[int]:
        """Drafters that have failed and are left out."""
        return frozenset(self._broken)

    @property
    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            self._num_drafts,
            self._num_drafted,
            sum(self._accepted_by_depth),
            tuple(self._accepted_by_depth),
            dict(self._drafted_by),
            dict(self._accepted_by),
            self._decisions(),
            None if self._pool is None else self._pool.stats,
        )

    @property
    def is_resting(self) -> bool:
        """Whether the step at hand is a plain one of which nothing need be noted."""
        return self._is_resting

    def skip(self) -> None:
        """Nobody is asked for the next step."""
        self._asked, self._is_resting, self._num_resting = (), False, 0

    def draft(self, step: Step) -> dict[Key, DraftTree] | None:
        """The drafts that pay; sequences without one are left out. None if nobody was asked."""
        self._asked, num_sequences = (), step.num_sequences
        self._is_resting = self._num_resting > 0 and num_sequences == self._resting_size
        if self._is_resting:
            self._num_resting -= 1
            return None
        self._num_resting = 0
        self._asked = self._controller.choose(num_sequences, has_new=step.has_new, is_sampled=step.is_sampled)
        if not self._asked:
            self._rest(step)
            return None
        contexts = step.contexts()
        if not contexts:
            self._asked = ()
            return None
        return self._controller.admit(self._fused(contexts), num_sequences)

    def learn(self, verified: Sequence[Verified]) -> None:
        """What a step for which drafters were asked said of its sequences, with drafts or without."""
        self._num_plain = 0
        for number in self._asked:
            self._ask(number, lambda drafter: drafter.learn(verified), None)
        for one in verified:
            if len(one.draft):
                self._count(one)
                self._controller.verified(one.context.key, one.draft, one.nodes)

    def note_drafted(self, num_sequences: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """How long a step took for which drafters were asked. See Controller."""
        self._controller.observe_drafted(num_sequences, num_rows, num_tokens, seconds)

    def note_plain(self, num_sequences: int, seconds: float, *, only_decodes: bool) -> None:
        """How long a step took for which nobody was asked."""
        self._num_plain = self._num_plain + 1 if only_decodes else 0
        if self._num_plain > 1:  # the first is laid out anew, and takes longer
            self._controller.observe_plain(num_sequences, seconds)

    def forget(self, key: Key) -> None:
        """The sequence has ended."""
        for number in range(len(self._drafters)):
            self._ask(number, lambda drafter: drafter.forget(key), None)
        self._controller.forget(key)

    def close(self) -> None:
        """End what is outside of this process. Idempotent."""
        if self._pool is not None:
            self._pool.close()

    def _rest(self, step: Step) -> None:
        """Before some plain steps: a look whether a drafter that is not asked ought to be, where a few run."""
        num_sequences = step.num_sequences
        if num_sequences <= FEW:
            contexts = step.contexts()
            for number in range(len(self._drafters)):
                if self._ask(number, lambda drafter: isinstance(drafter, Scout) and drafter.is_sure(contexts), False):
                    self._controller.beckon(number, num_sequences)
        self._num_resting, self._resting_size = self._controller.rest(num_sequences, REST), num_sequences

    def _fused(self, contexts: Sequence[Context]) -> dict[Key, DraftTree]:
        """What the drafters say of each, as one draft that can be verified."""
        proposed = self._proposals(contexts, self._controller.num_to_propose(len(contexts)))
        fused = [fuse(drafts, self._asked) for drafts in zip(*proposed, strict=True)]
        if self._chains:
            fused = [draft.trunk() for draft in fused]
        return {context.key: draft.cut(self._max_nodes) for context, draft in zip(contexts, fused, strict=True)}

    def _proposals(self, contexts: Sequence[Context], max_nodes: int) -> list[Sequence[DraftTree]]:
        """By drafter. The pool comes last: where another one is sure of its draft already, it is not waited for."""
        found: dict[int, Sequence[DraftTree]] = {}
        nothing = [DraftTree()] * len(contexts)
        for number in sorted(self._asked, key=lambda number: self._drafters[number] is self._pool):
            asked = contexts
            if self._drafters[number] is self._pool and found:
                sure = [
                    max(_expected(draft) for draft in drafts) >= SURE for drafts in zip(*found.values(), strict=True)
                ]
                asked = [one._replace(can_wait=not known) for one, known in zip(contexts, sure, strict=True)]
            found[number] = self._ask(number, partial(_propose, asked, max_nodes), nothing)
        return [found[number] for number in self._asked]

    def _ask(self, number: int, question: Callable[[Drafter], _Answer], otherwise: _Answer) -> _Answer:
        """A drafter that fails is not asked any more: nobody's tokens depend on it."""
        if number not in self._broken:
            try:
                return question(self._drafters[number])
            except Exception:
                log.exception("the drafter %s failed; it is left out", self._drafters[number].name)
                self._broken.add(number)
        return otherwise

    def _decisions(self) -> dict[str, int]:
        steps = self._controller.num_steps.items()
        return {"+".join([self._drafters[number].name for number in asked]) or "off": count for asked, count in steps}

    def _count(self, one: Verified) -> None:
        self._num_drafts += 1
        self._num_drafted += len(one.draft)
        for depth, _ in enumerate(one.nodes):
            self._accepted_by_depth[depth] += 1
        sources = one.draft.sources
        for number in self._asked:
            name, bit = self._drafters[number].name, 1 << number
            self._drafted_by[name] += len([source for source in sources if source & bit])
            self._accepted_by[name] += len([node for node in one.nodes if sources[node] & bit])


def _propose(contexts: Sequence[Context], max_nodes: int, drafter: Drafter) -> Sequence[DraftTree]:
    return drafter.propose(contexts, max_nodes)


def _expected(draft: DraftTree) -> float:
    """How many tokens of it are right, by its drafter's belief."""
    return sum(draft.path_probabilities)
