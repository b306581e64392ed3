"""The routing simulator: its traffic, its workers, and that nothing is lost between them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.benchmark import Measured, Workload
from benchmarks.route_cluster import Change, Cluster, Fleet
from benchmarks.route_traces import Arrival, Traffic, make_trace
from benchmarks.route_workers import BlockCache, Hardware, Job, Worker
from benchmarks.routing_simulator import POLICIES, SCENARIOS, Scenario, main, make_scenario, measure
from router.config import RoutingSection

SMALL = Traffic(
    seconds=3.0,
    requests_per_s=40,
    num_tenants=12,
    context_tokens=1024,
    query_tokens=200,
    output_tokens=24,
    max_tokens=40,
)
TINY = Fleet(num_workers=4, num_routers=2)


def routing(policy: str, **settings: float) -> RoutingSection:
    return RoutingSection.model_validate({"policy": policy, **settings})


def played(policy: str, traffic: Traffic, fleet: Fleet = TINY, *changes: Change, seed: int = 1) -> Cluster:
    cluster = Cluster(fleet, Hardware(kv_tokens=16_384), routing(policy))
    cluster.run(make_trace(traffic, seed), changes)
    cluster.check()
    return cluster


def small(name: str) -> Scenario:
    scenario = make_scenario(name, TINY, requests_per_s=30, seconds=3)
    return replace(scenario, traffic=replace(scenario.traffic, context_tokens=1024, query_tokens=200, output_tokens=24))


# Traffic


def test_a_trace_is_in_order_and_its_seed_decides_it() -> None:
    trace = make_trace(SMALL, 1)
    assert trace == make_trace(SMALL, 1) != make_trace(SMALL, 2)
    times = [arrival.time_s for arrival in trace]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < SMALL.seconds
    for arrival in trace:
        assert len(arrival.hashes) == arrival.num_tokens // SMALL.block_size
        assert 1 <= arrival.output_tokens <= arrival.max_tokens
        whole = (arrival.num_tokens + arrival.output_tokens) // SMALL.block_size
        assert len(arrival.hashes) + len(arrival.output_hashes) == whole


def test_the_next_turn_begins_with_all_that_was_said() -> None:
    trace = make_trace(replace(SMALL, mean_turns=4, think_s=0.3), 1)
    said = {
        (*arrival.hashes, *arrival.output_hashes)[-1]: (*arrival.hashes, *arrival.output_hashes) for arrival in trace
    }
    repeated = [arrival for arrival in trace if any(name in said for name in arrival.hashes)]
    assert len(repeated) > len(trace) / 3
    for arrival in repeated:
        before = next(said[name] for name in reversed(arrival.hashes) if name in said)
        assert arrival.hashes[: len(before)] == before


def test_popular_hot_and_bursting_contexts_are_as_frequent_as_asked() -> None:
    traffic = replace(SMALL, seconds=60, mean_turns=1.0, hot_share=0.5, num_siblings=300)
    trace = make_trace(traffic, 3)
    by_context = Counter(arrival.hashes[0] for arrival in trace)
    burst = Counter(arrival.time_s for arrival in trace)[traffic.seconds / 3]
    assert burst == 300
    (_, hot), (_, second), *rest = by_context.most_common()
    assert hot == pytest.approx(0.5 * (len(trace) - burst), rel=0.1)
    assert second == pytest.approx(300, abs=150)
    assert len(rest) == traffic.num_tenants
    assert rest[0][1] > 3 * rest[-1][1]
    queries = [arrival.hashes[-1] for arrival in trace if len(arrival.hashes) > traffic.context_tokens // 64]
    assert len(set(queries)) == len(queries) > 0.9 * len(trace)


def test_without_tenants_nothing_is_shared() -> None:
    trace = make_trace(replace(SMALL, num_tenants=0, mean_turns=1.0), 1)
    names = [name for arrival in trace for name in arrival.hashes]
    assert len(names) == len(set(names))


# Workers

chains = st.integers(0, 5).flatmap(
    lambda first: st.integers(1, 6).map(lambda size: [first * 10 + i for i in range(size)])
)


@given(st.lists(st.tuples(st.booleans(), chains, st.integers(0, 3)), max_size=40))
def test_a_cache_tells_routers_exactly_what_it_holds(operations: list[tuple[bool, list[int], int]]) -> None:
    cache = BlockCache(12)
    told: set[int] = set()
    taken: list[tuple[list[int], int]] = []
    for takes, chain, num_nameless in operations:
        if takes and cache.take(chain, num_nameless) is not None:
            taken.append((chain, num_nameless))
            cache.tell(chain)
        elif not takes and taken:
            cache.give(*taken.pop(0), finished=[1000 + len(told)])
        cache.check()
        stored, removed = cache.events()
        told = (told - set(removed)) | set(stored)
        assert told == set(cache.snapshot())
        assert {name for names, _ in taken for name in names} <= told


def test_blocks_that_are_not_used_give_way_from_their_ends() -> None:
    cache = BlockCache(6)
    for chain in ([1, 2, 3], [11, 12, 13]):
        assert cache.take(chain, 0) == 0
        cache.give(chain, 0, ())
    assert cache.take([21], 0) == 0
    assert cache.take([1, 2, 3], 0) == 2
    assert cache.take([31, 32, 33], 0) is None


def test_a_step_takes_as_long_as_what_it_computes_and_reads() -> None:
    hardware = Hardware(step_s=0.01, prefill_tokens_per_s=1000, row_s=0.001, key_s=1e-5, step_tokens=512)
    worker = Worker("w", hardware)
    job = Job(Arrival(0.0, tuple(range(1, 13)), 800, 8, 3), 0)
    worker.submit(job)
    assert worker.load.pending_prefill_tokens == 800
    assert worker.begin() == pytest.approx(0.01 + 0.512)
    assert not worker.commit().begun
    assert worker.load.pending_prefill_tokens == 288
    assert worker.begin() == pytest.approx(0.01 + 0.288)
    assert worker.commit().begun == [job]
    assert worker.begin() == pytest.approx(0.01 + 0.001 + 12 * 64 * 1e-5)
    assert worker.commit().ended == []
    assert worker.begin() == pytest.approx(0.01 + 0.001 + (12 * 64 + 1) * 1e-5)
    assert worker.commit().ended == [job]
    assert not worker.jobs
    assert worker.load.kv_used_tokens == 0


def test_siblings_compute_their_prefix_once_and_read_it_once() -> None:
    def steps(hardware: Hardware) -> tuple[float, float]:
        worker = Worker("w", hardware)
        for number in range(4):
            worker.submit(Job(Arrival(0.0, (*range(1, 21), 100 + number), 21 * 64, 8, 3), 0))
        prefill_s = worker.begin()
        assert len(worker.commit().begun) == 4
        return prefill_s, worker.begin()

    hardware = Hardware(step_s=0.0, prefill_tokens_per_s=1000, row_s=0.0, key_s=1e-5, step_tokens=4096)
    last = 1  # the last token of a prompt is computed whatever is cached
    assert steps(hardware) == pytest.approx(((21 + 3) * 64 / 1000, (20 + 4) * 64 * 1e-5))
    assert steps(replace(hardware, shares_attention=False))[1] == pytest.approx(4 * 21 * 64 * 1e-5)
    again = Worker("w", hardware)
    for _ in range(2):
        again.submit(Job(Arrival(0.0, (1, 2), 128, 8, 1), 0))
    assert again.begin() == pytest.approx((128 + last) / 1000)


def test_a_lost_worker_tells_how_far_everyone_was() -> None:
    worker = Worker("w", Hardware())
    job, other = Job(Arrival(0.0, (1,), 70, 40, 30), 0), Job(Arrival(0.0, (2,), 4000, 40, 30), 0)
    worker.submit(job)
    worker.submit(other)
    for _ in range(6):
        worker.begin()
        worker.commit()
    assert worker.lose() == [job, other]
    assert job.done_tokens == 6
    assert 0 < other.done_tokens < 6


# Clusters


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_request_ends_or_is_refused(name: str, policy: str) -> None:
    scenario = small(name)
    trace = make_trace(scenario.traffic, 5)
    cluster = Cluster(scenario.fleet, Hardware(kv_tokens=16_384), routing(policy))
    tally = cluster.run(trace, scenario.changes)
    cluster.check()
    assert tally.num_ended + tally.num_refused == len(trace)
    assert tally.num_refused == 0
    assert len(tally.ttft_s) == tally.num_ended
    assert tally.output_tokens == sum(arrival.output_tokens for arrival in trace)
    assert tally.reasons.total() == len(trace) + tally.num_moved
    assert (tally.num_moved > 0) == (name == "churn")
    assert min(tally.ttft_s) > 0
    assert tally.imbalance >= 1


def test_the_same_seed_gives_the_same_figures() -> None:
    one = measure(routing("prefix"), Workload("steady", small("churn"), seed=7))
    assert one == measure(routing("prefix"), Workload("steady", small("churn"), seed=7))
    assert one != measure(routing("prefix"), Workload("steady", small("churn"), seed=8))


def test_where_nothing_is_shared_affinity_and_load_choose_alike() -> None:
    def figures(policy: str) -> Measured:
        measured = measure(routing(policy), Workload("nothing", small("nothing-shared"), seed=7))
        return Measured(
            {name: value for name, value in measured.values.items() if not name.startswith(("cold", "bal"))}
        )

    assert figures("prefix") == figures("least_loaded")


def test_affinity_finds_more_than_load_alone_and_keeps_the_load_even() -> None:
    crowded = replace(SMALL, seconds=10, num_tenants=40)
    found = {policy: played(policy, crowded).tally for policy in ("prefix", "least_loaded", "consistent_hash")}
    assert found["prefix"].cached_tokens > 1.3 * found["least_loaded"].cached_tokens
    assert found["prefix"].cached_tokens > found["consistent_hash"].cached_tokens
    assert found["prefix"].imbalance < 1.2


def test_a_herd_is_spread_before_any_worker_has_reported() -> None:
    silent = replace(TINY, num_routers=1, report_s=1000.0, event_s=1000.0)
    herd = replace(SMALL, requests_per_s=0.5, num_siblings=200)
    tally = played("prefix", herd, silent).tally
    assert tally.imbalance < 1.5, "on one worker it would be 4"
    assert tally.cached_tokens > 0.6 * tally.prompt_tokens


def test_predictions_come_true_while_memory_lasts() -> None:
    cluster = Cluster(replace(TINY, num_routers=1), Hardware(), routing("prefix"))
    cluster.run(make_trace(SMALL, 1))
    predictions = cluster.predictions
    assert predictions.num_replies == len(make_trace(SMALL, 1))
    assert predictions.error_tokens < 0.02 * predictions.cached_tokens


def test_a_full_queue_refuses() -> None:
    narrow = replace(TINY, max_in_flight=1, max_queued=2)
    tally = played("prefix", replace(SMALL, requests_per_s=200), narrow).tally
    assert tally.num_refused > 0
    assert tally.num_ended + tally.num_refused == len(make_trace(replace(SMALL, requests_per_s=200), 1))


def test_unknown_scenarios_are_refused() -> None:
    with pytest.raises(ValueError, match="no scenario is called 'calm'; there are steady"):
        make_scenario("calm", TINY, requests_per_s=1, seconds=1)
    with pytest.raises(SystemExit):
        main(["--policies", "prefix,luck"])


def test_the_command_reports_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--quick", "--seconds", "0.5", "--workers", "2", "--scenarios", "herd,churn", "--json", str(path)]
    assert main([*arguments, "--policies", "prefix,least_loaded", "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    assert "seed 4" in printed
    assert "QUICK RUN" in printed
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["workload"], row["arm"], row["metric"]): row["value"] for row in rows if "metric" in row}
    for workload in ("herd", "churn"):
        for arm in ("prefix", "least_loaded"):
            assert found[workload, arm, "ttft_p90_ms"] >= found[workload, arm, "ttft_p50_ms"] > 0
            assert found[workload, arm, "output_tokens_per_s"] > 0
    assert found["herd", "prefix", "hit_percent"] > 30
