"""Makes a step's batch: the flat stream of its chunks, side by side with whom they share keys, and their segments.

Between the scheduler, which decides what is computed, and the model, which computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from workers.attention.cost import Corrected
from workers.attention.planner import Branch, Grouping, Path, Planner, PlannerStats, predict
from workers.attention.protocol import Segment, StepBatch
from workers.kv.cache import PageTable
from workers.scheduler.sequence import Sequence as RunningSequence
from workers.scheduler.step import Chunk, StepPlan


class SharedPaths(Protocol):
    """Who shares which pages: the KV cache."""

    @property
    def version(self) -> int:
        """Grows whenever what tables share may have changed."""

    def shared_path(self, table: PageTable) -> Path:
        """The nodes that at least one other table holds too, from the root down."""


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Running totals of counted work, for one layer."""

    num_segments: int = 0
    needed_keys: int = 0  # what the sequences of all steps see, each by itself
    read_keys: int = 0  # what their segments read; less, where keys are shared


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where chunks stand in the flat stream and what they share: the same for as long as they only decode."""

    sequences: list[RunningSequence]
    version: int  # of the shared paths
    is_decoding: bool  # one row each
    grouping: Grouping
    first_rows: list[int]  # by chunk
    shares: tuple[Segment, ...]  # outer before inner
    logit_rows: Tensor  # in the order of the chunks
    predicted: tuple[float, float] | None  # seconds of one layer's segments and merges, before correction


class BatchBuilder:
    """Turns plans into batches. Mutated only by the runner that made it."""

    def __init__(
        self, planner: Planner, cost: Corrected, paths: SharedPaths, *, page_size: int, device: torch.device
    ) -> None:
        """`cost` is the planner's: it is corrected here by what steps really took."""
        self._planner = planner
        self._cost = cost
        self._paths = paths
        self._page_size = page_size
        self._device = device
        self._layout: _Layout | None = None
        self._is_observed = True  # the layout's prediction has been compared with a step
        self._work = AttentionWork()

    @property
    def work(self) -> AttentionWork:
        return self._work

    @property
    def stats(self) -> PlannerStats:
        return self._planner.stats

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan. Logit rows are in the order of the plan's chunks, whatever the order of the rows."""
        chunks = plan.chunks
        layout = self._layout_of(chunks)
        rows = _decoded_rows if layout.is_decoding else _rows
        token_ids, positions, slots = rows([chunks[index] for index in layout.grouping.order], self._page_size)
        segments = (*layout.shares, *self._own(chunks, layout))
        self._count(chunks, segments)
        return StepBatch(
            self._tensor(token_ids), self._tensor(positions), self._tensor(slots), segments, layout.logit_rows
        )

    def observe(self, segments_s: float, merges_s: float) -> None:
        """Learn what one layer of the batch took. Prompts, whose rows see ever more keys, teach nothing."""
        predicted = self._layout.predicted if self._layout else None
        if predicted is not None and not self._is_observed:
            self._cost.observe(predicted[0], segments_s, predicted[1], merges_s)
            self._is_observed = True

    def _layout_of(self, chunks: Sequence[Chunk]) -> _Layout:
        """The last layout, if the same sequences go on decoding and share what they shared; else a new one."""
        last, version = self._layout, self._paths.version
        sequences = [chunk.sequence for chunk in chunks]
        if last and last.is_decoding and last.version == version and last.sequences == sequences:
            return last
        self._layout = self._lay_out(chunks, sequences, version)
        self._is_observed = False
        return self._layout

    def _lay_out(self, chunks: Sequence[Chunk], sequences: list[RunningSequence], version: int) -> _Layout:
        branches = [
            Branch(chunk.num_tokens, chunk.stop, self._paths.shared_path(chunk.sequence.table)) for chunk in chunks
        ]
        grouping = self._planner.group(branches)
        is_decoding = all(_is_decoded(chunk) for chunk in chunks)
        predicted = predict(grouping, branches, self._cost.base, self._page_size) if is_decoding else None
        first_rows = _first_rows(chunks, grouping.order)
        wanted = [row for chunk, first in zip(chunks, first_rows, strict=True) for row in _wanted(chunk, first)]
        return _Layout(
            sequences=sequences,
            version=version,
            is_decoding=is_decoding,
            grouping=grouping,
            first_rows=first_rows,
            shares=tuple(self._shares(chunks, grouping, first_rows)),
            logit_rows=self._tensor(wanted),
            predicted=(predicted.segment_s, predicted.merge_s) if predicted else None,
        )

    def _shares(self, chunks: Sequence[Chunk], grouping: Grouping, first_rows: Sequence[int]) -> list[Segment]:
        size = self._page_size
        segments: list[Segment] = []
        for share in grouping.shares:
            members = grouping.order[share.first : share.first + share.count]
            num_rows = sum([chunks[index].num_tokens for index in members])
            pages = chunks[members[0]].sequence.table.pages
            num_keys = (share.stop_page - share.start_page) * size
            segments.append(Segment(first_rows[members[0]], num_rows, pages, share.start_page * size, num_keys, "full"))
        return segments

    def _own(self, chunks: Sequence[Chunk], layout: _Layout) -> list[Segment]:
        """What each sequence attends to alone."""
        size = self._page_size
        return [
            Segment(row, num_tokens, sequence.table.pages, own * size, start + num_tokens - own * size)
            for (sequence, start, num_tokens, *_), row, own in zip(
                chunks, layout.first_rows, layout.grouping.own_start, strict=True
            )
        ]

    def _count(self, chunks: Sequence[Chunk], segments: Sequence[Segment]) -> None:
        self._work = AttentionWork(
            self._work.num_segments + len(segments),
            self._work.needed_keys + sum([chunk.start + chunk.num_tokens for chunk in chunks]),
            self._work.read_keys + sum([segment.num_keys for segment in segments]),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._device)


