"""Steps for a Model: sequences that grow over shuffled pages, side by side in one stream."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.attention.torch_backend import TorchAttention
from workers.kernels.decoder import NativeDecoder
from workers.kernels.library import Library
from workers.model.decoder import Decoder
from workers.model.scores import Model
from workers.model.torch_model import TorchModel

Growth = Mapping[str, Sequence[int]]


def kv_shape(decoder: Decoder, *, num_pages: int = 64, page_size: int = 32) -> KVShape:
    config = decoder.config
    return KVShape(config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)


def native_model(library: Library, decoder: Decoder, kv: KVShape, *, threads: int = 1) -> NativeDecoder:
    return NativeDecoder(library, decoder, kv, max_context=kv.num_pages * kv.page_size, threads=threads)


def torch_model(decoder: Decoder, kv: KVShape) -> TorchModel:
    return TorchModel(decoder, TorchAttention(kv, dtype=decoder.dtype, device=decoder.device), page_size=kv.page_size)


def random_tokens(num_tokens: int, vocab_size: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(vocab_size, (num_tokens,), generator=generator)]


class Stream:
    """Makes batches of what sequences grow by. Pages are handed out in an order that `seed` shuffles."""

    def __init__(self, kv: KVShape, *, seed: int = 0) -> None:
        self._page_size = kv.page_size
        self._free = list(range(kv.num_pages))
        random.Random(seed).shuffle(self._free)
        self._pages: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def batch(self, growth: Growth, logit_rows: Sequence[int] | None = None) -> StepBatch:
        """The sequences' new tokens, one sequence after another; all rows get logits unless some are named."""
        positions: list[int] = []
        slots: list[int] = []
        segments: list[Segment] = []
        for name, tokens in growth.items():
            start, stop = self._grow(name, len(tokens))
            pages = self._pages[name]
            segments.append(Segment(len(positions), len(tokens), tuple(pages), 0, stop))
            slots += [pages[p // self._page_size] * self._page_size + p % self._page_size for p in range(start, stop)]
            positions += range(start, stop)
        token_ids = [token for tokens in growth.values() for token in tokens]
        rows = range(len(positions)) if logit_rows is None else logit_rows
        return StepBatch(_tensor(token_ids), _tensor(positions), _tensor(slots), tuple(segments), _tensor(rows))

    def _grow(self, name: str, num_tokens: int) -> tuple[int, int]:
        start = self._lengths.get(name, 0)
        stop = self._lengths[name] = start + num_tokens
        pages = self._pages.setdefault(name, [])
        while len(pages) * self._page_size < stop:
            pages.append(self._free.pop())
        return start, stop


def logits_of(model: Model, stream: Stream, steps: Sequence[Growth]) -> dict[str, Tensor]:
    """Run the steps; the logits [tokens, vocab] of each sequence's tokens."""
    found: dict[str, list[Tensor]] = {}
    for growth in steps:
        logits = model.forward(stream.batch(growth), with_logits=True).logits
        assert logits is not None
        for name, part in zip(growth, logits.split([len(tokens) for tokens in growth.values()]), strict=True):
            found.setdefault(name, []).append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
