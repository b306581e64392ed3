"""The native decoder: a whole step of the model in one call, on the CPU."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from typing import TypeVar

import torch
from torch import Tensor

from workers.attention.protocol import KVShape, StepBatch
from workers.kernels.library import AttentionShape, DecoderShape, Library, NativeStep, check_shape
from workers.model.decoder import Decoder
from workers.model.layers import Layer, Linear, RMSNorm
from workers.model.scores import NUM_CHOICES, AttentionTimes, Continuations, Scores

# decoder.h: Weight and Norm
_Number = TypeVar("_Number", int, float)

_QUERY, _KEY, _VALUE, _OUTPUT, _GATE, _UP, _DOWN, _HEAD, _EMBEDDING = range(9)
_ATTENTION_NORM, _FEED_FORWARD_NORM, _QUERY_NORM, _KEY_NORM, _FINAL_NORM = range(5)


class NativeDecoder:
    """A Model of native code, keys and values included. Mutated only by the engine that made it."""

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
        self._handle = library.call("decoder_new", ctypes.byref(shape), decoder.dtype == torch.bfloat16, threads)
        if self._handle is None:
            raise RuntimeError(library.error())
        weakref.finalize(self, library.call, "decoder_delete", self._handle)
        self._pack(decoder, max_context)

    @property
    def kernels(self) -> str:
        """The name of the variant that runs."""
        return self._library.variant.name

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
        self._library.call("decoder_copy_page", self._handle, source, target)

    def copy_token(self, source: int, target: int) -> None:
        self._library.call("decoder_copy_token", self._handle, source, target)

    def rehearse(self, batch: StepBatch, *, num_times: int) -> AttentionTimes:
        """Attend as in `num_times` layers, at most as many as there are, on whatever the pages hold: to learn costs."""
        step = NativeStep(batch)
        self._library.check(self._library.call("decoder_rehearse", self._handle, ctypes.byref(step.struct), num_times))
        return self._times(step, min(num_times, self._num_layers))

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
