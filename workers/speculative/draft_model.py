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
from workers.speculative.drawing import Drawn, draw_drafts
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import DraftTree

LEAST = 0.05  # probability of a whole draft at which drafting stops
LEAST_RUNNER_UP = 0.02  # of a path worth a node that is not the model's own choice
MAX_PROMPT_ROWS = 1024  # of sequences that are not up to date, in one draft; the others wait for the next


@dataclass(slots=True, eq=False)
class _Draft:
    """A sequence as the drafter knows it. Mutated only by DraftModel.

    Tokens [0, num_known) are the target's, those up to the root were guessed by whoever asked, the rest was drafted
    after them. No page with a token that is not known is the tree's.
    """

    sequence: RunningSequence
    num_known: int = 0
    root: int = 0  # the place of the last token that a draft is wanted after

    def follow(self, context: Context) -> None:
        """Take over the sequence's tokens, and keep what has been computed of them."""
        own, tokens = self.sequence.tokens, context.tokens
        agreed = self.num_known
        limit = min(len(own), len(tokens))
        while agreed < limit and own[agreed] == tokens[agreed]:
            agreed += 1
        own[agreed:] = tokens[agreed:]
        self.root = len(own) - 1
        self.num_known = len(own) - context.num_guessed
        self.sequence.num_computed = min(self.sequence.num_computed, agreed, self.root)


class DraftModel:
    """A Drafter with a model, and keys and values of its own."""

    name = "model"
    num_top_ids = 0

    def __init__(
        self, model: Model, builder: BatchBuilder, cache: KVCache, *, max_context: int, num_candidates: int = 0
    ) -> None:
        """`builder` and `cache` are this drafter's alone; the model has the target's tokens.

        `num_candidates`: drawn for each token of a sampled sequence that is verified by rejection; 0: by the walk.
        """
        self._num_candidates = num_candidates
        self._model = model
        self._builder = builder
        self._cache = cache
        self._max_context = max_context
        self._drafts: OrderedDict[Key, _Draft] = OrderedDict()  # the latest used last

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter: the model's continuation, and beside each of its tokens the runner-up.

        Sequences that memory or the model's context cannot hold get no draft.
        """
        proposed = [DraftTree()] * len(contexts)
        prepared = [self._prepare(context, max_nodes) for context in contexts]
        ready = self._catch_up(
            [
                (number, draft)
                for number, (context, draft) in enumerate(zip(contexts, prepared, strict=True))
                if draft is not None and self._drafts.get(context.key) is draft  # a later one may have taken its pages
            ]
        )
        greedy = [(number, draft) for number, draft in ready if contexts[number].draws is None]
        drawn = [(number, draft) for number, draft in ready if contexts[number].draws is not None]
        if greedy:
            trees = self._continue([draft for _, draft in greedy], max_nodes)
            for (number, _), tree in zip(greedy, trees, strict=True):
                proposed[number] = tree
        if drawn:
            trees = self._draw([(draft, contexts[number]) for number, draft in drawn], max_nodes)
            for (number, _), tree in zip(drawn, trees, strict=True):
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
        draft.follow(context)
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
            sequence.table, sequence.tokens, num_computed=0, limit=len(sequence.tokens) - context.num_guessed - 1
        )
        return _Draft(sequence, len(sequence.tokens) - context.num_guessed)

    def _catch_up(self, drafts: list[tuple[int, _Draft]]) -> list[tuple[int, _Draft]]:
        """Compute what is missing but for each sequence's last token; those for which there is time today."""
        budget, behind, ready = MAX_PROMPT_ROWS, [], []
        for number, draft in drafts:
            sequence = draft.sequence
            missing = draft.root - sequence.num_computed
            num_tokens = min(missing, budget)
            if num_tokens:
                behind.append((draft, Chunk(sequence, sequence.num_computed, num_tokens, 0, 0, samples=False)))
                budget -= num_tokens
            if num_tokens == missing:
                ready.append((number, draft))
        if behind:
            plan = _plan([chunk for _, chunk in behind])
            self._model.forward(self._builder.build(plan), with_logits=False)
        for draft, chunk in behind:
            chunk.sequence.num_computed = chunk.stop
            num_known = min(chunk.stop, draft.num_known)
            self._cache.publish(chunk.sequence.table, chunk.sequence.tokens, num_known, pending=False)
        return ready

    def _continue(self, drafts: Sequence[_Draft], num_steps: int) -> list[DraftTree]:
        chunks = [Chunk(draft.sequence, draft.root, 1, 0, 0, samples=True) for draft in drafts]
        made = self._model.continue_greedily(self._builder.build_alone(chunks), num_steps=num_steps, least=LEAST)
        trees = []
        for row, draft in enumerate(drafts):
            tokens = [step[row] for step in made.token_ids]
            draft.sequence.tokens += [chosen for chosen, *_ in tokens]
            draft.sequence.num_computed = len(draft.sequence.tokens) - 1
            trees.append(_tree(tokens, [step[row] for step in made.probabilities]).cut(num_steps))
        return trees

    def _draw(self, drafts: Sequence[tuple[_Draft, Context]], max_nodes: int) -> list[DraftTree]:
        width = max(self._num_candidates, 1)
        drawn = [
            Drawn(draft.sequence, context.draws, context.num_prompt)
            for draft, context in drafts
            if context.draws is not None
        ]
        trees = draw_drafts(
            self._model,
            self._builder,
            drawn,
            num_steps=-(-max_nodes // width),
            num_candidates=self._num_candidates,
            least=LEAST,
        )
        for draft, _ in drafts:
            draft.sequence.tokens[draft.root + 1 + max_nodes :] = []
            draft.sequence.num_computed = len(draft.sequence.tokens) - 1
        return [tree.cut(max_nodes) for tree in trees]


def _tree(tokens: Sequence[Sequence[int]], probabilities: Sequence[Sequence[float]]) -> DraftTree:
    """Of each step's choices, best first: a chain of the best, and beside it the others that are likely enough."""
    chain = DraftTree.chain([best for best, *_ in tokens], [min(best, 1.0) for best, *_ in probabilities])
    beside: list[tuple[int, int, float]] = []
    path = 1.0
    for depth, ((_, *others), (best, *lesser)) in enumerate(zip(tokens, probabilities, strict=True)):
        beside += [
            (other, depth - 1, probability)
            for other, probability in zip(others, lesser, strict=True)
            if path * probability >= LEAST_RUNNER_UP
        ]
        path *= best
    return DraftTree(
        (*chain.tokens, *[token_id for token_id, _, _ in beside]),
        (*chain.parents, *[parent for _, parent, _ in beside]),
        (*chain.probabilities, *[probability for _, _, probability in beside]),
        (1,) * (len(chain) + len(beside)),
    )


def _plan(chunks: Sequence[Chunk]) -> StepPlan:
    return StepPlan(tuple(chunks), (), (), sum(chunk.num_tokens for chunk in chunks))
