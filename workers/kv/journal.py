"""What a prefix cache has gained and lost, in names of blocks, since that was last asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Changes(NamedTuple):
    """Names of blocks that are there now and were not, and the other way round. No name is in both."""

    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


class Journal:
    """Net changes: what came and went again is not told. Mutated only by RadixTree and KVCache, or by one EventFeed.

    However long nobody takes them, there are no more than the blocks of now and those of when they were last taken.
    """

    __slots__ = ("_removed", "_stored")

    def __init__(self) -> None:
        self._stored: dict[int, None] = {}  # sets that keep the order: a block comes after the one before it
        self._removed: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._stored) + len(self._removed)

    def store(self, names: Iterable[int]) -> None:
        """These are there from now on."""
        _move(names, source=self._removed, target=self._stored)

    def remove(self, names: Iterable[int]) -> None:
        """These are there no more."""
        _move(names, source=self._stored, target=self._removed)

    def take(self) -> Changes:
        """The net changes; they are forgotten here."""
        changes = Changes(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return changes


def _move(names: Iterable[int], *, source: dict[int, None], target: dict[int, None]) -> None:
    """Strike each name out of the source; add it to the target if it was not there."""
    for name in names:
        if name in source:
            del source[name]
        else:
            target[name] = None
