"""Figures from counts: quantiles, shares, and several routers as one cluster."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.messages import EngineTotals
from protos.overview import Latency, Overview, WorkerOverview, merged

BOUNDS = (0.01, 0.02, 0.04)


@pytest.mark.parametrize(
    ("counts", "p50", "p95"),
    [
        ((0, 0, 0, 0), None, None),
        ((5, 0, 0, 0), 0.01, 0.01),  # at most the first bound
        ((0, 10, 0, 0), 0.015, 0.0195),
        ((4, 2, 4, 0), 0.015, 0.0375),
        ((1, 0, 0, 9), 0.04, 0.04),  # above them all
    ],
)
def test_quantiles_lie_within_their_buckets(counts: tuple[int, ...], p50: float | None, p95: float | None) -> None:
    figures = Latency(BOUNDS, counts).figures()
    assert (figures["p50_s"], figures["p95_s"]) == (pytest.approx(p50), pytest.approx(p95))
    assert (figures["count"], figures["floor_s"]) == (sum(counts), 0.01)


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_larger_shares_never_have_smaller_times(counts: list[int], one: float, other: float) -> None:
    latency = Latency(BOUNDS, tuple(counts))
    low, high = latency.quantile(min(one, other)), latency.quantile(max(one, other))
    assert (low is None) == (high is None) == (sum(counts) == 0)
    if low is not None and high is not None:
        assert BOUNDS[0] <= low <= high <= BOUNDS[-1]


RECENT = EngineTotals(seconds=4.0, num_steps=10, num_step_outputs=45, prompt_tokens=400, generation_tokens=80)
WINDOW = EngineTotals(
    seconds=50.0,
    prompt_tokens=5000,
    generation_tokens=900,
    prefix_queries_tokens=1000,
    prefix_hit_tokens=750,
    attention_keys=900,
    attention_read_keys=300,
    budget_tokens=200,
    budget_used_tokens=190,
    drafted_tokens=50,
    accepted_tokens=20,
)
FIRST = WorkerOverview("a", "ready", 3, 2, 100, 400, RECENT, WINDOW)
SECOND = WorkerOverview(
    "b", "draining", recent=RECENT._replace(seconds=2.0), window=WINDOW._replace(prefix_hit_tokens=0)
)


def overview(router_id: str, *workers: WorkerOverview, **fields: object) -> Overview:
    return Overview((router_id,), "tiny", workers=workers, **fields)  # type: ignore[arg-type]


def test_figures_of_one_router() -> None:
    figures = overview("r0", FIRST, SECOND, num_live=7, num_waiting=1, outcomes={"stop": 5, "Overloaded": 2}).figures()
    assert figures["generation_tokens_per_s"] == 80 / 4 + 80 / 2  # each by its own clock
    assert figures["prompt_tokens_per_s"] == 400 / 4 + 400 / 2
    assert figures["prefix_hit_rate"] == 750 / 2000
    assert (figures["sharing_factor"], figures["step_fill"], figures["draft_acceptance"]) == (3.0, 0.95, 0.4)
    assert figures["window"] == {"generation_tokens": 1800, "prompt_tokens": 10000}
    assert figures["requests"] == {"live": 7, "waiting": 1, "ended": 7, "failed": 2, "errors": {"Overloaded": 2}}
    first, second = figures["workers"]
    assert (first["worker_id"], first["state"], first["running"], first["waiting"]) == ("a", "ready", 3, 2)
    assert (first["kv_usage"], first["batch"], first["prefix_hit_rate"]) == (0.25, 4.5, 0.75)
    assert (second["kv_usage"], second["prefix_hit_rate"]) == (None, 0.0)


def test_figures_of_nothing_are_json_and_say_nothing() -> None:
    figures = json.loads(json.dumps(Overview(("r0",), "").figures()))
    assert figures["generation_tokens_per_s"] == 0
    names = ("prefix_hit_rate", "sharing_factor", "step_fill", "draft_acceptance")
    assert [figures[name] for name in names] == [None] * 4
    assert figures["time_to_first_token"]["p50_s"] is None


def test_several_routers_are_one_cluster() -> None:
    """Workers once, requests and times of all, throughput not twice."""
    seen = FIRST
    unseen = WorkerOverview("a", "connecting", window=WINDOW._replace(seconds=59.0))
    one = overview(
        "r0",
        seen,
        num_live=2,
        outcomes={"stop": 1},
        window_s=60.0,
        inter_token=Latency(BOUNDS, (1, 0, 0, 0)),
        generation_history=(1.0, 2.0),
    )
    other = overview(
        "r1",
        unseen,
        SECOND,
        num_live=3,
        outcomes={"stop": 4, "WorkerLost": 1},
        window_s=10.0,
        inter_token=Latency(BOUNDS, (0, 0, 3, 0)),
        generation_history=(2.0,),
    )
    for views in ((one, other), (other, one)):
        both = merged(views)
        assert sorted(both.router_ids) == ["r0", "r1"]
        assert both.workers == (seen, SECOND)
        assert (both.num_live, both.outcomes, both.window_s) == (5, {"stop": 5, "WorkerLost": 1}, 60.0)
        assert both.inter_token == Latency(BOUNDS, (1, 0, 3, 0))
        assert both.generation_history == (1.0, 2.0)
    assert merged((one,)).figures() == one.figures()


def test_of_routers_with_other_buckets_the_first_counts() -> None:
    one = overview("r0", inter_token=Latency(BOUNDS, (1, 2, 3, 4)))
    other = overview("r1", inter_token=Latency((1.0,), (5, 6)))
    assert merged((one, other)).inter_token == one.inter_token
