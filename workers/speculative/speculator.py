"""Speculation around a step: drafts for what the scheduler planned, and what the drafters learn from the results.

Between the engine, which asks before and tells after each step, and the panel of drafters. It decides no token:
whatever happens here, the outputs are those of plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from workers.model.greedy import is_plain
from workers.scheduler.scheduler import takes_draft
from workers.scheduler.step import Chunk, ChunkResults, StepPlan
from workers.speculative.controller import Controller
from workers.speculative.panel import Panel
from workers.speculative.pool.client import Pool
from workers.speculative.protocol import Context, Drafter, Draws, Key, Verified
from workers.speculative.stats import SpeculationStats
from workers.speculative.tree import DraftTree


class Speculator:
    """The panel of drafters, asked about plans. Mutated only by the engine that made it."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        max_nodes: int,
        controller: Controller | None = None,
        pool: Pool | None = None,
    ) -> None:
        """`max_nodes`: of one sequence's draft; the controller admits a part of them. `pool`: if it is a drafter."""
        self._panel = Panel(drafters, max_nodes=max_nodes, controller=controller, pool=pool)
        self._learning_s = 0.0  # spent on learning from the last step: it is part of what drafting costs

    @property
    def num_top_ids(self) -> int:
        """How many of the target's most probable tokens the drafters that were asked last want of each row."""
        return self._panel.num_top_ids

    @property
    def stats(self) -> SpeculationStats:
        return self._panel.stats

    def draft(self, plan: StepPlan) -> dict[int, DraftTree] | None:
        """Drafts by number of the plan's chunks; None if the step is not to be speculated upon at all.

        Steps that compute prompts are not: they are long in any case, and would be longer.
        """
        if not _only_decodes(plan):
            self._panel.skip()
            return None
        step = _Step(plan)
        drafts = self._panel.draft(step)
        return None if drafts is None else {step.numbers[key]: draft for key, draft in drafts.items()}

    def learn(self, plan: StepPlan, results: ChunkResults, seconds: float, *, speculated: bool) -> None:
        """A step has been committed. `speculated`: drafts were asked for, though none may have been admitted."""
        if self._panel.is_resting:
            return
        if not speculated:
            self._panel.note_plain(len(plan.chunks), seconds, only_decodes=_only_decodes(plan))
            return
        began = time.perf_counter()
        verified = [_verified(chunk, number, results) for number, chunk in enumerate(plan.chunks) if chunk.samples]
        self._panel.learn(verified)
        num_tokens = sum([one.num_new for one in verified])
        self._panel.note_drafted(len(plan.chunks), plan.num_tokens, num_tokens, seconds + self._learning_s)
        self._learning_s = time.perf_counter() - began

    def forget(self, key: Key) -> None:
        """The sequence has ended."""
        self._panel.forget(key)

    def close(self) -> None:
        """End what is outside of this process. Idempotent."""
        self._panel.close()


class _Step:
    """A plan in which every sequence decodes. Lives within one call."""

    def __init__(self, plan: StepPlan) -> None:
        self._chunks = plan.chunks
        self.numbers: dict[Key, int] = {}  # of the chunks that may have a draft

    @property
    def num_sequences(self) -> int:
        return len(self._chunks)

    @property
    def has_new(self) -> bool:
        return any(chunk.sequence.num_output == 1 for chunk in self._chunks)

    @property
    def is_sampled(self) -> bool:
        return 2 * sum([not is_plain(chunk.sequence.request.sampling) for chunk in self._chunks]) > len(self._chunks)

    def contexts(self) -> list[Context]:
        contexts = {number: _context(chunk) for number, chunk in enumerate(self._chunks) if _may_draft(chunk)}
        self.numbers = {context.key: number for number, context in contexts.items()}
        return list(contexts.values())


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
        traceparent=sequence.request.traceparent,
    )


def _verified(chunk: Chunk, number: int, results: ChunkResults) -> Verified:
    walked = results.walks[number]
    num_new = len(chunk.sequence.tokens) - chunk.start - 1 if chunk.draft is not None else 1
    top_ids = results.top_ids[number] if results.top_ids else ()
    nodes = walked.nodes[: max(num_new, 0)] if walked else ()
    return Verified(_context(chunk), num_new, chunk.draft or DraftTree(), nodes, top_ids)
