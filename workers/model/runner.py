"""The runner: execute() computes what the scheduler planned. It decides nothing and keeps nothing between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protos.messages import PositionLogprobs
from workers.attention.protocol import AttentionBackend, Segment, StepBatch
from workers.model.decoder import Decoder
from workers.model.sampler import Row, position_logprobs, sample
from workers.scheduler.step import Chunk, ChunkResult, StepPlan


class Runner:
    """A model and its attention backend. Used from one thread."""

    def __init__(self, decoder: Decoder, attention: AttentionBackend, *, page_size: int, device: torch.device) -> None:
        self._decoder = decoder
        self._attention = attention
        self._page_size = page_size
        self._device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan, eos_token_ids: frozenset[int]) -> list[ChunkResult]:
        """Copy pages, run the flat stream, sample. One result per chunk, in order."""
        for copy in plan.copies:
            self._attention.copy_page(copy.source, copy.target)
        logits = self._decoder.forward(self._batch(plan), self._attention)
        return _results(plan, logits, eos_token_ids)

    def _batch(self, plan: StepPlan) -> StepBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        logit_rows: list[int] = []
        for chunk in plan.chunks:
            first_row = len(token_ids)
            pages = chunk.sequence.table.pages
            span = range(chunk.start, chunk.stop)
            token_ids += chunk.sequence.tokens[chunk.start : chunk.stop]
            positions += span
            slots += [pages[p // self._page_size] * self._page_size + p % self._page_size for p in span]
            segments.append(self._segment(chunk, first_row))
            logit_rows += [first_row + row - chunk.start for row in _wanted_rows(chunk)]
        return StepBatch(
            self._tensor(token_ids),
            self._tensor(positions),
            self._tensor(slots),
            tuple(segments),
            self._tensor(logit_rows),
        )

    def _segment(self, chunk: Chunk, first_row: int) -> Segment:
        num_pages = -(-chunk.stop // self._page_size)
        pages = tuple(chunk.sequence.table.pages[:num_pages])
        return Segment(first_row, chunk.num_tokens, pages, key_start=0, num_keys=chunk.stop)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _wanted_rows(chunk: Chunk) -> list[int]:
    """Positions whose logits are wanted: prompt positions to be scored, then the sampled one."""
    scored = range(chunk.first_scored_row, chunk.first_scored_row + chunk.num_scored_rows)
    return [*scored, chunk.stop - 1] if chunk.samples else list(scored)


def _results(plan: StepPlan, logits: Tensor, eos_token_ids: frozenset[int]) -> list[ChunkResult]:
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
    tokens = iter(_sample(sampling, logits[sampled_rows], eos_token_ids) if sampling else ())
    return [
        ChunkResult(*next(tokens), prompt) if chunk.samples else ChunkResult(prompt_logprobs=prompt)
        for chunk, prompt in zip(plan.chunks, scored, strict=True)
    ]


def _score_prompt(chunk: Chunk, logits: Tensor) -> tuple[PositionLogprobs, ...]:
    if chunk.num_scored_rows == 0:
        return ()
    first = chunk.first_scored_row + 1
    targets = chunk.sequence.tokens[first : first + chunk.num_scored_rows]
    num_top = chunk.sequence.request.sampling.prompt_logprobs or 0
    return tuple(position_logprobs(logits, targets, [num_top] * len(targets)))


def _sample(
    chunks: Sequence[Chunk], logits: Tensor, eos_token_ids: frozenset[int]
) -> list[tuple[int, PositionLogprobs | None]]:
    token_ids = sample(logits, [_row(chunk, eos_token_ids) for chunk in chunks])
    logprobs: list[PositionLogprobs | None] = [None] * len(chunks)
    asked = [i for i, chunk in enumerate(chunks) if chunk.sequence.request.sampling.logprobs is not None]
    if asked:
        num_top = [chunks[i].sequence.request.sampling.logprobs or 0 for i in asked]
        found = position_logprobs(logits[asked], [token_ids[i] for i in asked], num_top)
        for i, position in zip(asked, found, strict=True):
            logprobs[i] = position
    return list(zip(token_ids, logprobs, strict=True))


def _row(chunk: Chunk, eos_token_ids: frozenset[int]) -> Row:
    sequence = chunk.sequence
    sampling = sequence.request.sampling
    too_early = sequence.num_output < sampling.min_tokens
    return Row(
        sampling=sampling,
        index=sequence.index,
        tokens=sequence.tokens,
        num_prompt=sequence.num_prompt,
        banned_ids=tuple({*eos_token_ids, *sampling.stop_token_ids}) if too_early else (),
    )
