"""Makes a step's batch: the flat stream of its chunks, side by side with whom they share keys, and their segments.

Between the scheduler, which decides what is computed, and the model, which computes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from workers.attention.cost import Corrected
from workers.attention.planner import Branch, Grouping, Path, Planner, PlannerStats, Prediction, predict
from workers.attention.protocol import Segment, SegmentKind, StepBatch
from workers.attention.segments import SegmentTable
from workers.kv.cache import PageTable
from workers.model.decoding import Decoding, Place, Rows
from workers.scheduler.sequence import Sequence as RunningSequence
from workers.scheduler.step import Chunk, StepPlan


class SharedPaths(Protocol):
    """Who shares which pages: the KV cache."""

    @property
    def version(self) -> int:
        """Grows whenever what tables share may have changed."""

    def shared_path(self, table: PageTable) -> Path:
        """The nodes that at least one other table holds too, from the root down."""


class AttentionWork(NamedTuple):
    """Running totals of counted work, for one layer."""

    num_segments: int = 0
    needed_keys: int = 0  # what the sequences of all steps see, each by itself
    read_keys: int = 0  # what their segments read; less, where keys are shared

    def plus(self, step: AttentionWork) -> AttentionWork:
        return AttentionWork(
            self.num_segments + step.num_segments,
            self.needed_keys + step.needed_keys,
            self.read_keys + step.read_keys,
        )

    def one_key_more(self, num_rows: int) -> AttentionWork:
        """Of the next step, if so many rows go on decoding: each sees, and its own segment reads, one key more."""
        return AttentionWork(self.num_segments, self.needed_keys + num_rows, self.read_keys + num_rows)


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
        self._decoding: Decoding | None = None  # the last batch, if it can go on
        self._basis: tuple[list[RunningSequence], int] = [], 0  # what it was laid out for: sequences, version of paths
        self._step = AttentionWork()  # of the last batch
        self._predicted: Prediction | None = None  # of the last batch, until it is compared with a step
        self._work = AttentionWork()

    @property
    def work(self) -> AttentionWork:
        return self._work

    @property
    def stats(self) -> PlannerStats:
        return self._planner.stats

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan. Logit rows are in the order of the plan's chunks, whatever the order of the rows.

        It is valid until the next is built.
        """
        chunks = plan.chunks
        basis = [chunk.sequence for chunk in chunks], self._paths.version
        if self._decoding is not None and basis == self._basis and not plan.num_drafted:
            self._decoding.advance()
            self._step = self._step.one_key_more(len(chunks))
            batch = self._decoding.batch
        else:
            batch = self._lay_out(chunks)
            self._basis = basis
        self._work = self._work.plus(self._step)
        return batch if self._device.type == "cpu" else _moved(batch, self._device)

    def build_alone(self, chunks: Sequence[Chunk]) -> StepBatch:
        """A batch of chunks of one row each, in their order, each attending to all of its keys by itself."""
        rows = _rows(chunks, self._page_size)
        segments = [Segment(row, 1, chunk.sequence.table.pages, 0, chunk.stop) for row, chunk in enumerate(chunks)]
        batch = rows.batch(segments, torch.arange(len(chunks)))
        return batch if self._device.type == "cpu" else _moved(batch, self._device)

    def slot(self, sequence: RunningSequence, place: int) -> int:
        """Where the keys and values of a sequence's token are stored; a draft's nodes follow the last token."""
        page, offset = divmod(place, self._page_size)
        return sequence.table.pages[page] * self._page_size + offset

    def observe(self, segments_s: float, merges_s: float) -> None:
        """Learn what one layer of the batch took. Prompts, whose rows see ever more keys, teach nothing."""
        if self._predicted is not None:
            self._cost.observe(self._predicted.segment_s, segments_s, self._predicted.merge_s, merges_s)
            self._predicted = None

    def check(self) -> None:
        """The invariants of a batch that goes on, after it has been built; for tests."""
        if self._decoding is not None:
            self._decoding.check()

    def _lay_out(self, chunks: Sequence[Chunk]) -> StepBatch:
        """Decide anew where chunks stand in the flat stream and what they share."""
        branches = [
            Branch(chunk.num_tokens, chunk.stop, self._paths.shared_path(chunk.sequence.table)) for chunk in chunks
        ]
        grouping = self._planner.group(branches)
        first_rows = _first_rows(chunks, grouping.order)
        segments = [*self._shares(chunks, grouping, first_rows), *self._own(chunks, grouping, first_rows)]
        num_read = sum(segment.num_keys for segment in segments)
        self._step = AttentionWork(len(segments), sum(chunk.stop for chunk in chunks), num_read)
        rows = _rows([chunks[index] for index in grouping.order], self._page_size)
        wanted = [row for chunk, first in zip(chunks, first_rows, strict=True) for row in _wanted(chunk, first)]
        logit_rows = _int64(wanted)
        self._decoding = self._predicted = None
        if not all(map(_is_decoded, chunks)):
            return rows.batch(segments, logit_rows)
        self._predicted = predict(grouping, branches, self._cost.base, self._page_size)
        self._decoding = Decoding(
            rows,
            SegmentTable(segments),
            logit_rows,
            _places(chunks, grouping),
            num_shares=len(grouping.shares),
            page_size=self._page_size,
        )
        return self._decoding.batch

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

    def _own(self, chunks: Sequence[Chunk], grouping: Grouping, first_rows: Sequence[int]) -> list[Segment]:
        """What each sequence attends to alone."""
        size = self._page_size
        return [
            Segment(
                row, chunk.num_tokens, chunk.sequence.table.pages, own * size, chunk.stop - own * size, *_sight(chunk)
            )
            for chunk, row, own in zip(chunks, first_rows, grouping.own_start, strict=True)
        ]


