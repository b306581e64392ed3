"""Attention in plain torch: the backend that runs wherever torch does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.attention.merge import Merge
from workers.attention.parts import Index, Part, PartBuilder
from workers.attention.protocol import KVShape, PageLayout, StepBatch, check_segment
from workers.attention.softmax import attend_with_lse


@dataclass(frozen=True, slots=True)
class _Plan:
    parts: tuple[Part, ...]
    merge: Merge


class TorchAttention:
    """An AttentionBackend of torch operations. Mutated only by the engine that made it.

    Keys and values lie slot by slot, so that consecutive pages are read in place. No slot is read beyond the keys that
    the segments name; padding is read from one slot more, which stays zero.
    """

    def __init__(self, shape: KVShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        num_slots = shape.num_pages * shape.page_size + 1
        size = (2, shape.num_layers, num_slots, shape.num_kv_heads, shape.head_dim)
        self._store = torch.zeros(size, dtype=dtype, device=device)
        num_numbers = 2 * shape.num_layers * shape.page_size * shape.num_kv_heads * shape.head_dim  # of a page
        self.page_layout = PageLayout.of(
            shape,
            keeper=f"torch-{torch.__version__}-{device.type}",
            dtype=dtype,
            page_bytes=num_numbers * dtype.itemsize,
        )
        self._batch: StepBatch | None = None
        self._plans: dict[int | None, _Plan] = {}  # of this step, by window

    def begin(self, batch: StepBatch) -> None:
        """As the protocol says; a window's plan is made once a step, by the first layer that has the window."""
        for segment in batch.segments:
            check_segment(segment, self._shape.page_size)
        self._batch = batch
        self._plans = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
        assert self._batch is not None, "attend before begin"
        keys, values = self._store[0, layer], self._store[1, layer]  # [slots, kv_heads, head_dim]
        keys.index_copy_(0, self._batch.slots, key)
        values.index_copy_(0, self._batch.slots, value)
        if window not in self._plans:
            self._plans[window] = self._make_plan(self._batch, window)
        plan = self._plans[window]
        if not plan.parts:
            return torch.zeros_like(query)
        query = query if query.stride(-1) == 1 else query.contiguous()  # the fused kernel steps by one
        pairs = [_attend_part(part, query, keys, values) for part in plan.parts]
        return plan.merge.apply([output for output, _ in pairs], [lse for _, lse in pairs])

    def copy_page(self, source: int, target: int) -> None:
        size = self._shape.page_size
        slots = self._store.narrow(2, target * size, size)
        slots.copy_(self._store.narrow(2, source * size, size))

    def copy_token(self, source: int, target: int) -> None:
        self._store.select(2, target).copy_(self._store.select(2, source))

    def export_pages(self, pages: Sequence[int], out: memoryview) -> None:
        """As the protocol says; a block is [keys and values, layers, pages, page_size, kv_heads, head_dim]."""
        assert out.nbytes == len(pages) * self.page_layout.page_bytes, (out.nbytes, len(pages))
        block = self._pages().index_select(2, self._indices(pages)).flatten().view(torch.uint8)
        np.frombuffer(out, dtype=np.uint8)[:] = block.cpu().numpy()

    def import_pages(self, block: memoryview, pages: Sequence[int]) -> None:
        assert block.nbytes == len(pages) * self.page_layout.page_bytes, (block.nbytes, len(pages))
        taken = torch.empty(block.nbytes, dtype=torch.uint8)  # torch has no views of memory that is only read
        taken.numpy()[:] = np.frombuffer(block, dtype=np.uint8)
        store, indices = self._pages(), self._indices(pages)
        size = (*store.shape[:2], len(pages), *store.shape[3:])
        store.index_copy_(2, indices, taken.view(self._dtype).view(size).to(self._device))

    def _pages(self) -> Tensor:
        """The store by pages: [keys and values, layers, pages, page_size, kv_heads, head_dim]."""
        shape, (num_kinds, num_layers, num_slots, *sizes) = self._shape, self._store.shape
        slots = self._store.narrow(2, 0, num_slots - 1)
        return slots.view(num_kinds, num_layers, shape.num_pages, shape.page_size, *sizes)

    def _indices(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(list(pages), dtype=torch.int64, device=self._device)

    def _make_plan(self, batch: StepBatch, window: int | None) -> _Plan:
        builder = PartBuilder(batch, self._shape, window=window, dtype=self._dtype, device=self._device)
        parts = builder.build()
        num_tokens = len(batch.token_ids)
        every_row = torch.arange(num_tokens, device=self._device)
        part_rows = torch.cat([every_row[:0], *(every_row[part.rows] for part in parts)]).cpu()
        return _Plan(parts, Merge.of(part_rows, num_tokens=num_tokens, device=self._device))


def _attend_part(part: Part, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The part's output [rows, heads, head_dim] and log-sum-exp [rows, heads]."""
    key, value = _blocks(keys, part.keys, part), _blocks(values, part.keys, part)
    heads = _take(query, part.rows)
    if part.is_causal or (part.mask is not None and part.mask.shape[2] > 1):
        output, lse = _attend_by_head(part, heads, key, value)
    else:
        output, lse = _attend_by_group(part, heads, key, value)
    if part.blind is not None:
        output = output.masked_fill(part.blind[..., None], 0)
        lse = lse.masked_fill(part.blind, -torch.inf)
    return output, lse


def _attend_by_head(part: Part, heads: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    query = heads.view(part.num_segments, -1, *heads.shape[1:]).transpose(1, 2)
    output, lse = attend_with_lse(query, key, value, mask=part.mask, is_causal=part.is_causal)
    return output.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _attend_by_group(part: Part, heads: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The heads that share a key head as further rows of it: one product reads the keys for all of them."""
    num_rows, num_heads, head_dim = heads.shape
    split = (part.num_segments, num_rows // part.num_segments, key.shape[1], num_heads // key.shape[1])
    query = heads.view(*split, head_dim).transpose(1, 2)  # [segments, kv_heads, rows, group, head_dim]
    output, lse = attend_with_lse(query.flatten(2, 3), key, value, mask=part.mask, is_causal=False)
    output, lse = output.view(query.shape).transpose(1, 2), lse.view(query.shape[:-1]).transpose(1, 2)
    return output.reshape(heads.shape), lse.reshape(num_rows, num_heads)


def _blocks(store: Tensor, index: Index, part: Part) -> Tensor:
    """[segments, kv_heads, keys, head_dim] of a store [slots, kv_heads, head_dim]."""
    return _take(store, index).view(part.num_segments, -1, *store.shape[1:]).transpose(1, 2)


def _take(tensor: Tensor, index: Index) -> Tensor:
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)
