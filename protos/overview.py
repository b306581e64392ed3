"""How a cluster has done of late: what routers tell to operators, and the figures that are shown of it.

Counts travel, not ratios, so that what several routers tell can be put together before anything is divided.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from protos.messages import EngineTotals

WorkerState = Literal["connecting", "warming", "ready", "draining", "unknown"]
GOOD_OUTCOMES = frozenset({"stop", "length", "abort", "ok", "cancelled"})  # every other one is an error's name
NOTHING = EngineTotals()


@dataclass(frozen=True, slots=True)
class Latency:
    """How often each time was observed."""

    bounds: tuple[float, ...] = ()  # upper bounds in seconds, ascending
    counts: tuple[int, ...] = ()  # one for each bound, and one above all

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The time below which this share of all lies, in seconds, as even as possible within its bucket.

        None if nothing was observed. A time in the first bucket is its bound: it is at most that; one above all bounds
        is the last bound.
        """
        rank, below = share * self.count, 0
        if not self.count:
            return None
        for at, count in enumerate(self.counts):
            if count and below + count >= rank:
                return self._within(at, (rank - below) / count)
            below += count
        return self.bounds[-1]

    def _within(self, bucket: int, share: float) -> float:
        if bucket == 0 or bucket == len(self.bounds):
            return self.bounds[min(bucket, len(self.bounds) - 1)]
        low, high = self.bounds[bucket - 1 : bucket + 1]
        return low + share * (high - low)

    def figures(self) -> dict[str, Any]:
        """Seconds; `floor_s`: figures equal to it are at most that."""
        floor_s = self.bounds[0] if self.bounds else None
        return {"p50_s": self.quantile(0.5), "p95_s": self.quantile(0.95), "count": self.count, "floor_s": floor_s}


@dataclass(frozen=True, slots=True)
class WorkerOverview:
    """How one worker has done, over all routers."""

    worker_id: str
    state: WorkerState
    num_running: int = 0  # as it last said, outputs; so are the next three
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    recent: EngineTotals = NOTHING  # within the last seconds
    window: EngineTotals = NOTHING

    def figures(self) -> dict[str, Any]:
        """What is shown of it; None: nothing happened that could tell."""
        return {
            "worker_id": self.worker_id,
            "state": self.state,
            "running": self.num_running,
            "waiting": self.num_waiting,
            "kv_usage": ratio(self.kv_used_tokens, self.kv_capacity_tokens),
            **_rates([self.recent]),
            "batch": ratio(self.recent.num_step_outputs, self.recent.num_steps),
            **_shares(self.window),
        }


@dataclass(frozen=True, slots=True)
class Overview:
    """How a cluster has done within the window: a minute, or less if the routers are younger."""

    router_ids: tuple[str, ...]  # who tells this
    model: str
    window_s: float = 0.0
    num_live: int = 0  # requests of these routers that have not ended
    num_waiting: int = 0  # of those, without a worker
    outcomes: Mapping[str, int] = field(default_factory=dict)  # calls that generate, ended within the window, by how
    time_to_first_token: Latency = Latency()
    inter_token: Latency = Latency()
    generation_history: tuple[float, ...] = ()  # tokens a second of all workers, second by second
    prompt_history: tuple[float, ...] = ()
    workers: tuple[WorkerOverview, ...] = ()

    def figures(self) -> dict[str, Any]:
        """The document that the page and `headwater top --json` show. None: nothing happened that could tell."""
        total = added([worker.window for worker in self.workers])
        errors = {name: count for name, count in self.outcomes.items() if name not in GOOD_OUTCOMES}
        return {
            "routers": list(self.router_ids),
            "model": self.model,
            "window_s": self.window_s,
            **_rates([worker.recent for worker in self.workers]),
            "history": {
                "generation_tokens_per_s": list(self.generation_history),
                "prompt_tokens_per_s": list(self.prompt_history),
            },
            "window": {"generation_tokens": total.generation_tokens, "prompt_tokens": total.prompt_tokens},
            "requests": {
                "live": self.num_live,
                "waiting": self.num_waiting,
                "ended": sum(self.outcomes.values()),
                "failed": sum(errors.values()),
                "errors": errors,
            },
            "time_to_first_token": self.time_to_first_token.figures(),
            "inter_token": self.inter_token.figures(),
            **_shares(total),
            "workers": [worker.figures() for worker in self.workers],
        }


def merged(views: Sequence[Overview]) -> Overview:
    """What several routers tell, as of one cluster. Every router tells of all workers; their requests are their own."""
    workers: dict[str, WorkerOverview] = {}
    for worker in itertools.chain.from_iterable(view.workers for view in views):
        known = workers.get(worker.worker_id)
        if known is None or _hears(known) < _hears(worker):
            workers[worker.worker_id] = worker
    longest = max(views, key=lambda view: len(view.generation_history))
    return Overview(
        router_ids=tuple(router_id for view in views for router_id in view.router_ids),
        model=next((view.model for view in views if view.model), ""),
        window_s=max(view.window_s for view in views),
        num_live=sum(view.num_live for view in views),
        num_waiting=sum(view.num_waiting for view in views),
        outcomes=sum((Counter(view.outcomes) for view in views), Counter()),
        time_to_first_token=_joined([view.time_to_first_token for view in views]),
        inter_token=_joined([view.inter_token for view in views]),
        generation_history=longest.generation_history,
        prompt_history=longest.prompt_history,
        workers=tuple(workers[worker_id] for worker_id in sorted(workers)),
    )


def added(totals: Sequence[EngineTotals]) -> EngineTotals:
    """What several engines did within the same time, in all."""
    sums = [sum(column) for column in zip(*(each[1:] for each in totals), strict=True)]
    return EngineTotals(max((each.seconds for each in totals), default=0.0), *sums)


def ratio(part: float, whole: float) -> float | None:
    """None of nothing."""
    return part / whole if whole else None


def _hears(worker: WorkerOverview) -> tuple[bool, float]:
    """More for who is connected to it, and for who has been for longer."""
    return worker.recent.seconds > 0, worker.window.seconds


def _joined(latencies: Sequence[Latency]) -> Latency:
    """Of routers of one version, which have the same bounds; others are left out."""
    bounds = latencies[0].bounds
    same = [latency.counts for latency in latencies if latency.bounds == bounds]
    return Latency(bounds, tuple(sum(column) for column in zip(*same, strict=True)))


def _rates(recent: Sequence[EngineTotals]) -> dict[str, float]:
    """Each worker by its own clock, for they are not heard at the same moment."""
    return {
        f"{kind}_tokens_per_s": sum(ratio(getattr(t, f"{kind}_tokens"), t.seconds) or 0.0 for t in recent)
        for kind in ("generation", "prompt")
    }


def _shares(totals: EngineTotals) -> dict[str, float | None]:
    return {
        "prefix_hit_rate": ratio(totals.prefix_hit_tokens, totals.prefix_queries_tokens),
        "sharing_factor": ratio(totals.attention_keys, totals.attention_read_keys),
        "step_fill": ratio(totals.budget_used_tokens, totals.budget_tokens),
        "draft_acceptance": ratio(totals.accepted_tokens, totals.drafted_tokens),
    }