def _is_decoded(chunk: Chunk) -> bool:
    """Whether the chunk is one token of which another is sampled, and nothing else."""
    return chunk.num_tokens == 1 and chunk.samples and chunk.num_scored_rows == 0


def _decoded_rows(chunks: Sequence[Chunk], page_size: int) -> tuple[list[int], list[int], list[int]]:
    """Token ids, positions and slots of chunks of one token each."""
    positions = [chunk.start for chunk in chunks]
    token_ids = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
    slots = [
        chunk.sequence.table.pages[chunk.start // page_size] * page_size + chunk.start % page_size for chunk in chunks
    ]
    return token_ids, positions, slots


def _rows(chunks: Sequence[Chunk], page_size: int) -> tuple[list[int], list[int], list[int]]:
    """Token ids, positions and slots of chunks of any length."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for chunk in chunks:
        span = range(chunk.start, chunk.stop)
        pages = chunk.sequence.table.pages
        token_ids += chunk.sequence.tokens[chunk.start : chunk.stop]
        positions += span
        slots += [pages[position // page_size] * page_size + position % page_size for position in span]
    return token_ids, positions, slots


def _first_rows(chunks: Sequence[Chunk], order: Sequence[int]) -> list[int]:
    """Each chunk's first row in the flat stream."""
    first_rows, row = [0] * len(chunks), 0
    for index in order:
        first_rows[index] = row
        row += chunks[index].num_tokens
    return first_rows


def _wanted(chunk: Chunk, first_row: int) -> list[int]:
    """Rows whose logits are wanted: prompt positions to be scored, then the sampled one."""
    last = first_row + chunk.num_tokens - 1
    if not chunk.num_scored_rows:
        return [last] if chunk.samples else []
    first = first_row + chunk.first_scored_row - chunk.start
    scored = range(first, first + chunk.num_scored_rows)
    return [*scored, last] if chunk.samples else list(scored)
