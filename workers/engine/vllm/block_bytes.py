"""The blocks of vLLM's cache as bytes: beside its model, where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BlockBytes:
    """The blocks of vLLM's cache, each a page of bytes: one layer after another, in the order of its logical axes.

    Whatever the attention backend has put there is copied as it is.
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        """`layers`: [blocks, heads, tokens, content] each, of any strides but for the last axis."""
        self._layers = [layer.view(torch.uint8) for layer in layers]
        self._sizes = [layer[0].numel() for layer in self._layers]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def page_bytes(self) -> int:
        return sum(self._sizes)

    def read(self, block_ids: Sequence[int], out: memoryview) -> None:
        """Into memory of len(block_ids) * page_bytes bytes."""
        pages, ids = self._pages(out, len(block_ids)), self._ids(block_ids)
        for layer, part in zip(self._layers, pages.split(self._sizes, dim=1), strict=True):
            part.copy_(layer[ids].flatten(1))

    def write(self, block_ids: Sequence[int], data: memoryview) -> None:
        """From memory of len(block_ids) * page_bytes bytes."""
        pages, ids = self._pages(data, len(block_ids)), self._ids(block_ids)
        for layer, part in zip(self._layers, pages.split(self._sizes, dim=1), strict=True):
            layer[ids] = part.to(layer.device).view(len(block_ids), *layer.shape[1:])

    def _pages(self, memory: memoryview, num_pages: int) -> Tensor:
        return torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, self.page_bytes)

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, device=self._layers[0].device)
