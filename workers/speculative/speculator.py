"""Speculation around a step: drafts for what the scheduler planned, and what the drafters learn from the results.

Between the engine, which asks before and tells after each step, and the drafters. It decides no token: whatever
happens here, the outputs are those of plain decoding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from workers.model.greedy import is_plain
from workers.scheduler.scheduler import takes_draft
from workers.scheduler.step import Chunk, ChunkResults, StepPlan
from workers.speculative.controller import FEW, Controller
from workers.speculative.fusion import fuse
from workers.speculative.pool.client import Pool
from workers.speculative.protocol import Context, Drafter, Draws, Key, Scout, Verified
from workers.speculative.stats import SpeculationStats
from workers.speculative.tree import MAX_NODES, DraftTree

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

SURE = 2.0  # tokens of a draft that are probably right; then nobody waits for another
REST = 20  # plain steps in a row of which nothing is noted: between steps Python is cold, and every look costs


class Speculator:
    """Drafters and the controller that admits their drafts. Mutated only by the engine that made it."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        max_nodes: int,
        controller: Controller | None = None,
        pool: Pool | None = None,
    ) -> None:
        """`max_nodes`: of one sequence's draft; the controller admits a part of them. `pool`: if it is a drafter."""
        self._pool = pool
        self._drafters = drafters
        self._max_nodes = min(max_nodes, MAX_NODES)
        learning = [number for number, drafter in enumerate(drafters) if drafter.num_top_ids]
        self._controller = controller or Controller(len(drafters), max_nodes=self._max_nodes, learning=learning)
        self._asked: Sequence[int] = ()  # drafters, for the step at hand
        self._broken: set[int] = set()
        self._num_plain = 0  # plain steps in a row
        self._num_resting = 0  # plain steps still to come, …
        self._resting_size = 0  # … of so many sequences
        self._is_resting = False  # in the step at hand
        self._learning_s = 0.0  # spent on learning from the last step: it is part of what drafting costs
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

    def draft(self, plan: StepPlan) -> dict[int, DraftTree] | None:
        """Drafts by number of the plan's chunks; None if the step is not to be speculated upon at all.

        Steps that compute prompts are not: they are long in any case, and would be longer.
        """
        self._asked = ()
        self._is_resting = self._num_resting > 0 and plan.num_tokens == len(plan.chunks) == self._resting_size
        if self._is_resting:
            self._num_resting -= 1
            return None
        self._num_resting = 0
        if _only_decodes(plan):
            has_new = any(chunk.sequence.num_output == 1 for chunk in plan.chunks)
            num_sampled = sum([not is_plain(chunk.sequence.request.sampling) for chunk in plan.chunks])
            is_sampled = 2 * num_sampled > len(plan.chunks)
            self._asked = self._controller.choose(len(plan.chunks), has_new=has_new, is_sampled=is_sampled)
        numbers = [number for number, chunk in enumerate(plan.chunks) if _may_draft(chunk)] if self._asked else []
        if not numbers:
            if not self._asked and _only_decodes(plan):
                self._rest(plan)
            self._asked = ()
            return None
        contexts = [_context(plan.chunks[number]) for number in numbers]
        proposed = self._proposals(contexts, self._controller.num_to_propose(len(contexts)))
        fused = {
            context.key: fuse(drafts, self._asked).cut(self._max_nodes)
            for context, *drafts in zip(contexts, *proposed, strict=True)
        }
        admitted = self._controller.admit(fused, len(plan.chunks))
        keys = {context.key: number for number, context in zip(numbers, contexts, strict=True)}
        return {keys[key]: draft for key, draft in admitted.items()}

    def learn(self, plan: StepPlan, results: ChunkResults, seconds: float, *, speculated: bool) -> None:
        """A step has been committed. `speculated`: drafts were asked for, though none may have been admitted."""
        if self._is_resting:
            return
        if not speculated:
            self._num_plain = self._num_plain + 1 if _only_decodes(plan) else 0
            if self._num_plain > 1:  # the first is laid out anew, and takes longer
                self._controller.observe_plain(len(plan.chunks), seconds)
            return
        began, self._num_plain = time.perf_counter(), 0
        verified = [_verified(chunk, number, results) for number, chunk in enumerate(plan.chunks) if chunk.samples]
        for number in self._asked:
            self._ask(number, lambda drafter: drafter.learn(verified), None)
        for one in verified:
            if len(one.draft):
                self._count(one)
                self._controller.verified(one.context.key, one.draft, one.nodes)
        num_tokens = sum([one.num_new for one in verified])
        self._controller.observe_drafted(len(plan.chunks), plan.num_tokens, num_tokens, seconds + self._learning_s)
        self._learning_s = time.perf_counter() - began

    def forget(self, key: Key) -> None:
        """The sequence has ended."""
        for number in range(len(self._drafters)):
            self._ask(number, lambda drafter: drafter.forget(key), None)
        self._controller.forget(key)

    def close(self) -> None:
        """End what is outside of this process. Idempotent."""
        if self._pool is not None:
            self._pool.close()

    def _rest(self, plan: StepPlan) -> None:
        """Before some plain steps: a look whether a drafter that is not asked ought to be, where a few run."""
        num_sequences = len(plan.chunks)
        if num_sequences <= FEW:
            contexts = [_context(chunk) for chunk in plan.chunks if _may_draft(chunk)]
            for number in range(len(self._drafters)):
                if self._ask(number, lambda drafter: isinstance(drafter, Scout) and drafter.is_sure(contexts), False):
                    self._controller.beckon(number, num_sequences)
        self._num_resting, self._resting_size = self._controller.rest(num_sequences, REST), num_sequences

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


def _only_decodes(plan: StepPlan) -> bool:
    """Whether each sequence of the step computes one token, drafts aside."""
    return plan.num_tokens - plan.num_drafted == len(plan.chunks)


def _may_draft(chunk: Chunk) -> bool:
    return takes_draft(chunk) and chunk.sequence.request.speculation != "off"


def _context(chunk: Chunk) -> Context:
    sequence = chunk.sequence
    sampling = sequence.request.sampling
    return Context(
        (sequence.request.request_id, sequence.index),
        sequence.request.cache_salt,
        sequence.tokens,
        sequence.num_prompt,
        draws=None if is_plain(sampling) else Draws(sampling, sequence.index),
    )


def _verified(chunk: Chunk, number: int, results: ChunkResults) -> Verified:
    walked = results.walks[number]
    num_new = len(chunk.sequence.tokens) - chunk.start - 1 if chunk.draft is not None else 1
    top_ids = results.top_ids[number] if results.top_ids else ()
    nodes = walked.nodes[: max(num_new, 0)] if walked else ()
    return Verified(_context(chunk), num_new, chunk.draft or DraftTree(), nodes, top_ids)