def _sight(chunk: Chunk) -> tuple[SegmentKind, tuple[int, ...]]:
    """Which of the chunk's keys its rows see."""
    return ("causal", ()) if chunk.draft is None or chunk.draft.is_chain else ("tree", chunk.draft.masks)


def _is_decoded(chunk: Chunk) -> bool:
    """Whether the chunk is one token of which another is sampled, and nothing else."""
    return chunk.num_tokens == 1 and chunk.samples and chunk.num_scored_rows == 0


def _places(chunks: Sequence[Chunk], grouping: Grouping) -> list[Place]:
    """By row, for chunks of one row each: a share reads the page table of its first row's sequence."""
    segments = [[len(grouping.shares) + index] for index in grouping.order]
    for number, share in enumerate(grouping.shares):
        segments[share.first].append(number)
    return [
        Place(chunks[index].sequence, chunks[index].start, tuple(read))
        for index, read in zip(grouping.order, segments, strict=True)
    ]


def _moved(batch: StepBatch, device: torch.device) -> StepBatch:
    token_ids, positions, slots = (rows.to(device) for rows in (batch.token_ids, batch.positions, batch.slots))
    return StepBatch(token_ids, positions, slots, batch.segments, batch.logit_rows.to(device))


def _rows(chunks: Sequence[Chunk], page_size: int) -> Rows:
    """Token ids, positions and slots of chunks of any length."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for chunk in chunks:
        span = range(chunk.start, chunk.stop)
        pages = chunk.sequence.table.pages
        token_ids += chunk.sequence.tokens[chunk.start : chunk.stop]
        if chunk.draft is None:
            positions += span
        else:
            token_ids += chunk.draft.tokens
            positions += [chunk.start, *[chunk.start + depth for depth in chunk.draft.depths]]
        slots += [pages[position // page_size] * page_size + position % page_size for position in span]
    return Rows(array("q", token_ids), array("q", positions), array("q", slots))


def _int64(values: list[int]) -> torch.Tensor:
    """A tensor; for a few numbers, faster than torch.tensor."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def _first_rows(chunks: Sequence[Chunk], order: Sequence[int]) -> list[int]:
    """Each chunk's first row in the flat stream."""
    first_rows, row = [0] * len(chunks), 0
    for index in order:
        first_rows[index] = row
        row += chunks[index].num_tokens
    return first_rows


def _wanted(chunk: Chunk, first_row: int) -> list[int]:
    """Rows whose logits are wanted: prompt positions to be scored, then the sampled one; all of a draft."""
    if chunk.draft is not None:
        return list(range(first_row, first_row + chunk.num_tokens))
    last = first_row + chunk.num_tokens - 1
    if not chunk.num_scored_rows:
        return [last] if chunk.samples else []
    first = first_row + chunk.first_scored_row - chunk.start
    scored = range(first, first + chunk.num_scored_rows)
    return [*scored, last] if chunk.samples else list(scored)
