"""What the policies choose, and why; the complaints about other routers are cases here."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.route_shortlist import Shortlist
from protos.messages import Load
from router.config import RoutingSection
from router.routing.baselines import ConsistentHash, LeastLoaded
from router.routing.cost import CostModel
from router.routing.factory import make_policy
from router.routing.index import Match, PrefixIndex
from router.routing.prefix import PrefixAffinity
from router.routing.protocol import Ask, Candidate, Decision, Policy
from router.routing.rendezvous import rendezvous
from router.work import Work

POLICIES = ("prefix", "least_loaded", "round_robin", "random", "consistent_hash")
BLOCK = 64

tokens = st.integers(0, 20_000)
few = st.integers(0, 40)
loads = st.builds(Load, few, few, tokens, tokens, st.sampled_from([0, 10_000, 30_000]))
works = st.builds(Work, tokens, tokens, few)
worker_ids = st.text("abcdef", min_size=1, max_size=3)
asks = st.builds(Ask, tokens, tokens, st.integers(1, 16), st.integers(0, 2**64 - 1))
cold_candidates = st.builds(lambda worker_id, load, work: Candidate(worker_id, load, work), worker_ids, loads, works)
candidates = st.builds(
    lambda candidate, one, two: candidate._replace(cached_tokens=max(one, two), live_tokens=min(one, two)),
    cold_candidates,
    tokens,
    tokens,
)
fleets = st.lists(candidates, min_size=1, max_size=8, unique_by=lambda candidate: candidate.worker_id)
cold_fleets = st.lists(cold_candidates, min_size=1, max_size=8, unique_by=lambda candidate: candidate.worker_id)


def policy_named(name: str) -> Policy:
    return make_policy(RoutingSection.model_validate({"policy": name}))


def picked(policy: Policy, ask: Ask, fleet: list[Candidate]) -> Decision:
    decision = policy.pick(ask, fleet)
    assert decision is not None
    return decision


def idle(worker_id: str, cached_tokens: int = 0, live_tokens: int = 0) -> Candidate:
    return Candidate(worker_id, Load(), Work(), cached_tokens, live_tokens)


@pytest.mark.parametrize("name", POLICIES)
@given(ask=asks, fleet=fleets, seed=st.integers(0, 99))
def test_the_order_of_candidates_and_asking_twice_do_not_matter(
    name: str, ask: Ask, fleet: list[Candidate], seed: int
) -> None:
    one, other = policy_named(name), policy_named(name)
    shuffled = random.Random(seed).sample(fleet, len(fleet))
    for _ in range(3):
        explained = other.explain(ask, shuffled)
        assert explained == other.explain(ask, fleet)
        decision = picked(one, ask, fleet)
        assert decision == picked(other, ask, shuffled)
        assert decision[:1] + decision[2:4] == explained[0][:3]
        if len(fleet) > 1:
            assert (decision.runner_up, decision.runner_up_cost) == explained[1][:2]
        assert (decision.reason == "only") == (len(fleet) == 1)


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_is_chosen_from_nobody(name: str) -> None:
    policy = policy_named(name)
    assert policy.name == name
    assert policy.pick(Ask(1, 1, 1, 0), []) is None
    assert policy.explain(Ask(1, 1, 1, 0), []) == []


@given(ask=asks, fleet=cold_fleets)
def test_where_nothing_is_shared_it_is_least_loaded(ask: Ask, fleet: list[Candidate]) -> None:
    cost = CostModel()
    assert picked(PrefixAffinity(cost), ask, fleet)[0] == picked(LeastLoaded(cost), ask, fleet)[0]
    roomy = [candidate._replace(load=candidate.load._replace(kv_capacity_tokens=0)) for candidate in fleet]
    chosen = picked(PrefixAffinity(cost), ask, roomy)
    by_id = {candidate.worker_id: _work_ahead(candidate) for candidate in roomy}
    assert by_id[chosen.worker_id] == min(by_id.values())
    assert chosen.reason in ("cold", "only")


def _work_ahead(candidate: Candidate) -> int:
    load, reserved = candidate.load, candidate.reserved
    foreign = max(0, load.num_running + load.num_waiting - reserved.num_outputs)
    return max(load.pending_prefill_tokens, reserved.prefill_tokens) + reserved.decode_tokens + 128 * foreign


@given(ask=asks, fleet=fleets)
def test_nobody_else_would_have_been_cheaper(ask: Ask, fleet: list[Candidate]) -> None:
    policy = PrefixAffinity(CostModel())
    decision = picked(policy, ask, fleet)
    estimates = policy.explain(ask, fleet)
    assert decision.cost == min(estimate.cost for estimate in estimates)
    longest = max(candidate.cached_tokens for candidate in fleet)
    match decision.reason:
        case "affinity":
            assert decision.cached_tokens == longest > 0
        case "spread":
            assert decision.cached_tokens < longest
        case "cold":
            assert longest == 0
        case reason:
            assert reason == "only"


@given(
    ask=asks,
    fleet=cold_fleets,
    matches=st.dictionaries(worker_ids, st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=8),
    load_weight=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_the_shortlist_changes_no_choice(
    ask: Ask, fleet: list[Candidate], matches: dict[str, tuple[int, int]], load_weight: float
) -> None:
    cost = CostModel(load_weight=load_weight)
    found = {worker: Match(max(pair), min(pair)) for worker, pair in matches.items()}
    shortlist = Shortlist(cost)
    for candidate in fleet:
        shortlist.put(candidate._replace(reserved=Work(7, 7, 7)))
        shortlist.put(candidate)
        shortlist.check()
    whole, short = shortlist.every(ask, found, BLOCK), shortlist.find(ask, found, BLOCK)
    blind = shortlist.find_blind(ask, found, BLOCK)
    assert {candidate.worker_id for candidate in whole} == {candidate.worker_id for candidate in fleet}
    assert {*short, *blind} <= set(whole)
    affinity, least_loaded = PrefixAffinity(cost), LeastLoaded(cost)
    assert picked(affinity, ask, short) == picked(affinity, ask, whole)
    assert picked(least_loaded, ask, blind) == picked(least_loaded, ask, whole)
    for candidate in fleet:
        shortlist.remove(candidate.worker_id)
        shortlist.check()
    assert len(shortlist) == 0


def test_the_shortlist_is_short() -> None:
    shortlist = Shortlist(CostModel())
    matches = {f"w{number}": Match(50, number % 51) for number in range(0, 1000, 2)}
    for number in range(1000):
        shortlist.put(Candidate(f"w{number}", Load(), Work(prefill_tokens=100 * number)))
    ask = Ask(100 * BLOCK, 64, 1, 1)
    assert len(shortlist.find(ask, matches, BLOCK)) < 60
    assert len(shortlist.find_blind(ask, matches, BLOCK)) == 2


def test_one_hot_worker_does_not_disable_affinity_for_others() -> None:
    hot = Candidate("hot", Load(num_running=200, num_waiting=900, pending_prefill_tokens=5_000_000), Work())
    fleet = [hot, idle("home", cached_tokens=6000), *(idle(f"idle{number}") for number in range(6))]
    decision = picked(PrefixAffinity(CostModel()), Ask(7000, 256, 1, 1), fleet)
    assert (decision.worker_id, decision.reason, decision.cached_tokens) == ("home", "affinity", 6000)


def test_a_burst_does_not_herd_onto_the_holder_while_its_report_is_stale() -> None:
    index, policy, ask = PrefixIndex(1000), PrefixAffinity(CostModel()), Ask(4096 + 512, 128, 1, 1)
    reserved, chosen = dict.fromkeys("abcd", Work()), Counter[str]()
    for number in range(200):  # and no worker has said a word about any of them
        chain = [*range(1, 65), *range(1000 * number + 1001, 1000 * number + 1009)]
        matches = index.match(chain)
        fleet = [
            Candidate(name, Load(), work, matches[name].known * BLOCK, matches[name].live * BLOCK)
            if name in matches
            else Candidate(name, Load(), work)
            for name, work in reserved.items()
        ]
        decision = picked(policy, ask, fleet)
        work = reserved[decision.worker_id]
        computed = ask.num_tokens - decision.cached_tokens
        reserved[decision.worker_id] = Work(
            work.prefill_tokens + computed, work.decode_tokens + ask.decode_tokens, work.num_outputs + 1
        )
        index.hold(decision.worker_id, chain)
        chosen[decision.worker_id] += 1
    assert min(chosen.values()) > 35, chosen
    assert sum(work.prefill_tokens for work in reserved.values()) == 4 * 4096 + 200 * 512, "one copy for each worker"


def test_a_miss_does_not_go_to_a_worker_because_it_caches_little() -> None:
    busy_and_empty = Candidate("empty", Load(num_running=40, pending_prefill_tokens=30_000), Work())
    full_and_idle = Candidate("full", Load(kv_used_tokens=1000, kv_capacity_tokens=500_000), Work())
    assert picked(PrefixAffinity(CostModel()), Ask(2000, 64, 1, 1), [busy_and_empty, full_and_idle])[:2] == (
        "full",
        "cold",
    )


def test_a_hot_prefix_spreads_once_waiting_costs_more_than_computing_elsewhere() -> None:
    policy, ask = PrefixAffinity(CostModel(load_weight=1.0, crowd_tokens=10**9)), Ask(6000, 0, 1, 1)
    for load_tokens, expected in ((4900, ("holder", "affinity")), (5100, ("other", "spread"))):
        holder = Candidate("holder", Load(), Work(prefill_tokens=load_tokens), cached_tokens=5000)
        assert picked(policy, ask, [holder, idle("other")])[:2] == expected


def test_where_everybody_is_busy_a_copy_is_dear() -> None:
    policy, ask = PrefixAffinity(CostModel()), Ask(6000, 128, 1, 1)
    holder = Candidate("holder", Load(), Work(prefill_tokens=30_000), cached_tokens=5000)
    for load_tokens, expected in ((4000, ("other", "spread")), (6000, ("holder", "affinity"))):
        other = Candidate("other", Load(), Work(prefill_tokens=load_tokens))
        assert picked(policy, ask, [holder, other])[:2] == expected


def test_copies_of_a_prefix_are_drawn_together_where_it_is_live() -> None:
    ask = Ask(6000, 256, 1, 1)
    live = Candidate("live", Load(num_running=1), Work(0, 256, 1), 5000, 5000)
    fleet = [idle("copy", cached_tokens=5000), live]
    assert picked(PrefixAffinity(CostModel()), ask, fleet).worker_id == "live"
    assert picked(PrefixAffinity(CostModel(keys_per_token=10**9)), ask, fleet).worker_id == "copy"
    for key in range(20):  # nothing is decoded, so both cost the same
        crowded = [idle("copy", cached_tokens=5000), Candidate("live", Load(), Work(0, 0, 1), 5000, 5000)]
        assert picked(PrefixAffinity(CostModel()), Ask(6000, 0, 1, key), crowded).worker_id == "live"


def test_a_worker_without_memory_left_is_not_preferred() -> None:
    full = Candidate("full", Load(kv_used_tokens=50_000, kv_capacity_tokens=50_000), Work())
    empty = Candidate("room", Load(num_running=10, kv_capacity_tokens=50_000), Work())
    assert picked(PrefixAffinity(CostModel()), Ask(4000, 256, 1, 1), [full, empty]).worker_id == "room"


def test_routers_that_do_not_talk_choose_the_same_home_and_cold_prefixes_scatter() -> None:
    fleet = [idle(f"worker-{number}") for number in range(8)]
    asks = [Ask(1000, 100, 1, key) for key in range(4000)]
    one, other = PrefixAffinity(CostModel()), PrefixAffinity(CostModel())
    homes = [picked(one, ask, fleet).worker_id for ask in asks]
    assert homes == [picked(other, ask, fleet[::-1]).worker_id for ask in asks]
    assert all(400 < number < 600 for number in Counter(homes).values())


def test_a_worker_that_leaves_moves_only_its_own_keys() -> None:
    workers = [f"worker-{number}" for number in range(8)]
    for key in range(500):
        before = min(workers, key=lambda worker: rendezvous(key, worker))
        after = min(workers[1:], key=lambda worker: rendezvous(key, worker))
        assert before == after or before == workers[0]


def test_round_robin_takes_turns_and_random_repeats_with_its_seed() -> None:
    fleet = [idle(name) for name in "bca"]
    ask, turns, draws = Ask(1, 1, 1, 1), policy_named("round_robin"), policy_named("random")
    assert [picked(turns, ask, fleet).worker_id for _ in range(5)] == ["a", "b", "c", "a", "b"]
    assert [picked(turns, ask, fleet[:2]).worker_id for _ in range(2)] == ["c", "b"]
    drawn = [picked(draws, ask, fleet).worker_id for _ in range(600)]
    again = policy_named("random")
    assert drawn == [picked(again, ask, fleet).worker_id for _ in range(600)]
    assert all(150 < number < 250 for number in Counter(drawn).values())


def test_a_hash_leads_home_until_home_has_more_than_its_share() -> None:
    policy, ask = ConsistentHash(CostModel(), factor=1.25), Ask(100, 10, 1, 77)
    fleet = [idle(name) for name in "abcd"]
    order = [estimate.worker_id for estimate in policy.explain(ask, fleet)]
    assert order == sorted("abcd", key=lambda name: rendezvous(77, name))
    held = Counter[str]()
    for number in range(1, 81):
        crowd = [Candidate(name, Load(), Work(num_outputs=held[name])) for name in "abcd"]
        held[picked(policy, ask, crowd).worker_id] += 1
        assert max(held.values()) <= -(-1.25 * number // 4)
    assert held[order[0]] == max(held.values()) > 20


def test_a_decision_is_told_in_one_line() -> None:
    decision = picked(PrefixAffinity(CostModel()), Ask(1000, 0, 1, 1), [idle("a", 900), idle("b")])
    assert str(decision) == "affinity a cost=100 cached=900 next=b cost=1000"
    assert str(picked(PrefixAffinity(CostModel()), Ask(1000, 0, 1, 1), [idle("b")])) == "only b cost=1000 cached=0"
