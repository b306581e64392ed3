"""A built library of kernels: its functions with their types, and the structures that cross the border.

The structures repeat those of segments.h, attention.h, decoder.h, step.h and library.cpp field by field.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protos.errors import SetupError
from workers.attention.protocol import KVShape, StepBatch
from workers.attention.segments import SegmentTable
from workers.kernels.build import build
from workers.kernels.variants import VARIANTS, Variant, cpu_features, named

log = logging.getLogger(__name__)

PAGE_MULTIPLE = 32  # tokens: the columns of a panel


class AttentionShape(ctypes.Structure):
    """attention.h"""

    _fields_ = [
        (name, c_int) for name in ("num_layers", "num_pages", "page_size", "num_heads", "num_kv_heads", "head_dim")
    ]


class DecoderShape(ctypes.Structure):
    """decoder.h"""

    _fields_ = [
        ("attention", AttentionShape),
        ("vocab_size", c_int),
        ("hidden_size", c_int),
        ("intermediate_size", c_int),
        ("norm_eps", c_float),
        ("max_context", c_int),
    ]


class Step(ctypes.Structure):
    """step.h"""

    _fields_ = [
        ("num_rows", c_int),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("segments", c_void_p),
        ("num_segments", c_int),
        ("logit_rows", c_void_p),
        ("num_logit_rows", c_int),
        ("logits", c_void_p),
        ("argmax", c_void_p),
        ("attend_s", c_double),
        ("merge_s", c_double),
        ("places", c_void_p),
    ]


class Heads(ctypes.Structure):
    """library.cpp"""

    _fields_ = [("data", c_void_p), ("stride", c_long)]

    @classmethod
    def of(cls, rows: Tensor) -> Heads:
        """Of a tensor [rows, heads, head_dim] whose rows are each in one piece."""
        return cls(rows.data_ptr(), rows.stride(0))


class Library:
    """The functions of one variant. Raises SetupError where the processor or the system refuses it."""

    def __init__(self, path: Path, variant: Variant) -> None:
        self.variant = variant
        self.build = path.stem  # names the variant and the sources
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise SetupError(f"the {variant.name} kernels cannot be loaded: {error}; delete {path}") from error
        self._declare("headwater_error", c_char_p)
        self._declare("headwater_prepare", c_int)
        if self.call("prepare"):
            raise SetupError(f"the {variant.name} kernels do not run here: {self.error()}")
        self._declare("headwater_attention_new", c_void_p, POINTER(AttentionShape), c_int, c_int)
        self._declare(
            "headwater_attention_borrow",
            c_void_p,
            POINTER(AttentionShape),
            c_int,
            c_int,
            POINTER(c_void_p),
            c_long,
            c_void_p,
        )
        self._declare("headwater_attention_delete", None, c_void_p)
        self._declare("headwater_attention_begin", c_int, c_void_p, POINTER(Step))
        self._declare("headwater_attention_attend", c_int, c_void_p, c_int, c_int, POINTER(Heads))
        self._declare("headwater_attention_rehearse", c_int, c_void_p, POINTER(Step), c_int)
        self._declare("headwater_attention_copy_page", c_int, c_void_p, c_int, c_int)
        self._declare("headwater_attention_copy_token", c_int, c_void_p, c_long, c_long)
        self._declare("headwater_decoder_new", c_void_p, POINTER(DecoderShape), c_int, c_int)
        self._declare("headwater_decoder_delete", None, c_void_p)
        self._declare("headwater_decoder_set_weight", None, c_void_p, c_int, c_int, c_void_p, c_void_p)
        self._declare("headwater_decoder_set_norm", None, c_void_p, c_int, c_int, c_void_p)
        self._declare("headwater_decoder_set_window", None, c_void_p, c_int, c_int)
        self._declare("headwater_decoder_set_rope", None, c_void_p, c_void_p, c_void_p)
        self._declare("headwater_decoder_copy_page", c_int, c_void_p, c_int, c_int)
        self._declare("headwater_decoder_copy_token", c_int, c_void_p, c_long, c_long)
        self._declare("headwater_decoder_page_bytes", c_long, c_void_p)
        self._declare("headwater_decoder_export_pages", c_int, c_void_p, c_void_p, c_int, c_void_p)
        self._declare("headwater_decoder_import_pages", c_int, c_void_p, c_void_p, c_void_p, c_int)
        self._declare("headwater_decoder_map_block", c_int, c_void_p, c_void_p, c_int)
        self._declare("headwater_decoder_unmap_block", c_int, c_void_p, c_int)
        self._declare("headwater_top_ids", None, c_void_p, c_int, c_int, c_int, c_void_p)
        self._declare("headwater_decoder_forward", c_int, c_void_p, POINTER(Step))
        self._declare("headwater_decoder_continue", c_int, c_void_p, POINTER(Step), c_int, c_float, c_void_p, c_void_p)
        self._declare("headwater_decoder_rehearse", c_int, c_void_p, POINTER(Step), c_int)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call `headwater_<name>`; Python's lock is released meanwhile."""
        return getattr(self._functions, f"headwater_{name}")(*arguments)

    def check(self, status: int) -> None:
        """Raises RuntimeError for a call that returned -1."""
        if status:
            raise RuntimeError(self.error())

    def error(self) -> str:
        return str(self.call("error").decode())

    def _declare(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self._functions, name)
        function.restype, function.argtypes = result, arguments


