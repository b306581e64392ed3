"""What shared attention costs on this machine, measured with the native kernels before they serve."""

from __future__ import annotations

from array import array
from typing import Protocol

import torch
from torch import Tensor

from workers.attention.cost import FittedCost, calibrate
from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.model.scores import AttentionTimes

BATCH_ROWS = 64  # rows measured together, as a busy step has them: so that all threads have work
LAYERS = 2  # averaged, where the model has so many


class Rehearsing(Protocol):
    """Kernels that can attend as if in a step."""

    def rehearse(self, batch: StepBatch, *, num_times: int) -> AttentionTimes:
        """Attend as in `num_times` layers, at most as many as there are, on whatever the pages hold."""


def calibrated_cost(kernels: Rehearsing, kv: KVShape) -> FittedCost:
    """Measure segments and merges; takes some tenths of a second. The store's contents are read, never changed."""
    rehearsal = _Rehearsal(kernels, kv)
    most_keys = kv.num_pages * kv.page_size
    keys = tuple(sorted({min(size, most_keys) for size in (256, 2048)}))
    return calibrate(rehearsal.segment_s, rehearsal.merge_s, keys=keys)


class _Rehearsal:
    """Steps of segments over pages taken in turn. Pages that were never written cost no memory traffic."""

    def __init__(self, kernels: Rehearsing, kv: KVShape) -> None:
        self._kernels = kernels
        self._kv = kv

    def segment_s(self, num_rows: int, num_keys: int) -> float:
        """Seconds of one layer for one of several segments like this."""
        count = max(1, min(BATCH_ROWS // num_rows, self._kv.num_pages * self._kv.page_size // num_keys))
        segments = [
            Segment(index * num_rows, num_rows, self._pages(index, num_keys), 0, num_keys, "full")
            for index in range(count)
        ]
        return self._run(segments, count * num_rows)[0] / count

    def merge_s(self, num_rows: int) -> float:
        """Seconds of one layer for merging two parts of each of so many rows."""
        page = self._pages(0, 1)
        return self._run([Segment(0, num_rows, page, 0, 1, "full")] * 2, num_rows)[1] / 2

    def _pages(self, index: int, num_keys: int) -> array[int]:
        count = -(-num_keys // self._kv.page_size)
        first = index * count % max(1, self._kv.num_pages - count + 1)
        return array("i", range(first, first + count))

    def _run(self, segments: list[Segment], num_rows: int) -> tuple[float, float]:
        zeros = _zeros(num_rows)
        batch = StepBatch(zeros, zeros, zeros, tuple(segments), _zeros(0))
        times = self._kernels.rehearse(batch, num_times=LAYERS)
        return times.segments_s, times.merges_s


def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)
