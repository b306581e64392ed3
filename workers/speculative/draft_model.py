"""A drafter that is a small model: its greedy continuation, for as long as it is sure of it.

Continuous batching as in the target: one step of the model serves every sequence that wants a draft. Each keeps its
keys and values between drafts; what the target did not choose is forgotten by going on from where both agree.

Drafting stops when the probability that all tokens so far are right falls below a threshold: SpecDec++ (Huang et al.,
arXiv 2405.19715, section 3) predicts that with a trained head, here the model's own probabilities take its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from protos.messages import Request, Sampling
from workers.kv.cache import KVCache, PageTable
from workers.model.batch import BatchBuilder
from workers.model.scores import Model
from workers.scheduler.sequence import Sequence as RunningSequence
from workers.scheduler.step import Chunk, StepPlan
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import DraftTree

LEAST = 0.05  # probability of a whole draft at which drafting stops
MAX_PROMPT_ROWS = 1024  # of sequences that are not up to date, in one draft; the others wait for the next


@dataclass(slots=True, eq=False)
class _Draft:
    """A sequence as the drafter knows it. Mutated only by DraftModel.

    Tokens [0, num_known) are the target's; the rest was drafted after them.
    """

    sequence: RunningSequence
    num_known: int = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Take over the target's tokens, and keep what has been computed of them."""
        own = self.sequence.tokens
        agreed = self.num_known
        limit = min(len(own), len(tokens))
        while agreed < limit and own[agreed] == tokens[agreed]:
            agreed += 1
        own[agreed:] = tokens[agreed:]
        self.num_known = len(own)
        self.sequence.num_computed = min(self.sequence.num_computed, agreed, len(own) - 1)


class DraftModel:
    """A Drafter with a model, and keys and values of its own."""

    name = "model"
    num_top_ids = 0

    def __init__(self, model: Model, builder: BatchBuilder, cache: KVCache, *, max_context: int) -> None:
        """`builder` and `cache` are this drafter's alone; the model has the target's tokens."""
        self._model = model
        self._builder = builder
        self._cache = cache
        self._max_context = max_context
        self._drafts: OrderedDict[Key, _Draft] = OrderedDict()  # the latest used last

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter. Sequences that memory or the model's context cannot hold get no draft."""
        proposed = [DraftTree()] * len(contexts)
        ready: list[tuple[int, _Draft]] = []
        for number, context in enumerate(contexts):
            if (draft := self._prepare(context, max_nodes)) is not None:
                ready.append((number, draft))
        ready = self._catch_up(ready)
        if ready:
            for (number, _), tree in zip(ready, self._continue([draft for _, draft in ready], max_nodes), strict=True):
                proposed[number] = tree
        return proposed

    def learn(self, verified: Sequence[Verified]) -> None:
        """Nothing: the next context says what was right."""

    def forget(self, key: Key) -> None:
        if (draft := self._drafts.pop(key, None)) is not None:
            self._cache.release(draft.sequence.table)

    def check(self) -> None:
        """The invariants between sequences and pages; for tests."""
        self._cache.check(draft.sequence.table for draft in self._drafts.values())

    def _prepare(self, context: Context, max_nodes: int) -> _Draft | None:
        """The sequence brought up to the target's tokens, with room for a draft; None if it cannot be had."""
        num_tokens = len(context.tokens)
        if num_tokens + max_nodes > self._max_context:
            return None
        draft = self._drafts.get(context.key)
        if draft is None:
            draft = self._drafts[context.key] = self._begin(context)
        self._drafts.move_to_end(context.key)
        draft.follow(context.tokens)
        while not self._cache.reserve(draft.sequence.table, num_tokens + max_nodes):
            oldest = next(iter(self._drafts))
            self.forget(oldest)
            if oldest == context.key:
                return None
        return draft

    def _begin(self, context: Context) -> _Draft:
        request = Request(context.key[0], tuple(context.tokens[:1]), Sampling(seed=0, max_tokens=1))
        sequence = RunningSequence(request, context.key[1], 0, list(context.tokens), PageTable(context.salt))
        sequence.num_computed = self._cache.match(
            sequence.table, sequence.tokens, num_computed=0, limit=len(sequence.tokens) - 1
        )
        return _Draft(sequence, len(sequence.tokens))

    def _catch_up(self, drafts: list[tuple[int, _Draft]]) -> list[tuple[int, _Draft]]:
        """Compute what is missing but for each sequence's last token; those for which there is time today."""
        budget, behind, ready = MAX_PROMPT_ROWS, [], []
        for number, draft in drafts:
            sequence = draft.sequence
            missing = len(sequence.tokens) - 1 - sequence.num_computed
            num_tokens = min(missing, budget)
            if num_tokens:
                behind.append(Chunk(sequence, sequence.num_computed, num_tokens, 0, 0, samples=False))
                budget -= num_tokens
            if num_tokens == missing:
                ready.append((number, draft))
        if behind:
            self._model.forward(self._builder.build(_plan(behind)), with_logits=False)
        for chunk in behind:
            chunk.sequence.num_computed = chunk.stop
            self._cache.publish(chunk.sequence.table, chunk.sequence.tokens, chunk.stop, pending=False)
        return ready

    def _continue(self, drafts: Sequence[_Draft], num_steps: int) -> list[DraftTree]:
        chunks = [Chunk(draft.sequence, draft.num_known - 1, 1, 0, 0, samples=True) for draft in drafts]
        made = self._model.continue_greedily(self._builder.build_alone(chunks), num_steps=num_steps, least=LEAST)
        trees = []
        for row, draft in enumerate(drafts):
            tokens = [step[row] for step in made.token_ids]
            probabilities = [min(step[row], 1.0) for step in made.probabilities]
            draft.sequence.tokens += tokens
            draft.sequence.num_computed = len(draft.sequence.tokens) - 1
            trees.append(DraftTree.chain(tokens, probabilities))
        return trees


def _plan(chunks: Sequence[Chunk]) -> StepPlan:
    return StepPlan(tuple(chunks), (), (), sum(chunk.num_tokens for chunk in chunks))
