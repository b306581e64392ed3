"""Attention in float64, one row at a time: what every other backend is compared with. Slow on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import assert_never

import torch
from torch import Tensor

from workers.attention.protocol import KVShape, Segment, StepBatch, check_segment


class ReferenceAttention:
    """An AttentionBackend that follows the definition word by word. Mutated only by the test that made it.

    A row's keys are those its segments let it see, one segment after another; one softmax runs over all of them. That
    is what a merge by log-sum-exp has to equal. A row that sees no key gets zeros.
    """

    def __init__(self, shape: KVShape) -> None:
        self._page_size = shape.page_size
        size = (shape.num_layers, shape.num_pages * shape.page_size, shape.num_kv_heads, shape.head_dim)
        self._keys = torch.zeros(size, dtype=torch.float64)
        self._values = torch.zeros(size, dtype=torch.float64)
        self._batch: StepBatch | None = None

    def begin(self, batch: StepBatch) -> None:
        for segment in batch.segments:
            check_segment(segment, self._page_size)
        self._batch = batch

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
        """As the protocol says; the result is float64."""
        assert self._batch is not None, "attend before begin"
        self._keys[layer, self._batch.slots] = key.double()
        self._values[layer, self._batch.slots] = value.double()
        output = torch.zeros(query.shape, dtype=torch.float64)
        for row in range(len(query)):
            output[row] = self._attend_row(layer, row, query[row].double(), window)
        return output

    def copy_page(self, source: int, target: int) -> None:
        size = self._page_size
        for store in (self._keys, self._values):
            store[:, target * size : (target + 1) * size] = store[:, source * size : (source + 1) * size]

    def copy_token(self, source: int, target: int) -> None:
        for store in (self._keys, self._values):
            store[:, target] = store[:, source]

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, each [slots, kv_heads, head_dim]."""
        return self._keys[layer], self._values[layer]

    def visible_slots(self, row: int, window: int | None) -> list[int]:
        """The slots of the keys that a row of the batch sees, segment by segment."""
        assert self._batch is not None
        positions = self._batch.positions.tolist()
        slots = []
        for segment in self._batch.segments:
            if segment.row_start <= row < segment.row_start + segment.num_rows:
                for index in _seen_keys(segment, row):
                    if window is None or _key_position(segment, index, positions) > positions[row] - window:
                        page, offset = divmod(segment.key_start + index, self._page_size)
                        slots.append(segment.pages[page] * self._page_size + offset)
        return slots

    def _attend_row(self, layer: int, row: int, query: Tensor, window: int | None) -> Tensor:
        slots = self.visible_slots(row, window)
        group = query.shape[0] // self._keys.shape[2]
        keys = self._keys[layer, slots].repeat_interleave(group, dim=1)  # [keys, heads, head_dim]
        values = self._values[layer, slots].repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,khd->hk", query, keys) * query.shape[-1] ** -0.5
        return torch.einsum("hk,khd->hd", scores.softmax(-1), values)


def _seen_keys(segment: Segment, row: int) -> Iterable[int]:
    """The indices of a segment's keys that a row of it sees, windows aside."""
    nth = row - segment.row_start
    match segment.kind:
        case "full":
            return range(segment.num_keys)
        case "causal":
            return range(segment.num_keys - segment.num_rows + 1 + nth)
        case "tree":
            if segment.num_keys == 0:
                return ()
            drafts = [j for j in range(segment.num_rows) if segment.mask[nth] >> j & 1]
            return [*range(segment.num_shared_keys), *(segment.num_shared_keys + j for j in drafts)]
        case _:
            assert_never(segment.kind)


def _key_position(segment: Segment, index: int, positions: Sequence[int]) -> int:
    """The position of a segment's key, given those of the flat stream's rows."""
    if segment.kind == "tree" and index >= segment.num_shared_keys:
        return positions[segment.row_start + index - segment.num_shared_keys]
    return segment.key_start + index
