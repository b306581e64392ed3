"""What a drafter counts: for metrics and tests."""

from __future__ import annotations

from typing import NamedTuple


class DrafterStats(NamedTuple):
    """Running totals, and the state of now."""

    num_targets: int = 0  # channels
    num_sequences: int = 0
    num_batches: int = 0  # steps of the drafters
    num_drafts: int = 0  # sequences in them
    num_nodes: int = 0  # tokens drafted
    num_ahead: int = 0  # of the batches, those before the target had asked

    def plus(self, num_drafts: int, num_nodes: int, *, is_ahead: bool) -> DrafterStats:
        return self._replace(
            num_batches=self.num_batches + 1,
            num_drafts=self.num_drafts + num_drafts,
            num_nodes=self.num_nodes + num_nodes,
            num_ahead=self.num_ahead + is_ahead,
        )
