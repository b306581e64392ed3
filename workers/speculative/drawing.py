"""Continuations that a draft model draws at random, for sequences whose tokens the target draws at random.

Two ways. Verified by the walk, a token counts only if the target draws the very same: so the drafter makes the target's
own draw, the same noise over its own distribution, and the closer the distributions, the more often both agree (Daliri,
Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978).
Verified by rejection, the candidates are drawn independently, and what from is told with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.model.batch import BatchBuilder
from workers.model.draws import Purpose, draw_key, uniforms
from workers.model.rejection import draw_without_replacement
from workers.model.sampler import Row, probabilities, sample
from workers.model.scores import Model
from workers.scheduler.sequence import Sequence as RunningSequence
from workers.scheduler.step import Chunk
from workers.speculative.protocol import Draws
from workers.speculative.tree import ROOT, Distribution, DraftTree

OFFERED = 0.7  # the probability told of a candidate that is drawn first, …
REPLACED = 0.2  # … and of those after it: nothing of their tokens may show in it


@dataclass(slots=True)
class Drawn:
    """One sequence's draft while it is drawn. Mutated only by `draw_drafts`."""

    sequence: RunningSequence
    draws: Draws
    num_prompt: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    drawn_from: dict[int, Distribution] = field(default_factory=dict)
    last: int = ROOT  # the node that is gone on from
    path: float = 1.0

    @property
    def row(self) -> Row:
        return Row(self.draws.sampling, self.draws.output, self.sequence.tokens, self.num_prompt)

    def add(self, token_ids: Sequence[int], claimed: Sequence[float]) -> None:
        """Children of the last node; the first of them is the next to be gone on from."""
        parent, self.last = self.last, len(self.tokens)
        self.tokens += token_ids
        self.parents += [parent] * len(token_ids)
        self.probabilities += claimed
        self.path *= claimed[0]
        self.sequence.tokens.append(token_ids[0])

    def tree(self) -> DraftTree:
        nodes = tuple(self.tokens), tuple(self.parents), tuple(self.probabilities), (1,) * len(self.tokens)
        return DraftTree(*nodes, self.drawn_from)


def draw_drafts(
    model: Model, builder: BatchBuilder, drafts: Sequence[Drawn], *, num_steps: int, num_candidates: int, least: float
) -> list[DraftTree]:
    """A chain for each sequence, with siblings if there are several candidates; their sequences go on with it.

    `num_candidates` 0: the target's own draws, for the walk. Ends when no chain is right with probability `least`.
    """
    for _ in range(num_steps):
        chunks = [Chunk(draft.sequence, len(draft.sequence.tokens) - 1, 1, 0, 0, samples=True) for draft in drafts]
        logits = model.forward(builder.build_alone(chunks), with_logits=True).logits
        assert logits is not None, "logits were asked for"
        if num_candidates:
            _offer(drafts, logits, num_candidates)
        else:
            _foresee(drafts, logits)
        if all(draft.path < least for draft in drafts):
            break
    return [draft.tree() for draft in drafts]


def _foresee(drafts: Sequence[Drawn], logits: Tensor) -> None:
    """What the target draws, if its distribution is the drafter's."""
    chosen = sample(logits, [draft.row for draft in drafts])
    scales = torch.tensor([max(draft.draws.sampling.temperature, 1e-3) for draft in drafts])[:, None]
    claimed = (logits / scales).softmax(dim=-1)[range(len(drafts)), chosen].tolist()
    for draft, token_id, probability in zip(drafts, chosen, claimed, strict=True):
        draft.add([token_id], [min(probability, 1.0)])


def _offer(drafts: Sequence[Drawn], logits: Tensor, num_candidates: int) -> None:
    """Candidates drawn without replacement, in the order drawn."""
    shaped = probabilities(logits, [draft.row for draft in drafts]).numpy()
    for draft, q in zip(drafts, shaped, strict=True):
        row = draft.row
        key = draw_key(row.sampling.seed, row.index, row.num_output)
        candidates = draw_without_replacement(q, uniforms(key, Purpose.PROPOSE, num_candidates))
        draft.drawn_from[draft.last] = q
        draft.add(candidates, [OFFERED, *[REPLACED] * (len(candidates) - 1)])
