"""What one session hears of the prefix cache: everything once, then what changes.

Stands between the cache's changes, which come with every step, and the frames of a session, which may be rarer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from protos.messages import KVEvents
from workers.kv.journal import Changes, Journal

# How long changes wait for a frame that they can travel with. A message of their own costs about 0.25 ms in all: so
# they keep below a hundredth of a core. And it is a fraction of the heartbeat: they are no older than the load.
HOLD_S: Final = 0.05


class EventFeed:
    """The changes that one session has not been told. Mutated only by EngineLoop, on its thread.

    Messages are numbered by session, snapshots like all others: a receiver has missed none as long as each number is
    one above the last.
    """

    __slots__ = ("_journal", "_sequence", "_since", "_snapshot", "needs_snapshot")

    def __init__(self) -> None:
        self.needs_snapshot = True
        self._snapshot: tuple[int, ...] | None = None
        self._journal = Journal()
        self._since = 0.0  # when the first change that waits was added
        self._sequence = 0

    def add(self, changes: Changes, now: float) -> None:
        """The cache has changed, by the clock of `now` in seconds."""
        if not self._journal:
            self._since = now
        self._journal.store(changes.stored)
        self._journal.remove(changes.removed)

    def restart(self, blocks: Iterable[int]) -> None:
        """Tell everything there is, at once; changes so far are part of it."""
        self.needs_snapshot = False
        self._snapshot = tuple(blocks)
        self._journal.take()

    def take(self, now: float, *, at_once: bool) -> KVEvents | None:
        """The message that should leave now, if any; `at_once`: changes need not wait any longer."""
        if self._snapshot is not None:
            events = self._number(self._snapshot, (), is_snapshot=True)
            self._snapshot = None
            return events
        if self._journal and (at_once or now - self._since >= HOLD_S):
            return self._number(*self._journal.take(), is_snapshot=False)
        return None

    def _number(self, stored: tuple[int, ...], removed: tuple[int, ...], *, is_snapshot: bool) -> KVEvents:
        self._sequence += 1
        return KVEvents(self._sequence, stored, removed, is_snapshot)
