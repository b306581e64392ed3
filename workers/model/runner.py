"""The runner: execute() computes what the scheduler planned. It decides nothing about requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protos.messages import PositionLogprobs
from workers.model.batch import BatchBuilder
from workers.model.sampler import position_logprobs, sample
from workers.model.scores import Model, Scores
from workers.model.verifier import sampler_row, walk
from workers.scheduler.step import Chunk, ChunkResults, StepPlan, Walk


class Runner:
    """A model and what it takes to feed it. Used from one thread."""

    def __init__(self, model: Model, builder: BatchBuilder, eos_token_ids: frozenset[int]) -> None:
        self._model = model
        self._builder = builder
        self._eos = eos_token_ids

    def execute(self, plan: StepPlan, *, num_top_ids: int = 0) -> ChunkResults:
        """Copy pages, run the flat stream, sample; what was right of drafts goes where it belongs.

        With `num_top_ids`, so many of the most probable tokens of every row that chooses one are in the results too.
        """
        for copy in plan.copies:
            self._model.copy_page(copy.source, copy.target)
        scores = self._model.forward(
            self._builder.build(plan), with_logits=any(map(_wants_logits, plan.chunks)), num_top_ids=num_top_ids
        )
        if scores.times is not None:
            self._builder.observe(scores.times.segments_s, scores.times.merges_s)
        if plan.num_drafted:
            results = self._verify(plan.chunks, scores)
        elif scores.logits is None:
            results = ChunkResults.of_tokens(_dealt(plan.chunks, scores.greedy))
        else:
            results = _results(plan, scores.logits, self._eos)
        return results if scores.top_ids is None else results._replace(top_ids=_dealt_rows(plan.chunks, scores.top_ids))

    def _verify(self, chunks: Sequence[Chunk], scores: Scores) -> ChunkResults:
        """A step's results where some chunks have drafts."""
        first_rows = _first_rows(chunks)
        scored = [
            () if scores.logits is None else _score_prompt(chunk, scores.logits[row : row + chunk.num_scored_rows])
            for chunk, row in zip(chunks, first_rows, strict=True)
        ]
        token_ids: list[int | None] = [None] * len(chunks)
        logprobs: list[PositionLogprobs | None] = [None] * len(chunks)
        walks: list[Walk | None] = [None] * len(chunks)
        sampling = [number for number, chunk in enumerate(chunks) if chunk.samples]
        rows = [first_rows[number] + chunks[number].num_scored_rows for number in sampling]
        found = walk([chunks[number] for number in sampling], rows, scores, self._eos)
        for number, walked in zip(sampling, found, strict=True):
            if chunks[number].draft is None:
                token_ids[number] = walked.token_ids[0]
                logprobs[number] = walked.logprobs[0] if walked.logprobs else None
            else:
                walks[number] = walked
                self._settle(chunks[number], walked)
        return ChunkResults(token_ids, logprobs, scored, walks)

    def _settle(self, chunk: Chunk, walked: Walk) -> None:
        """Move the keys and values of accepted nodes from their places in the draft to their places in the sequence."""
        first = chunk.start + 1
        for depth, node in enumerate(walked.nodes):  # in this order none is overwritten before it has been moved
            if node != depth:
                source, target = (self._builder.slot(chunk.sequence, first + place) for place in (node, depth))
                self._model.copy_token(source, target)


def _wants_logits(chunk: Chunk) -> bool:
    """Whether the model's own greedy choice is not all that is wanted of a chunk."""
    sequence, _, _, _, num_scored_rows, samples, _ = chunk
    return num_scored_rows > 0 or (samples and sequence.wants_logits)


def _dealt(chunks: Sequence[Chunk], token_ids: list[int]) -> Sequence[int | None]:
    """Each chunk's token, if it samples one."""
    if len(token_ids) == len(chunks):
        return token_ids
    tokens = iter(token_ids)
    return [next(tokens) if chunk.samples else None for chunk in chunks]


def _num_choosing(chunk: Chunk) -> int:
    """Logit rows that choose a token."""
    if not chunk.samples:
        return 0
    return 1 if chunk.draft is None else chunk.num_tokens


def _first_rows(chunks: Sequence[Chunk]) -> list[int]:
    """Each chunk's first logit row."""
    first_rows, row = [], 0
    for chunk in chunks:
        first_rows.append(row)
        row += chunk.num_scored_rows + _num_choosing(chunk)
    return first_rows


def _dealt_rows(chunks: Sequence[Chunk], top_ids: list[list[int]]) -> list[list[list[int]]]:
    """By chunk, those of its rows that choose a token."""
    ends = [row + chunk.num_scored_rows for chunk, row in zip(chunks, _first_rows(chunks), strict=True)]
    return [top_ids[row : row + _num_choosing(chunk)] for chunk, row in zip(chunks, ends, strict=True)]


@torch.inference_mode()
def _results(plan: StepPlan, logits: Tensor, eos_token_ids: frozenset[int]) -> ChunkResults:
    """Deal the logits out to the chunks and sample those that are due."""
    scored: list[tuple[PositionLogprobs, ...]] = []
    sampled_rows: list[int] = []
    row = 0
    for chunk in plan.chunks:
        scored.append(_score_prompt(chunk, logits[row : row + chunk.num_scored_rows]))
        row += chunk.num_scored_rows
        if chunk.samples:
            sampled_rows.append(row)
            row += 1
    sampling = [chunk for chunk in plan.chunks if chunk.samples]
    is_all = len(sampled_rows) == len(logits)
    rows = logits if is_all else logits[sampled_rows]
    token_ids, logprobs = _sample(sampling, rows, eos_token_ids) if sampling else ([], [])
    found = iter(logprobs)
    return ChunkResults(
        _dealt(plan.chunks, token_ids),
        [next(found) if chunk.samples else None for chunk in plan.chunks],
        scored,
        [None] * len(plan.chunks),
    )


def _score_prompt(chunk: Chunk, logits: Tensor) -> tuple[PositionLogprobs, ...]:
    if chunk.num_scored_rows == 0:
        return ()
    first = chunk.first_scored_row + 1
    targets = chunk.sequence.tokens[first : first + chunk.num_scored_rows]
    num_top = chunk.sequence.request.sampling.prompt_logprobs or 0
    return tuple(position_logprobs(logits, targets, [num_top] * len(targets)))


def _sample(
    chunks: Sequence[Chunk], logits: Tensor, eos_token_ids: frozenset[int]
) -> tuple[list[int], list[PositionLogprobs | None]]:
    token_ids = sample(logits, [sampler_row(chunk.sequence, eos_token_ids) for chunk in chunks])
    logprobs: list[PositionLogprobs | None] = [None] * len(chunks)
    asked = [i for i, chunk in enumerate(chunks) if chunk.sequence.request.sampling.logprobs is not None]
    if asked:
        num_top = [chunks[i].sequence.request.sampling.logprobs or 0 for i in asked]
        found = position_logprobs(logits[asked], [token_ids[i] for i in asked], num_top)
        for i, position in zip(asked, found, strict=True):
            logprobs[i] = position
    return token_ids, logprobs
