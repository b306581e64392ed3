"""Segments as native code reads them: rows of a table of 64-bit integers, which decoding advances in place."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Final, Literal

from workers.attention.protocol import Segment, SegmentKind

_PAGES: Final = 2  # columns that change
_NUM_KEYS: Final = 4
_WIDTH: Final = 8
_KINDS: Final[dict[SegmentKind, int]] = {"causal": 0, "full": 1, "tree": 2}


class SegmentTable:
    """A step's segments, each a row of what segments.h calls a Segment. Mutated only by its maker, between steps.

    Keeps alive what its addresses point at. An array of C ints is read where it lies, so a sequence's pages are not
    copied; `relocate` must be called for a segment whose array has grown.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._pages = [_as_array("i", segment.pages) for segment in segments]
        self._masks = [_as_array("Q", segment.mask) for segment in segments]
        rows = map(_row, segments, self._pages, self._masks)
        self._numbers = array("q", chain.from_iterable(rows))
        self.address = _address(self._numbers)

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        for segment, num_keys in zip(self._segments, self._numbers[_NUM_KEYS::_WIDTH], strict=True):
            yield replace(segment, num_keys=num_keys)

    def __contains__(self, segment: object) -> bool:
        return segment in list(self)

    def extend(self, first: int) -> None:
        """One key more for each segment from `first` on."""
        numbers = self._numbers
        for at in range(first * _WIDTH + _NUM_KEYS, len(numbers), _WIDTH):
            numbers[at] += 1

    def relocate(self, index: int) -> None:
        """A segment's array of pages has grown, and may have moved."""
        self._numbers[index * _WIDTH + _PAGES] = _address(self._pages[index])

    def check(self) -> None:
        """Every address is that of its array."""
        assert self._numbers[_PAGES::_WIDTH].tolist() == [*map(_address, self._pages)]


def _row(segment: Segment, pages: array[int], mask: array[int]) -> tuple[int, ...]:
    masks = _address(mask) if segment.kind == "tree" else 0
    kind = _KINDS[segment.kind]
    return (segment.row_start, segment.num_rows, _address(pages), segment.key_start, segment.num_keys, kind, masks, 0)


def _as_array(code: Literal["i", "Q"], values: Sequence[int]) -> array[int]:
    """An array of this type; the values themselves if they are one."""
    return values if isinstance(values, array) and values.typecode == code else array(code, values)


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]
