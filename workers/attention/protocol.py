"""What a model needs of an attention backend, and the segments it is told to compute.

Stands under the model's layers: the scheduler decides which rows run, a planner turns them into segments, and a
backend computes every segment of a step, layer by layer. The backend owns the keys and values: nobody else knows
their layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

SegmentKind = Literal["causal", "full"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of the flat stream that attend to one run of keys.

    `causal`: the rows are the last of the keys, so row i sees the first num_keys - num_rows + 1 + i of them.
    `full`: every row sees every key. A row that appears in several segments gets their merge by log-sum-exp.
    """

    row_start: int
    num_rows: int
    pages: tuple[int, ...]  # the pages that hold the keys, in order
    key_start: int  # position of the first key; a multiple of the page size
    num_keys: int
    kind: SegmentKind = "causal"


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's flat stream: the rows of all sequences one after another, without padding."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, restarted per sequence
    slots: Tensor  # [tokens] int64, page * page_size + offset where the row's key and value go
    segments: tuple[Segment, ...]
    logit_rows: Tensor  # [rows] int64, the rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class KVShape:
    """The size of a backend's store of keys and values."""

    num_layers: int
    num_pages: int
    page_size: int  # tokens
    num_kv_heads: int
    head_dim: int


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
