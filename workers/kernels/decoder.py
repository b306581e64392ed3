"""The native decoder: a whole step of the model in one call, on the CPU."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.protocol import KVShape, PageLayout, StepBatch
from workers.kernels.library import AttentionShape, DecoderShape, Library, NativeStep, check_shape
from workers.model.decoder import Decoder
from workers.model.layers import Layer, Linear, RMSNorm
from workers.model.scores import NUM_CHOICES, AttentionTimes, Continuations, PageMapper, Scores

# decoder.h: Weight and Norm
_Number = TypeVar("_Number", int, float)

_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN, _HEAD, _EMBEDDING = range(9)
_ATTENTION_NORM, _FEED_FORWARD_NORM, _QUERY_NORM, _KEY_NORM, _FINAL_NORM = range(5)

_ALIGNMENT = 64  # foreign_pages.h


class NativeDecoder:
    """A Model of native code, keys and values included. Mutated only by the engine that made it.

    Blocks are mapped: attention over their pages gives the bits that it gives over own pages with the same contents.
    """

    def __init__(self, library: Library, decoder: Decoder, kv: KVShape, *, max_context: int, threads: int) -> None:
        """Pack the weights of `decoder`; nothing of it is needed afterwards.

        Raises SetupError for a page size that the kernels cannot keep.
        """
        check_shape(kv)
        config = decoder.config
        attention = AttentionShape(
            kv.num_layers, kv.num_pages, kv.page_size, config.num_heads, kv.num_kv_heads, kv.head_dim
        )
        shape = DecoderShape(
            attention,
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.rms_norm_eps,
            max_context,
        )
        self._library = library
        self._vocab_size = config.vocab_size
        self._num_layers = kv.num_layers
        self._step: NativeStep | None = None  # the last one
        self._blocks: dict[int, npt.NDArray[np.uint8]] = {}  # mapped, by first page: held, lest they go away
        self._handle = library.call("decoder_new", ctypes.byref(shape), decoder.dtype == torch.bfloat16, threads)
        if self._handle is None:
            raise RuntimeError(library.error())
        weakref.finalize(self, library.call, "decoder_delete", self._handle)
        page_bytes = library.call("decoder_page_bytes", self._handle)
        self.page_layout = PageLayout.of(kv, keeper=library.build, dtype=decoder.dtype, page_bytes=page_bytes)
        self._pack(decoder, max_context)

    @property
    def kernels(self) -> str:
        """The name of the variant that runs."""
        return self._library.variant.name

    @property
    def page_mapper(self) -> PageMapper:
        return self

    def forward(self, batch: StepBatch, *, with_logits: bool, num_top_ids: int = 0) -> Scores:
        """As the protocol says; bfloat16 weights and keys, float32 in between."""
        step = self._step
        if step is None or not step.computes(batch):
            step = self._step = NativeStep(batch)
        num_rows, num_top_ids = len(batch.logit_rows), min(num_top_ids, self._vocab_size)
        logits = torch.empty(num_rows, self._vocab_size) if with_logits or num_top_ids else None
        step.struct.logits = None if logits is None else logits.data_ptr()
        self._library.check(self._library.call("decoder_forward", self._handle, ctypes.byref(step.struct)))
        top_ids = None if logits is None or not num_top_ids else self._top_ids(logits, num_top_ids)
        return Scores(step.greedy, logits, self._times(step, self._num_layers), top_ids)

    def continue_greedily(self, batch: StepBatch, *, num_steps: int, least: float) -> Continuations:
        """As the protocol says."""
        step, num_rows = NativeStep(batch), len(batch.positions)
        logits = torch.empty(num_rows, self._vocab_size)
        step.struct.logits = logits.data_ptr()
        num_chosen = num_rows * NUM_CHOICES
        room = bytes(4 * num_chosen * num_steps)
        ids, probabilities = array("i", room), array("f", room)
        addresses = [values.buffer_info()[0] for values in (ids, probabilities)]
        done = self._library.call(
            "decoder_continue", self._handle, ctypes.byref(step.struct), num_steps, least, *addresses
        )
        self._library.check(min(done, 0))
        starts = range(0, done * num_chosen, num_chosen)
        return Continuations(
            [_choices(ids[at : at + num_chosen].tolist()) for at in starts],
            [_choices(probabilities[at : at + num_chosen].tolist()) for at in starts],
        )

    def copy_page(self, source: int, target: int) -> None:
        self._library.check(self._library.call("decoder_copy_page", self._handle, source, target))

    def copy_token(self, source: int, target: int) -> None:
        self._library.check(self._library.call("decoder_copy_token", self._handle, source, target))

    def export_pages(self, pages: Sequence[int], out: memoryview) -> None:
        """As the protocol says; the block's form is that of foreign_pages.h."""
        numbers, block = array("i", pages), self._block(out, len(pages))
        assert block.flags.writeable, "a block that is only read"
        address, count = numbers.buffer_info()
        self._library.check(self._library.call("decoder_export_pages", self._handle, address, count, block.ctypes.data))

    def import_pages(self, block: memoryview, pages: Sequence[int]) -> None:
        numbers, source = array("i", pages), self._block(block, len(pages))
        address, count = numbers.buffer_info()
        self._library.check(
            self._library.call("decoder_import_pages", self._handle, source.ctypes.data, address, count)
        )

    def map_pages(self, block: memoryview, num_pages: int) -> int | None:
        """As the protocol says; the block begins at a multiple of 64 bytes."""
        mapped = self._block(block, num_pages)
        address = mapped.ctypes.data
        assert num_pages > 0, "a block without pages"
        assert address % _ALIGNMENT == 0, f"a block at {address:#x}, not a multiple of {_ALIGNMENT}"
        first: int = self._library.call("decoder_map_block", self._handle, address, num_pages)
        if first < 0:
            return None
        self._blocks[first] = mapped
        return first

    def unmap_pages(self, first: int) -> None:
        self._library.check(self._library.call("decoder_unmap_block", self._handle, first))
        del self._blocks[first]

    def rehearse(self, batch: StepBatch, *, num_times: int) -> AttentionTimes:
        """Attend as in `num_times` layers, at most as many as there are, on whatever the pages hold: to learn costs."""
        step = NativeStep(batch)
        self._library.check(self._library.call("decoder_rehearse", self._handle, ctypes.byref(step.struct), num_times))
        return self._times(step, min(num_times, self._num_layers))

    def _block(self, block: memoryview, num_pages: int) -> npt.NDArray[np.uint8]:
        expected = num_pages * self.page_layout.page_bytes
        assert block.nbytes == expected, f"a block of {block.nbytes} bytes; {num_pages} pages have {expected}"
        return np.frombuffer(block, dtype=np.uint8)

    def _top_ids(self, logits: Tensor, count: int) -> list[list[int]]:
        num_rows, size = logits.shape
        ids = array("i", bytes(4 * num_rows * count))
        address, _ = ids.buffer_info()
        self._library.call("top_ids", logits.data_ptr(), num_rows, size, count, address)
        flat = ids.tolist()
        return [flat[at : at + count] for at in range(0, len(flat), count)]

    def _times(self, step: NativeStep, num_layers: int) -> AttentionTimes:
        return AttentionTimes(step.struct.attend_s / num_layers, step.struct.merge_s / num_layers)

    def _pack(self, decoder: Decoder, max_context: int) -> None:
        self._set_weight(0, _EMBEDDING, decoder.embedding)
        self._set_weight(0, _HEAD, decoder.head.weight, decoder.head.bias)
        self._set_norm(0, _FINAL_NORM, decoder.norm.weight)
        for index, layer in enumerate(decoder.layers):
            self._pack_layer(index, layer)
        cos, sin = decoder.rope.tables(torch.arange(max_context), torch.float32)
        cos, sin = cos.contiguous(), sin.contiguous()
        self._library.call("decoder_set_rope", self._handle, cos.data_ptr(), sin.data_ptr())

    def _pack_layer(self, index: int, layer: Layer) -> None:
        projection, feed_forward = layer.projection, layer.feed_forward
        sizes = [projection.num_heads, projection.num_kv_heads, projection.num_kv_heads]
        self._set_parts(index, (_QUERY, _KEY, _VALUE), projection.linear, [n * projection.head_dim for n in sizes])
        self._set_weight(index, _OUTPUT, layer.attention_output.weight, layer.attention_output.bias)
        half = len(feed_forward.gate_up.weight) // 2
        self._set_parts(index, (_GATE, _UP), feed_forward.gate_up, [half, half])
        self._set_weight(index, _DOWN, feed_forward.down.weight, feed_forward.down.bias)
        self._set_norm(index, _ATTENTION_NORM, layer.attention_norm.weight)
        self._set_norm(index, _FEED_FORWARD_NORM, layer.feed_forward_norm.weight)
        if projection.norm is not None:
            self._set_head_norms(index, projection.norm, projection.num_heads)
        self._library.call("decoder_set_window", self._handle, index, layer.window or 0)

    def _set_head_norms(self, index: int, norm: RMSNorm, num_heads: int) -> None:
        self._set_norm(index, _QUERY_NORM, norm.weight[0])
        self._set_norm(index, _KEY_NORM, norm.weight[num_heads])

    def _set_parts(self, index: int, kinds: tuple[int, ...], linear: Linear, sizes: list[int]) -> None:
        weights = linear.weight.split(sizes)
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
        for kind, weight, bias in zip(kinds, weights, biases, strict=True):
            self._set_weight(index, kind, weight, bias)

    def _set_weight(self, index: int, kind: int, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.contiguous()
        wide = None if bias is None else bias.float().contiguous()
        address = None if wide is None else wide.data_ptr()
        self._library.call("decoder_set_weight", self._handle, index, kind, weight.data_ptr(), address)

    def _set_norm(self, index: int, kind: int, weight: Tensor) -> None:
        wide = weight.float().contiguous()
        self._library.call("decoder_set_norm", self._handle, index, kind, wide.data_ptr())


def _choices(values: list[_Number]) -> list[tuple[_Number, ...]]:
    """What one step chose, by row."""
    return [tuple(values[at : at + NUM_CHOICES]) for at in range(0, len(values), NUM_CHOICES)]
