"""What a model says of the rows asked for."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from workers.attention.protocol import StepBatch


class AttentionTimes(NamedTuple):
    """Seconds that attention took, per layer."""

    segments_s: float
    merges_s: float


class Scores(NamedTuple):
    """One step's result for its logit rows: logits, or what is wanted of them where nobody asked for more."""

    greedy: list[int]  # by row, the first of the most probable tokens; empty from a model that always gives logits
    logits: Tensor | None  # [rows, vocab] float32; None if nobody asked for them
    times: AttentionTimes | None = None  # None if they were not measured


class Model(Protocol):
    """Computes a step: a decoder together with its store of keys and values."""

    def forward(self, batch: StepBatch, *, with_logits: bool) -> Scores:
        """Store every row's keys and values; score the logit rows."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page's keys and values in every layer (copy-on-write of a partly shared page)."""
