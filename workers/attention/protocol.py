"""What a model needs of an attention backend, and the segments it is told to compute.

Stands under the model's layers: the scheduler decides which rows run, a planner turns them into segments, and a
backend computes every segment of a step, layer by layer. The backend owns the keys and values: nobody else knows
their layout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

SegmentKind = Literal["causal", "full", "tree"]
MAX_TREE_ROWS = 64  # so that a row's mask is one machine word


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of the flat stream that attend to one run of keys of one sequence.

    The keys are num_keys positions from key_start in the page table `pages`; other entries of the table are not read,
    so a table that is longer than needed is passed as it is. It must not change until the step has been computed.

    `causal`: the rows are the last of the keys, so row i sees the first num_keys - num_rows + 1 + i of them.
    `full`: every row sees every key.
    `tree`: the rows are the last of the keys, the nodes of a draft tree (tree attention: SpecInfer, arXiv 2305.09781,
    section 4). Row i sees every key before those, and draft key j if bit j of mask[i] is set: its ancestors and itself.
    At most MAX_TREE_ROWS rows.

    A row that appears in several segments attends to the keys of all of them, as if in one; a row that sees no key gets
    zeros. A segment without rows or without keys is legal and does nothing.

    A window counts positions. A key's position is key_start + its index; but a draft key has its row's position in
    `StepBatch.positions`, because siblings share one: that of the keys before the drafts, plus one for each ancestor.
    """

    row_start: int
    num_rows: int
    pages: Sequence[int]  # a list, tuple or array: its i-th page holds positions [i * page_size, (i + 1) * page_size)
    key_start: int  # position of the first key; a multiple of the page size
    num_keys: int
    kind: SegmentKind = "causal"
    mask: tuple[int, ...] = ()  # of a tree: num_rows numbers, bit i of mask[i] always set

    @property
    def num_shared_keys(self) -> int:
        """How many of the first keys every row sees, windows aside."""
        return self.num_keys if self.kind == "full" else max(self.num_keys - self.num_rows, 0)


def check_segment(segment: Segment, page_size: int) -> None:
    """Assert that a segment is as its docstring says."""
    assert min(segment.row_start, segment.num_rows, segment.key_start, segment.num_keys) >= 0, segment
    assert segment.key_start % page_size == 0, f"key_start {segment.key_start} is within a page of {page_size}"
    if segment.num_rows == 0 or segment.num_keys == 0:
        return
    end = segment.key_start + segment.num_keys
    assert len(segment.pages) * page_size >= end, f"{len(segment.pages)} pages of {page_size} hold no {end} keys"
    assert segment.kind == "full" or segment.num_rows <= segment.num_keys, f"{segment.kind} rows without a key"
    if segment.kind == "tree":
        assert segment.num_rows <= MAX_TREE_ROWS, f"a tree of {segment.num_rows} rows"
        assert len(segment.mask) == segment.num_rows, f"{len(segment.mask)} masks for {segment.num_rows} rows"
        assert all(bits >> row & 1 for row, bits in enumerate(segment.mask)), "a row that does not see its own key"
        assert max(segment.mask) < 1 << segment.num_rows, "a mask beyond the tree"


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's flat stream: the rows of all sequences one after another, without padding.

    Its maker may move it on for the step after, so it is read only until its own step has been computed.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, restarted per sequence
    slots: Tensor  # [tokens] int64, page * page_size + offset where the row's key and value go
    segments: Collection[Segment]  # in an order that does not change
    logit_rows: Tensor  # [rows] int64, the rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class KVShape:
    """The size of a backend's store of keys and values."""

    num_layers: int
    num_pages: int
    page_size: int  # tokens
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """What two stores must agree on to exchange pages: if it is equal, so is the meaning of every byte.

    Whether the pages are those of the same model, it does not say.
    """

    keeper: str  # the code that fills pages: where it puts each number, and how it rounds
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    page_bytes: int  # of one page in a block: keys and values of all layers, with what the store pads them by

    @classmethod
    def of(cls, shape: KVShape, *, keeper: str, dtype: torch.dtype, page_bytes: int) -> PageLayout:
        name = str(dtype).removeprefix("torch.")
        return cls(keeper, name, shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.page_size, page_bytes)

    @property
    def fingerprint(self) -> str:
        """Short, and equal for equal layouts only."""
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim, self.page_size, self.page_bytes)
        return " ".join(map(str, (self.keeper, self.dtype, *sizes)))


class PageStore(Protocol):
    """Gives pages away and takes them in as blocks: one page after another of `page_layout`, in one piece of memory."""

    @property
    def page_layout(self) -> PageLayout:
        """Only stores of equal layouts may exchange blocks."""

    def export_pages(self, pages: Sequence[int], out: memoryview) -> None:
        """Copy the keys and values of pages into a block of len(pages) * page_bytes bytes."""

    def import_pages(self, block: memoryview, pages: Sequence[int]) -> None:
        """Copy a block of len(pages) pages into own ones. The block may begin anywhere, and may go away afterwards."""


class AttentionBackend(Protocol):
    """Stores keys and values in pages and attends over segments. Mutated only by the engine that made it."""

    def begin(self, batch: StepBatch) -> None:
        """Prepare one step: whatever depends on the segments but not on the layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
        """Store the step's keys and values in their slots, then attend.

        query [tokens, heads, head_dim]; key and value [tokens, kv_heads, head_dim]; returns [tokens, heads, head_dim].
        `window`: a row sees only the last `window` positions, its own included; None: all.
        Scores are scaled by head_dim ** -0.5.
        """

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page's keys and values in every layer (copy-on-write of a partly shared page)."""

    def copy_token(self, source: int, target: int) -> None:
        """Copy the keys and values of one slot to another in every layer (an accepted node of a draft)."""


class PagedAttention(AttentionBackend, PageStore, Protocol):
    """An attention backend that can exchange pages."""
