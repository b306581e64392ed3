"""Native attention in another engine: over keys and values in its memory, and in its threads."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from protos.errors import SetupError
from workers.attention.protocol import KVShape, StepBatch
from workers.kernels.library import AttentionShape, Heads, Library, NativeStep, Step, check_shape
from workers.model.scores import AttentionTimes


class PreparedStep(Protocol):
    """A step as the kernels read it, with whatever keeps its addresses alive."""

    @property
    def struct(self) -> Step: ...


class BorrowedAttention:
    """Attention whose pages others allocate, zero and copy as raw bytes. Mutated only by the engine that made it.

    A page of a layer lies in the borrower's form, whatever the lender's tensors say of it (see kv_store.h). Memory that
    was zeroed holds keys and values that are zero.
    """

    def __init__(
        self, library: Library, memory: Sequence[Tensor], *, num_heads: int, threads: int, team: int | None
    ) -> None:
        """`memory`: each layer's [pages, kv_heads, page_size, 2 * head_dim], every page in one piece.

        `team`: the address of a function that runs others in a team of threads (see crew.h); None: threads of its own.
        Raises SetupError for memory that cannot be used.
        """
        first = memory[0]
        num_pages, num_kv_heads, page_size, width = first.shape
        self.shape = KVShape(len(memory), num_pages, page_size, num_kv_heads, width // 2)
        check_shape(self.shape)
        for layer, tensor in enumerate(memory):
            _check_memory(layer, tensor, first)
        shape = AttentionShape(len(memory), num_pages, page_size, num_heads, num_kv_heads, width // 2)
        self._library = library
        self._memory = tuple(memory)  # held, lest it goes away
        self._step: PreparedStep | None = None
        addresses = (ctypes.c_void_p * len(memory))(*[tensor.data_ptr() for tensor in memory])
        page_bytes = first.stride(0) * first.element_size()
        is_bf16 = first.dtype == torch.bfloat16
        self._handle = library.call(
            "attention_borrow", ctypes.byref(shape), is_bf16, threads, addresses, page_bytes, team
        )
        if self._handle is None:
            raise SetupError(f"the kernels cannot keep keys and values in this memory: {library.error()}")
        weakref.finalize(self, library.call, "attention_delete", self._handle)

    def begin(self, step: PreparedStep) -> None:
        """Prepare a step, which is not changed until its last layer has been computed."""
        self._step = step
        self._library.check(self._library.call("attention_begin", self._handle, ctypes.byref(step.struct)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, window: int | None) -> None:
        """Store the step's keys and values, then attend, as the protocol of attention backends says.

        The tensors are [rows, heads, head_dim], a row in one piece; the lender's rows, in the order of his own.
        """
        heads = (Heads * 4)(*map(Heads.of, (query, key, value, out)))
        self._library.check(self._library.call("attention_attend", self._handle, layer, window or 0, heads))

    def rehearse(self, batch: StepBatch, *, num_times: int) -> AttentionTimes:
        """Attend as in `num_times` layers, at most as many as there are, on whatever the pages hold: to learn costs."""
        step, count = NativeStep(batch), min(num_times, self.shape.num_layers)
        self._library.check(self._library.call("attention_rehearse", self._handle, ctypes.byref(step.struct), count))
        return AttentionTimes(step.struct.attend_s / count, step.struct.merge_s / count)


def torch_team() -> int | None:
    """The function that runs others in the threads of torch's OpenMP; None where torch has none, or hides it."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _check_memory(layer: int, tensor: Tensor, first: Tensor) -> None:
    size = tensor.shape[2] * tensor.shape[3]
    if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.stride() != first.stride():
        raise SetupError(f"layer {layer} has memory for keys and values unlike that of the first: {tensor.shape}")
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise SetupError(f"keys and values are {tensor.dtype}; the native kernels keep float32 and bfloat16")
    if tensor.stride()[1:] != (size, tensor.shape[3], 1):
        raise SetupError(f"a page of layer {layer} is not in one piece: its strides are {tensor.stride()}")
    if tensor.shape[3] // 2 % 32:
        raise SetupError(
            f"head_dim is {tensor.shape[3] // 2}; in memory of others the native kernels need a multiple of 32"
        )
