"""Makes a step's batch: the flat stream of its chunks, side by side with whom they share keys, and their segments.

Between the scheduler, which decides what is computed, and the model, which computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.attention.cost import Corrected
from workers.attention.planner import Branch, Grouping, Path, Planner, PlannerStats, Prediction, predict
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
        self._grouping = Grouping((), (), ())
        self._decoding: list[RunningSequence] = []  # whom the grouping holds for while they decode token by token
        self._version = -1
        self._prediction: Prediction | None = None  # of the last grouping, until a step has shown what is true
        self._work = AttentionWork()

    @property
    def work(self) -> AttentionWork:
        return self._work

    @property
    def stats(self) -> PlannerStats:
        return self._planner.stats

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan. Logit rows are in the order of the plan's chunks, whatever the order of the rows."""
        self._group(plan.chunks)
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        first_rows = [0] * len(plan.chunks)
        for index in self._grouping.order:
            sequence, start, num_tokens = plan.chunks[index][:3]
            first_rows[index] = len(token_ids)
            if num_tokens == 1:
                token_ids.append(sequence.tokens[start])
                positions.append(start)
            else:
                token_ids += sequence.tokens[start : start + num_tokens]
                positions += range(start, start + num_tokens)
            slots += self._slots(sequence.table, start, num_tokens)
        segments = self._segments(plan.chunks, first_rows)
        self._count(plan.chunks, segments)
        return StepBatch(
            self._tensor(token_ids),
            self._tensor(positions),
            self._tensor(slots),
            segments,
            self._tensor(
                [row for chunk, first in zip(plan.chunks, first_rows, strict=True) for row in _wanted(chunk, first)]
            ),
        )

    def observe(self, segments_s: float, merges_s: float) -> None:
        """Learn what one layer of the batch took. Prompts, whose rows see ever more keys, teach nothing."""
        if self._prediction is not None:
            self._cost.observe(self._prediction.segment_s, segments_s, self._prediction.merge_s, merges_s)
            self._prediction = None

    def _group(self, chunks: Sequence[Chunk]) -> None:
        """Work the grouping out, unless the same sequences go on decoding and share what they shared."""
        version = self._paths.version
        sequences = [chunk.sequence for chunk in chunks]
        if version == self._version and sequences == self._decoding:
            return
        branches = [
            Branch(chunk.num_tokens, chunk.stop, self._paths.shared_path(chunk.sequence.table)) for chunk in chunks
        ]
        self._grouping = self._planner.group(branches)
        self._version = version
        is_decoding = all(branch.num_rows == 1 for branch in branches)
        self._decoding = sequences if is_decoding else []
        self._prediction = predict(self._grouping, branches, self._cost.base, self._page_size) if is_decoding else None

    def _slots(self, table: PageTable, start: int, num_tokens: int) -> list[int]:
        size, pages = self._page_size, table.pages
        if num_tokens == 1:
            return [pages[start // size] * size + start % size]
        return [pages[p // size] * size + p % size for p in range(start, start + num_tokens)]

    def _segments(self, chunks: Sequence[Chunk], first_rows: Sequence[int]) -> tuple[Segment, ...]:
        """The shares, outer before inner, then what each sequence attends to alone."""
        size, order = self._page_size, self._grouping.order
        segments: list[Segment] = []
        for share in self._grouping.shares:
            members = order[share.first : share.first + share.count]
            num_rows = sum([chunks[index].num_tokens for index in members])
            pages = chunks[members[0]].sequence.table.pages
            num_keys = (share.stop_page - share.start_page) * size
            segments.append(Segment(first_rows[members[0]], num_rows, pages, share.start_page * size, num_keys, "full"))
        for chunk, row, own_start in zip(chunks, first_rows, self._grouping.own_start, strict=True):
            start = own_start * size
            segments.append(Segment(row, chunk.num_tokens, chunk.sequence.table.pages, start, chunk.stop - start))
        return tuple(segments)

    def _count(self, chunks: Sequence[Chunk], segments: Sequence[Segment]) -> None:
        self._work = AttentionWork(
            self._work.num_segments + len(segments),
            self._work.needed_keys + sum([chunk.start + chunk.num_tokens for chunk in chunks]),
            self._work.read_keys + sum([segment.num_keys for segment in segments]),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _wanted(chunk: Chunk, first_row: int) -> list[int]:
    """Rows whose logits are wanted: prompt positions to be scored, then the sampled one."""
    last = first_row + chunk.num_tokens - 1
    if not chunk.num_scored_rows:
        return [last] if chunk.samples else []
    first = first_row + chunk.first_scored_row - chunk.start
    scored = range(first, first + chunk.num_scored_rows)
    return [*scored, last] if chunk.samples else list(scored)
