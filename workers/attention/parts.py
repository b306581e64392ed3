"""Parts: a step's segments made into as few attention calls as is worth while.

Between the segments, which say who sees what, and the attention calls, which want rectangles. Segments of few and
equally many rows (decodes above all) are stacked and padded; a segment of many rows gets calls of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from workers.attention.protocol import KVShape, Segment, StepBatch

STACKED_ROWS = 16  # segments of at most so many rows are stacked
CHUNK_ROWS = 256  # rows of a windowed segment that are computed together: fewer skip more keys
STACKED_BYTES = 1 << 20  # keys gathered for one call: what a core's cache holds (measured: 4 MiB is a third slower)

Index = slice | Tensor  # of the flat stream's rows, or of slots


@dataclass(frozen=True, slots=True)
class Part:
    """One attention call: `num_segments` blocks, each of equally many rows and equally many keys."""

    num_segments: int
    rows: Index  # [segments * rows]
    keys: Index  # [segments * keys], slots
    mask: Tensor | None = None  # [segments, 1, rows, keys], 0 or -inf; one row stands for all if they are equal
    blind: Tensor | None = None  # [segments * rows, 1], true where the window leaves a row no key
    is_causal: bool = False


class PartBuilder:
    """Makes the parts of one step for one window. Used once."""

    def __init__(
        self, batch: StepBatch, shape: KVShape, *, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._segments = batch.segments
        self._positions = batch.positions.to("cpu")
        self._page_size = shape.page_size
        self._zero_slot = shape.num_pages * shape.page_size  # never written: padding is read from it
        self._max_keys = STACKED_BYTES // (shape.num_kv_heads * shape.head_dim * dtype.itemsize)
        self._window = window
        self._dtype = dtype
        self._device = device

    def build(self) -> tuple[Part, ...]:
        """Parts that cover every pair of a row and a key that it sees exactly once."""
        return tuple(self._parts())

    def _parts(self) -> Iterator[Part]:
        stacks: dict[tuple[int, bool], list[Segment]] = {}
        for segment in self._segments:
            if segment.num_rows == 0 or segment.num_keys == 0:
                continue
            for piece in self._narrow(segment):
                if piece.num_rows <= STACKED_ROWS:
                    unequal = piece.num_rows > 1 and piece.kind != "full"  # its rows see different keys
                    stacks.setdefault((piece.num_rows, unequal), []).append(piece)
                elif self._is_cut(piece):
                    yield self._stacked([piece])
                else:
                    yield from self._whole(piece)
        for stack in stacks.values():
            for bucket in _buckets(stack, self._max_keys):
                yield self._stacked(bucket)

    def _narrow(self, segment: Segment) -> Iterator[Segment]:
        """The segment without the pages that no row's window reaches, in chunks of rows if that leaves out more."""
        if not self._is_cut(segment):
            yield segment
            return
        for start in range(0, segment.num_rows, CHUNK_ROWS):
            chunk = _row_chunk(segment, start, min(CHUNK_ROWS, segment.num_rows - start))
            unseen = self._first_seen(chunk, self._row_positions(chunk).min())
            skipped = unseen // self._page_size * self._page_size
            if skipped < chunk.num_keys:
                yield replace(chunk, key_start=chunk.key_start + skipped, num_keys=chunk.num_keys - skipped)

    def _is_cut(self, segment: Segment) -> bool:
        """Whether the window hides a key of the segment from one of its rows."""
        return self._window is not None and self._first_seen(segment, self._row_positions(segment).max()) > 0

    def _first_seen(self, segment: Segment, position: Tensor) -> int:
        """The index of the first key that a row at the position sees; of draft keys, the first is at the least."""
        assert self._window is not None
        return max(0, int(position) - self._window + 1 - segment.key_start)

    def _row_positions(self, segment: Segment) -> Tensor:
        return self._positions[segment.row_start : segment.row_start + segment.num_rows]

    def _whole(self, segment: Segment) -> Iterator[Part]:
        """One segment: its rows on the keys that all of them see, and on their own square of keys if there is one."""
        slots = self._slots([segment], segment.num_keys)[0]
        rows = slice(segment.row_start, segment.row_start + segment.num_rows)
        num_shared = segment.num_shared_keys
        if num_shared:
            yield Part(1, rows, self._index(slots[:num_shared]))
        match segment.kind:
            case "full":
                return
            case "causal":
                yield Part(1, rows, self._index(slots[num_shared:]), is_causal=True)
            case "tree":
                mask = self._as_mask(_ancestors(segment)[None])
                yield Part(1, rows, self._index(slots[num_shared:]), mask)
            case _:
                assert_never(segment.kind)

    def _stacked(self, segments: list[Segment]) -> Part:
        """Segments of equally many rows, padded to the keys of the longest."""
        num_rows = segments[0].num_rows
        rows = torch.tensor([segment.row_start for segment in segments])[:, None] + torch.arange(num_rows)
        width = max(segment.num_keys for segment in segments)
        visible = self._visible(segments, rows, width)  # [segments, rows, keys]
        blind = ~visible.any(-1).view(-1, 1)
        if torch.equal(visible, visible[:, :1].expand_as(visible)):
            visible = visible[:, :1]
        return Part(
            num_segments=len(segments),
            rows=self._index(rows.flatten()),
            keys=self._index(self._slots(segments, width).flatten()),
            mask=None if visible.all() else self._as_mask(visible),
            blind=blind.to(self._device) if blind.any() else None,
        )

    def _visible(self, segments: list[Segment], rows: Tensor, width: int) -> Tensor:
        """Which key each row sees, [segments, rows, width] bool."""
        num_rows, keys = rows.shape[1], torch.arange(width)
        seen = torch.tensor([[segment.num_keys] for segment in segments]).repeat(1, num_rows)
        causal = torch.tensor([segment.kind == "causal" for segment in segments])
        seen[causal] += torch.arange(1 - num_rows, 1)
        visible = keys < seen[..., None]
        positions = torch.tensor([[segment.key_start] for segment in segments]) + keys
        for index, segment in enumerate(segments):
            if segment.kind == "tree":
                drafts = slice(segment.num_shared_keys, segment.num_keys)
                visible[index, :, drafts] = _ancestors(segment)
                positions[index, drafts] = self._row_positions(segment)
        if self._window is not None:
            nearest = self._positions[rows] - self._window  # the last position too far away
            visible &= positions[:, None] > nearest[..., None]
        return visible

    def _as_mask(self, visible: Tensor) -> Tensor:
        """What is added to the scores, [segments, 1, rows, keys], for visible [segments, rows, keys]."""
        mask = torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(~visible, -torch.inf)
        return mask[:, None].to(self._device)

    def _slots(self, segments: list[Segment], width: int) -> Tensor:
        """The slot of each key, [segments, width]; the zero slot beyond a segment's keys."""
        num_pages = -(-width // self._page_size)
        pages = [self._pages_used(segment) for segment in segments]
        padded = torch.tensor([[*used, *[0] * (num_pages - len(used))] for used in pages])
        slots = padded[..., None] * self._page_size + torch.arange(self._page_size)
        num_keys = torch.tensor([[segment.num_keys] for segment in segments])
        return slots.flatten(1)[:, :width].masked_fill(torch.arange(width) >= num_keys, self._zero_slot)

    def _pages_used(self, segment: Segment) -> Sequence[int]:
        first = segment.key_start // self._page_size
        return segment.pages[first : first - -segment.num_keys // self._page_size]

    def _index(self, values: Tensor) -> Index:
        """A slice, which copies nothing, if the values are consecutive."""
        start = int(values[0])
        if torch.equal(values, torch.arange(start, start + len(values))):
            return slice(start, start + len(values))
        return values.to(self._device)


def _row_chunk(segment: Segment, start: int, num_rows: int) -> Segment:
    """`num_rows` of the segment's rows from `start`; a causal one loses the keys that only later rows see."""
    later = segment.num_rows - start - num_rows if segment.kind == "causal" else 0
    return replace(segment, row_start=segment.row_start + start, num_rows=num_rows, num_keys=segment.num_keys - later)


def _ancestors(tree: Segment) -> Tensor:
    """Which draft key each row of a tree sees, [rows, rows] bool."""
    words = bytearray(b"".join(bits.to_bytes(8, "little") for bits in tree.mask))
    bits = torch.frombuffer(words, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.view(tree.num_rows, 64)[:, : tree.num_rows].bool()


def _buckets(segments: Iterable[Segment], max_keys: int) -> Iterator[list[Segment]]:
    """Segments of similar length: padded, a bucket holds at most twice its keys, and at most max_keys if it can."""
    bucket: list[Segment] = []
    total = 0
    for segment in sorted(segments, key=lambda segment: segment.num_keys, reverse=True):
        padded = bucket[0].num_keys * (len(bucket) + 1) if bucket else 0
        if padded > min(max_keys, 2 * (total + segment.num_keys)):
            yield bucket
            bucket, total = [], 0
        bucket.append(segment)
        total += segment.num_keys
    if bucket:
        yield bucket
