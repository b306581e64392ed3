"""The runner: execute() computes what the scheduler planned. It decides nothing about requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protos.messages import PositionLogprobs
from workers.model.batch import BatchBuilder
from workers.model.greedy import is_plain
from workers.model.sampler import Row, position_logprobs, sample
from workers.model.scores import Model
from workers.scheduler.step import Chunk, ChunkResults, StepPlan


class Runner:
    """A model and what it takes to feed it. Used from one thread."""

    def __init__(self, model: Model, builder: BatchBuilder, eos_token_ids: frozenset[int]) -> None:
        self._model = model
        self._builder = builder
        self._eos = eos_token_ids

    def execute(self, plan: StepPlan) -> ChunkResults:
        """Copy pages, run the flat stream, sample."""
        for copy in plan.copies:
            self._model.copy_page(copy.source, copy.target)
        scores = self._model.forward(self._builder.build(plan), with_logits=any(map(_wants_logits, plan.chunks)))
        if scores.times is not None:
            self._builder.observe(scores.times.segments_s, scores.times.merges_s)
        if scores.logits is None:
            return ChunkResults.of_tokens(_dealt(plan.chunks, scores.greedy))
        return _results(plan, scores.logits, self._eos)


def _wants_logits(chunk: Chunk) -> bool:
    """Whether the model's own greedy choice is not all that is wanted of a chunk."""
    sequence, _, _, _, num_scored_rows, samples = chunk
    return num_scored_rows > 0 or (samples and sequence.wants_logits)


def _dealt(chunks: Sequence[Chunk], token_ids: list[int]) -> Sequence[int | None]:
    """Each chunk's token, if it samples one."""
    if len(token_ids) == len(chunks):
        return token_ids
    tokens = iter(token_ids)
    return [next(tokens) if chunk.samples else None for chunk in chunks]


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
        _dealt(plan.chunks, token_ids), [next(found) if chunk.samples else None for chunk in plan.chunks], scored
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
    token_ids = sample(logits, [_row(chunk, eos_token_ids) for chunk in chunks])
    logprobs: list[PositionLogprobs | None] = [None] * len(chunks)
    asked = [i for i, chunk in enumerate(chunks) if chunk.sequence.request.sampling.logprobs is not None]
    if asked:
        num_top = [chunks[i].sequence.request.sampling.logprobs or 0 for i in asked]
        found = position_logprobs(logits[asked], [token_ids[i] for i in asked], num_top)
        for i, position in zip(asked, found, strict=True):
            logprobs[i] = position
    return token_ids, logprobs


def _row(chunk: Chunk, eos_token_ids: frozenset[int]) -> Row | None:
    sequence = chunk.sequence
    sampling = sequence.request.sampling
    if is_plain(sampling):
        return None
    too_early = sequence.num_output < sampling.min_tokens
    return Row(
        sampling=sampling,
        index=sequence.index,
        tokens=sequence.tokens,
        num_prompt=sequence.num_prompt,
        banned_ids=tuple({*eos_token_ids, *sampling.stop_token_ids}) if too_early else (),
    )
