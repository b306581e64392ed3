"""How far our engine is ahead of the best other one, or behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import cells
from benchmarks.trial import Trial

FASTER_IS_MORE = {"e2e_tokens_per_s": True, "decode_tokens_per_s": True, "first_token_ms": False}


@dataclass(frozen=True, slots=True)
class Lead:
    """Ours against the peer that comes nearest, or is farthest ahead, on one metric of one workload."""

    workload: str
    metric: str
    peer: str
    times: float  # above 1: ours is faster by so much; median over rounds of ratios within a round


def leads(trials: Sequence[Trial], ours: str, peers: Sequence[str]) -> list[Lead]:
    """One for each workload and metric on which both ours and some peer have a round in common."""
    found: dict[tuple[str, str], list[Lead]] = {}
    for peer in peers:
        for cell in cells(trials, peer):
            if cell.arm == ours and cell.metric in FASTER_IS_MORE and cell.ratio:
                times = cell.ratio if FASTER_IS_MORE[cell.metric] else 1 / cell.ratio
                found.setdefault((cell.workload, cell.metric), []).append(Lead(cell.workload, cell.metric, peer, times))
    return [min(candidates, key=lambda lead: lead.times) for candidates in found.values()]
