"""What speculation counts: for metrics and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class SpeculationStats(NamedTuple):
    """Running totals."""

    num_drafts: int = 0  # sequences and steps that were verified with a draft
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_depth: tuple[int, ...] = ()  # from depth 1
    drafted_by: Mapping[str, int] = {}  # by drafter; a node that several proposed counts for each
    accepted_by: Mapping[str, int] = {}
    decisions: Mapping[str, int] = {}  # steps that could have had drafts, by the drafters asked; "off": none
