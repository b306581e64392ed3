"""Foreign pages: numbers above the store's own, which stand for the pages of mapped blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Block:
    """A block that is mapped. Mutated only by ForeignPages."""

    num_pages: int
    num_held: int = 0


class ForeignPages:
    """Which pages of which mapped blocks the tree holds. Mutated only by KVCache.

    A block of which nothing is held any more is idle: it waits to be unmapped, which whoever has mapped it does as soon
    as no step can read it.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}  # by first page
        self._first_of: dict[int, int] = {}  # of each held page, its block's first one
        self._idle: list[int] = []

    @property
    def num_mapped(self) -> int:
        """Pages of all blocks of which anything is held: their memory stays."""
        return sum(block.num_pages for block in self._blocks.values())

    def add(self, first: int, num_pages: int, held: Iterable[int]) -> None:
        """A block has been mapped; of its pages, the tree holds these."""
        pages = list(held)
        if not pages:
            self._idle.append(first)
            return
        self._blocks[first] = _Block(num_pages, len(pages))
        self._first_of.update(dict.fromkeys(pages, first))

    def give(self, pages: Iterable[int]) -> None:
        """The tree holds these no more."""
        for page in pages:
            first = self._first_of.pop(page)
            self._blocks[first].num_held -= 1
            if not self._blocks[first].num_held:
                del self._blocks[first]
                self._idle.append(first)

    def take_idle(self) -> list[int]:
        """The first pages of blocks to unmap; each is named once."""
        idle, self._idle = self._idle, []
        return idle

    def check(self, held: Iterable[int]) -> None:
        """These are the foreign pages that the tree holds, each once, and each in its block."""
        pages = list(held)
        assert len(pages) == len(set(pages)), "a foreign page is held twice"
        assert set(pages) == self._first_of.keys(), "the tree holds other foreign pages"
        for first, block in self._blocks.items():
            inside = [page for page in pages if first <= page < first + block.num_pages]
            assert len(inside) == block.num_held > 0
            assert all(self._first_of[page] == first for page in inside)
