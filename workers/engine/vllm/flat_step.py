"""A step of vLLM as the native kernels read it: its rows in the order in which they share, and their segments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.attention.planner import Branch, Grouping
from workers.engine.vllm.block_paths import BlockPaths, Ints
from workers.kernels.library import Step
from workers.model.batch import AttentionWork

Longs = npt.NDArray[np.int64]

_CAUSAL, _FULL = 0, 1  # segments.h
_WIDTH = 8
NULL_BLOCK = 0  # stands in a table for blocks that have left the window


@dataclass(frozen=True, slots=True)
class Requests:
    """A step's requests, each with rows that are the last of its keys. Tables may have more blocks than are used.

    The arrays do not change.
    """

    num_rows: Ints
    num_keys: Ints
    tables: Ints  # [requests, width], in one piece
    slots: Longs  # [rows], in vLLM's order: request after request

    def branches(self, block_paths: BlockPaths, page_size: int) -> list[Branch]:
        """Only blocks that were full before the step are shared, and none where some have left the window."""
        full = (self.num_keys - self.num_rows) // page_size
        full[self.tables[:, 0] == NULL_BLOCK] = 0
        paths = block_paths.of(self.tables, full)
        counts = zip(self.num_rows.tolist(), self.num_keys.tolist(), paths, strict=True)
        return [Branch(*branch) for branch in counts]


class FlatStep:
    """The arrays that `struct` points at; valid as long as it lives."""

    def __init__(self, requests: Requests, grouping: Grouping, page_size: int) -> None:
        order = np.array(grouping.order, dtype=np.int64)
        ordered = requests.num_rows[order].astype(np.int64)
        ends = ordered.cumsum()
        rows = np.arange(ends[-1])
        starts = requests.num_rows.cumsum() - requests.num_rows  # of each request's rows, in vLLM's order
        firsts = ends - ordered  # the same in ours, by place in the order
        self._places = rows + np.repeat(starts[order] - firsts, ordered)
        self._positions = rows + np.repeat(requests.num_keys[order] - ordered - firsts, ordered)
        self._slots = requests.slots[self._places]
        self._tables = requests.tables
        self._segments = _segments(requests, grouping, firsts, page_size)
        self.struct = Step(
            num_rows=len(rows),
            positions=self._positions.ctypes.data,
            slots=self._slots.ctypes.data,
            segments=self._segments.ctypes.data,
            num_segments=len(self._segments),
            places=self._places.ctypes.data,
        )

    @property
    def num_rows(self) -> int:
        return len(self._places)

    def work(self, requests: Requests) -> AttentionWork:
        """In one layer."""
        return AttentionWork(len(self._segments), int(requests.num_keys.sum()), int(self._segments[:, 4].sum()))


def _segments(requests: Requests, grouping: Grouping, firsts: Longs, page_size: int) -> Longs:
    """[segments, 8] as segments.h has them: what is shared, outer before inner, then what each request has alone."""
    num_shares, num_requests = len(grouping.shares), len(requests.tables)
    order = list(grouping.order)
    own = np.array(grouping.own_start, dtype=np.int64) * page_size
    addresses = requests.tables.ctypes.data + np.arange(num_requests) * requests.tables.strides[0]
    segments = np.zeros((num_shares + num_requests, _WIDTH), dtype=np.int64)
    alone = segments[num_shares:]
    alone[order, 0] = firsts
    alone[:, 1] = requests.num_rows
    alone[:, 2] = addresses
    alone[:, 3] = own
    alone[:, 4] = requests.num_keys - own
    alone[:, 5] = _CAUSAL
    for index, share in enumerate(grouping.shares):
        members = order[share.first : share.first + share.count]
        start, stop = share.start_page * page_size, share.stop_page * page_size
        num_rows = int(requests.num_rows[members].sum())
        segments[index, :6] = firsts[share.first], num_rows, addresses[members[0]], start, stop - start, _FULL
    return segments
