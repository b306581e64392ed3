"""Free pages. The lowest layer of the KV cache: it knows numbers, not contents."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """The free pages of a store. Mutated only by KVCache."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # lowest page on top

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Remove `count` pages from the free ones; the caller has made sure that there are so many."""
        assert 0 <= count <= len(self._free), (count, len(self._free))
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: Iterable[int]) -> None:
        """Return pages that nobody holds any more."""
        self._free.extend(pages)

    def check(self, held: Iterable[int]) -> None:
        """Every page is either free or held, and by one holder only."""
        every = [*self._free, *held]
        assert len(every) == self.num_pages, f"{len(every)} pages accounted for, {self.num_pages} exist"
        assert set(every) == set(range(self.num_pages)), "a page is held twice"
