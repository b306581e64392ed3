"""The native attention backend: segments on the CPU, for a decoder whose other layers are torch."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from workers.attention.protocol import KVShape, StepBatch
from workers.kernels.library import AttentionShape, Heads, Library, NativeStep, check_shape


class NativeAttention:
    """An AttentionBackend of native code. Mutated only by the engine that made it."""

    def __init__(self, library: Library, shape: KVShape, *, dtype: torch.dtype, threads: int) -> None:
        """Raises SetupError for a page size that the kernels cannot keep."""
        check_shape(shape)
        assert dtype in (torch.float32, torch.bfloat16), dtype
        self._library = library
        self._shape = shape
        self._dtype = dtype
        self._threads = threads
        self._handle: int | None = None  # until the first attend tells the number of query heads
        self._step: NativeStep | None = None
        self._has_begun = False

    def begin(self, batch: StepBatch) -> None:
        self._step = NativeStep(batch)
        self._has_begun = False

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
        """As the protocol says."""
        assert self._step is not None, "attend before begin"
        handle = self._handle or self._make(num_heads=query.shape[1])
        if not self._has_begun:
            self._library.check(self._library.call("attention_begin", handle, ctypes.byref(self._step.struct)))
            self._has_begun = True
        inputs = [tensor.contiguous() for tensor in (query, key, value)]
        assert all(tensor.dtype == self._dtype for tensor in inputs)
        output = torch.empty(query.shape, dtype=self._dtype)
        heads = (Heads * 4)(*map(Heads.of, (*inputs, output)))
        self._library.check(self._library.call("attention_attend", handle, layer, window or 0, heads))
        return output

    def copy_page(self, source: int, target: int) -> None:
        if self._handle is not None:
            self._library.check(self._library.call("attention_copy_page", self._handle, source, target))

    def copy_token(self, source: int, target: int) -> None:
        if self._handle is not None:
            self._library.check(self._library.call("attention_copy_token", self._handle, source, target))

    def _make(self, num_heads: int) -> int:
        s = self._shape
        shape = AttentionShape(s.num_layers, s.num_pages, s.page_size, num_heads, s.num_kv_heads, s.head_dim)
        handle = self._library.call("attention_new", ctypes.byref(shape), self._dtype == torch.bfloat16, self._threads)
        if handle is None:
            raise RuntimeError(self._library.error())
        weakref.finalize(self, self._library.call, "attention_delete", handle)
        self._handle = int(handle)
        return self._handle
