"""Steps for attention backends: sequences that grow over shuffled pages, alone or behind a shared prefix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from workers.attention.protocol import Segment, StepBatch

PAGE_SIZE = 8


@dataclass
class Prefix:
    """Positions [start, end) and the pages that hold them; both are multiples of the page size."""

    start: int
    end: int
    pages: tuple[int, ...]


@dataclass
class Grown:
    """A sequence: the prefixes it stands behind, and what it has of its own."""

    behind: tuple[Prefix, ...] = ()
    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def own_start(self) -> int:
        return self.behind[-1].end if self.behind else 0


class Script:
    """Hands out pages in random order and turns growth into batches. Mutated only by its test."""

    def __init__(self, seed: int, num_pages: int) -> None:
        self.random = random.Random(seed)
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)

    def grow(self, *growth: tuple[Grown, int]) -> StepBatch:
        """Each sequence grows by so many rows; each prefix is one `full` segment per run of rows behind it."""
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        for sequence, num_rows in growth:
            row_start = len(positions)
            for _ in range(num_rows):
                slots.append(self._slot(sequence))
                positions.append(sequence.length)
                sequence.length += 1
            start = sequence.own_start
            segments.append(Segment(row_start, num_rows, tuple(sequence.pages), start, sequence.length - start))
        segments += _shared(growth)
        self.random.shuffle(segments)
        return batch(positions, slots, segments)

    def prefix(self, *, start: int, end: int, behind: tuple[Prefix, ...] = ()) -> tuple[Prefix, StepBatch]:
        """A new prefix behind others, and the batch that computes it."""
        sequence = Grown(behind, length=start)
        step = self.grow((sequence, end - start))
        return Prefix(start, end, tuple(sequence.pages)), step

    def _slot(self, sequence: Grown) -> int:
        page, offset = divmod(sequence.length - sequence.own_start, PAGE_SIZE)
        if page == len(sequence.pages):
            sequence.pages.append(self.free.pop())
        return sequence.pages[page] * PAGE_SIZE + offset


def batch(positions: Sequence[int], slots: Sequence[int], segments: Sequence[Segment]) -> StepBatch:
    return StepBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        segments=tuple(segments),
        logit_rows=torch.arange(len(positions)),
    )


def _shared(growth: Sequence[tuple[Grown, int]]) -> list[Segment]:
    """Consecutive rows behind the same prefix, joined."""
    open_runs: list[tuple[Prefix, int, int]] = []
    segments: list[Segment] = []
    row = 0
    for sequence, num_rows in growth:
        kept = [run for run in open_runs if any(run[0] is prefix for prefix in sequence.behind)]
        segments += [_full(run) for run in open_runs if run not in kept]
        fresh = [(prefix, row, 0) for prefix in sequence.behind if not any(run[0] is prefix for run in kept)]
        open_runs = [(prefix, start, count + num_rows) for prefix, start, count in [*kept, *fresh]]
        row += num_rows
    return segments + [_full(run) for run in open_runs]


def _full(run: tuple[Prefix, int, int]) -> Segment:
    prefix, row_start, num_rows = run
    return Segment(row_start, num_rows, prefix.pages, prefix.start, prefix.end - prefix.start, "full")
