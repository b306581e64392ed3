"""The other end of a session: what a router knows of a worker's prefix cache."""

from __future__ import annotations

from protos.messages import KVEvents


class Mirror:
    """Blocks by name, as messages told them. Refuses one that is out of order, or that cannot be true."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.num_snapshots = 0
        self._known = 0

    def receive(self, events: KVEvents) -> None:
        assert events.sequence == self._known + 1, "a message is missing or doubled"
        self._known += 1
        if events.snapshot:
            self.blocks.clear()
            self.num_snapshots += 1
        assert self.num_snapshots, "changes before a snapshot"
        assert events.snapshot or events.stored or events.removed, "a message that says nothing"
        assert self.blocks.isdisjoint(events.stored)
        assert self.blocks.issuperset(events.removed)
        self.blocks.difference_update(events.removed)
        self.blocks.update(events.stored)
