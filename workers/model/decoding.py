"""A batch that goes on: as long as the same sequences only decode, it is advanced in place instead of made anew.

That keeps the time between two steps short: it is the time in which no token is computed. A step leaves nothing of the
engine in the processor's caches, so a few lines of plain Python cost less here than one call of numpy or torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workers.attention.protocol import Segment, StepBatch
from workers.attention.segments import SegmentTable
from workers.scheduler.sequence import Sequence as RunningSequence


class Rows(NamedTuple):
    """The rows of a flat stream, as arrays of 64-bit integers."""

    token_ids: array[int]
    positions: array[int]
    slots: array[int]

    def batch(self, segments: Collection[Segment], logit_rows: Tensor) -> StepBatch:
        """A batch that sees what later becomes of the rows."""
        token_ids, positions, slots = (torch.frombuffer(values, dtype=torch.int64) for values in self)
        return StepBatch(token_ids, positions, slots, segments, logit_rows)


@dataclass(frozen=True, slots=True)
class Place:
    """One sequence's row in the flat stream, and the segments that read its page table."""

    sequence: RunningSequence
    position: int
    segments: tuple[int, ...]


class Decoding:
    """The batch of sequences that compute one token each. Mutated only by BatchBuilder.

    Each step moves every row on by one position, slot and key. Only a row that begins a page needs more: the page's
    slots, and the address of its page table, which has grown. Anything else that moves pages changes the version.
    """

    def __init__(
        self,
        rows: Rows,
        segments: SegmentTable,
        logit_rows: Tensor,
        places: Sequence[Place],
        *,
        num_shares: int,
        page_size: int,
    ) -> None:
        """`places` are by row.

        The first `num_shares` segments end before the rows, the others with them.
        """
        self.batch = rows.batch(segments, logit_rows)
        self._rows = rows
        self._segments = segments
        self._places = places
        self._sequences = [place.sequence for place in places]
        self._num_shares = num_shares
        self._page_size = page_size
        self._num_steps = 0
        self._turns: list[list[int]] = [[] for _ in range(page_size)]  # rows that begin a page, by steps from now
        for row, place in enumerate(places):
            self._turns[-place.position % page_size].append(row)

    def advance(self) -> None:
        """Move the batch on to the next step."""
        self._num_steps += 1
        token_ids, positions, slots = self._rows
        for row, sequence in enumerate(self._sequences):
            token_ids[row] = sequence.tokens[-1]
            positions[row] += 1
            slots[row] += 1
        self._segments.extend(self._num_shares)
        for row in self._turns[self._num_steps % self._page_size]:
            self._turn_page(row)

    def check(self) -> None:
        """The batch is what its sequences are about to compute."""
        size = self._page_size
        for (token_id, position, slot), sequence in zip(zip(*self._rows, strict=True), self._sequences, strict=True):
            assert position == sequence.num_computed == len(sequence.tokens) - 1
            assert token_id == sequence.tokens[position]
            assert slot == sequence.table.pages[position // size] * size + position % size
        self._segments.check()

    def _turn_page(self, row: int) -> None:
        place, size = self._places[row], self._page_size
        position = place.position + self._num_steps
        self._rows.slots[row] = place.sequence.table.pages[position // size] * size
        for index in place.segments:
            self._segments.relocate(index)