def load(choice: str, directory: Path | None = None) -> Library:
    """Build and load a variant by name, or with "auto" the fastest that this processor has and the compiler knows.

    Raises SetupError: for "auto" if none can be had.
    """
    features = cpu_features()
    if choice != "auto":
        variant = named(choice)
        if not variant.runs_on(features):
            missing = ", ".join(sorted(variant.needs - features))
            raise SetupError(f"this processor cannot run the {choice} kernels, it lacks {missing}; choose auto")
        return Library(build(variant, directory), variant)
    reasons = []
    for variant in VARIANTS:
        if variant.runs_on(features):
            try:
                return Library(build(variant, directory), variant)
            except SetupError as error:
                reasons.append(error.message)
                log.debug("no %s kernels: %s", variant.name, error.message)
    raise SetupError(reasons[0])


def check_shape(shape: KVShape) -> None:
    """Raises SetupError for a store that the kernels cannot keep."""
    if shape.page_size % PAGE_MULTIPLE:
        raise SetupError(
            f"engine.kv.page_size is {shape.page_size}; the native kernels need a multiple of {PAGE_MULTIPLE}: "
            "change it, or set engine.kernels.variant to off"
        )


class NativeStep:
    """A StepBatch as the kernels read it. Keeps alive what its addresses point at."""

    def __init__(self, batch: StepBatch) -> None:
        """A batch whose segments are a table may move on, and this with it."""
        segments = batch.segments
        self.batch = batch
        self._table = segments if isinstance(segments, SegmentTable) else SegmentTable([*segments])
        self._greedy = array("q", bytes(8 * len(batch.logit_rows)))
        self.struct = Step(
            num_rows=len(batch.positions),
            token_ids=_address(batch.token_ids),
            positions=_address(batch.positions),
            slots=_address(batch.slots),
            segments=self._table.address,
            num_segments=len(self._table),
            logit_rows=_address(batch.logit_rows),
            num_logit_rows=len(batch.logit_rows),
            argmax=self._greedy.buffer_info()[0],
        )

    @property
    def greedy(self) -> list[int]:
        """By logit row, once the step has been computed: the first of the highest logits."""
        return self._greedy.tolist()

    def computes(self, batch: StepBatch) -> bool:
        """Whether this is the batch's native form, also after it has moved on."""
        return self.batch is batch and self._table is batch.segments


def _address(values: Tensor) -> int:
    assert values.dtype == torch.int64
    assert values.is_contiguous()
    return values.data_ptr()
