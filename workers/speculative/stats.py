"""What speculation counts: for metrics and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class PoolStats(NamedTuple):
    """Running totals of one worker's dealings with the pool."""

    num_drafters: int = 0  # connected now
    num_late: int = 0  # waits for a drafter that reached the deadline
    num_stale: int = 0  # drafts that do not fit what the target has said
    num_nacks: int = 0  # sequences that a drafter no longer knew
    wait_s: float = 0.0  # waited for drafts in all, seconds


class SpeculationStats(NamedTuple):
    """Running totals."""

    num_drafts: int = 0  # sequences and steps that were verified with a draft
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_depth: tuple[int, ...] = ()  # from depth 1
    drafted_by: Mapping[str, int] = {}  # by drafter; a node that several proposed counts for each
    accepted_by: Mapping[str, int] = {}
    decisions: Mapping[str, int] = {}  # steps that could have had drafts, by the drafters asked; "off": none
    pool: PoolStats | None = None  # None: no pool is used
