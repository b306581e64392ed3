"""What a model says of the rows asked for."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from workers.attention.protocol import PageStore, StepBatch


class AttentionTimes(NamedTuple):
    """Seconds that attention took, per layer."""

    segments_s: float
    merges_s: float


class Scores(NamedTuple):
    """One step's result for its logit rows: logits, or what is wanted of them where nobody asked for more."""

    greedy: list[int]  # by row, the first of the most probable tokens; empty from a model that always gives logits
    logits: Tensor | None  # [rows, vocab] float32; None if nobody asked for them
    times: AttentionTimes | None = None  # None if they were not measured
    top_ids: list[list[int]] | None = None  # by row, best first, if asked for


NUM_CHOICES = 2  # tokens told of each row of a continuation


class Continuations(NamedTuple):
    """What greedy steps in a row chose, and the runners-up. [steps][rows][NUM_CHOICES], the chosen token first"""

    token_ids: list[list[tuple[int, ...]]]
    probabilities: list[list[tuple[float, ...]]]  # of each token, given those chosen before


class PageMapper(Protocol):
    """Uses the pages of blocks where they lie, without a copy: further pages of a store, with numbers above its own.

    They stand in page tables like own ones, and may be copied to own ones. What would write to one, or names one that
    is gone, raises RuntimeError.
    """

    def map_pages(self, block: memoryview, num_pages: int) -> int | None:
        """The number of a block's first page; the others follow. None if there are no so many numbers left in a row.

        The block is held until it is unmapped: what it is a view of can be neither freed nor closed. Nobody may change
        it meanwhile.
        """

    def unmap_pages(self, first: int) -> None:
        """Give back the numbers of the block whose first page this is. No sequence holds one of them any more."""


class Model(PageStore, Protocol):
    """Computes a step: a decoder together with its store of keys and values."""

    @property
    def page_mapper(self) -> PageMapper | None:
        """None for a store that can only copy blocks."""

    def forward(self, batch: StepBatch, *, with_logits: bool, num_top_ids: int = 0) -> Scores:
        """Store every row's keys and values; score the logit rows, and name the most probable tokens of each."""

    def continue_greedily(self, batch: StepBatch, *, num_steps: int, least: float) -> Continuations:
        """Several steps in a row, each fed with the last one's most probable tokens; at least one.

        The batch has one row for each sequence, whose own segment has the row's number and holds all its keys; its
        pages have room for the steps. Ends early when no sequence's new tokens are all right with a probability of at
        least `least`, as the model sees it. The batch is used up.
        """

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page's keys and values in every layer (copy-on-write of a partly shared page)."""

    def copy_token(self, source: int, target: int) -> None:
        """Copy the keys and values of one slot to another in every layer (an accepted node of a draft)."""
