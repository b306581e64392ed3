"""Who shares which blocks of vLLM's cache: its block tables as paths of the planner's prefix tree."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.attention.planner import Path

Ints = npt.NDArray[np.int32]
_Prefix = tuple[int, int]  # its blocks, and the first request among some that begin with it


class BlockPaths:
    """The paths of a batch that changes little from step to step. Mutated only by the sheet that made it."""

    def __init__(self) -> None:
        self._tables = np.zeros((0, 0), dtype=np.int32)
        self._num_blocks = np.zeros(0, dtype=np.int32)
        self._paths: list[Path] = []

    def of(self, tables: Ints, num_blocks: Ints) -> list[Path]:
        """The shared paths; the last ones while the same requests go on. `tables` stay as they are.

        A block that is full only since then is shared by nobody, or by somebody whose table is new.
        """
        if not self._go_on(tables, num_blocks):
            self._tables, self._num_blocks = tables[:, : num_blocks.max(initial=0)], num_blocks
            self._paths = shared_paths(tables, num_blocks)
        return self._paths

    def _go_on(self, tables: Ints, num_blocks: Ints) -> bool:
        num_requests, width = self._tables.shape
        if len(tables) != num_requests or tables.shape[1] < width or (num_blocks < self._num_blocks).any():
            return False
        differ = tables[:, :width] != self._tables
        return not (differ & (np.arange(width) < self._num_blocks[:, None])).any()


def shared_paths(tables: Ints, num_blocks: Ints) -> list[Path]:
    """For each request the prefixes that it has in common with others, from the shortest to the longest.

    tables: [requests, width] block ids, of which a request's first num_blocks[i] count. Requests share a prefix where
    their tables begin with the same blocks. It is called by the first of them, not by its last block: that may stand
    behind different ones, as vLLM does not store twice what it has, but keeps what it has stored twice.
    """
    width = int(num_blocks.max(initial=0))
    if len(tables) < 2 or width == 0:
        return [()] * len(tables)
    sorted_tables, order = _sorted(tables[:, :width], num_blocks)
    common = _common(sorted_tables)
    paths: list[Path] = [()] * len(tables)
    if not any(common):
        return paths
    before = _shared_before(order, [0, *common])
    after = _shared_before(order[::-1], [0, *common[::-1]])[::-1]
    for request, *prefixes in zip(order, before, after, strict=True):
        paths[request] = _path(request, [*prefixes[0], *prefixes[1]])
    return paths


def _sorted(tables: Ints, num_blocks: Ints) -> tuple[Ints, list[int]]:
    """Tables in the order of their blocks, so that those that begin alike follow one another; and whose they are."""
    nobody = -1 - np.arange(len(tables))[:, None]  # another number in each table: what does not count is not shared
    counts = np.arange(tables.shape[1]) < num_blocks[:, None]
    marked = np.where(counts, tables, nobody).astype(">i4")
    names = [row.tobytes() for row in marked]
    order = sorted(range(len(tables)), key=names.__getitem__)
    return marked[order], order


def _common(tables: Ints) -> list[int]:
    """How many blocks each table but the last begins with that the next one begins with too."""
    differ = tables[1:] != tables[:-1]
    found: list[int] = np.where(differ.any(axis=1), differ.argmax(axis=1), tables.shape[1]).tolist()
    return found


def _shared_before(order: list[int], common: list[int]) -> list[list[_Prefix]]:
    """For each table the prefixes that it shares with tables before it, from the shortest to the longest.

    common[i] is what table i begins with that the one before it begins with too. With those further up it has in common
    the least number on the way.
    """
    found: list[list[_Prefix]] = [[]]
    open_: list[_Prefix] = []
    for before, number in zip(order, common[1:], strict=False):
        first = before
        while open_ and open_[-1][0] >= number:
            first = min(first, open_.pop()[1])
        if number:
            open_.append((number, first))
        found.append(open_.copy())
    return found


def _path(request: int, prefixes: list[_Prefix]) -> Path:
    """Each prefix once, called by the first of all that begin with it; whoever begins with a longer one does so too."""
    path: list[tuple[int, int]] = []
    first = request
    for end, sharer in sorted(prefixes, reverse=True):
        first = min(first, sharer)
        if path and path[-1][1] == end:
            path.pop()
        path.append((first, end))
    return tuple(reversed(path))
