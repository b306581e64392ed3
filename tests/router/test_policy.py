"""Decisions and reservations, without a network."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from protos.messages import Load
from router.policy import Candidate, LeastLoaded, Policy, Weighted, Work, default_policy
from router.reservations import Reservations

numbers = st.integers(0, 10**6)
candidates = st.builds(
    Candidate,
    st.text(min_size=1, max_size=3),
    st.builds(Load, num_running=numbers, num_waiting=numbers, pending_prefill_tokens=numbers),
    st.builds(Work, numbers, numbers, numbers),
)


@given(candidates)
def test_scores_lie_between_zero_and_one(candidate: Candidate) -> None:
    assert 0 <= LeastLoaded().score((), candidate) <= 1


@given(st.lists(candidates, min_size=1, max_size=6, unique_by=lambda candidate: candidate.worker_id))
def test_order_of_candidates_does_not_matter(workers: list[Candidate]) -> None:
    policy = default_policy()
    shuffled = random.Random(0).sample(workers, len(workers))
    assert policy.pick((), workers) == policy.pick((), shuffled)


def test_ties_go_to_the_smaller_id() -> None:
    workers = [Candidate(worker_id, Load(), Work()) for worker_id in ("b", "a", "c")]
    choice = default_policy().pick((), workers)
    assert choice is not None
    assert choice.worker_id == "a"
    assert default_policy().pick((), []) is None


def test_reported_prefill_is_not_counted_twice() -> None:
    scorer = LeastLoaded()
    mine = Candidate("a", Load(num_waiting=1, pending_prefill_tokens=100), Work(100, 10, 1))
    assert scorer.work_tokens(mine) == 110
    with_others = Candidate("a", Load(num_waiting=3, pending_prefill_tokens=500), Work(100, 10, 1))
    assert scorer.work_tokens(with_others) == 500 + 10 + 2 * 128


def test_weights_decide_between_scorers() -> None:
    class Prefers:
        name = "prefers"

        def __init__(self, worker_id: str) -> None:
            self.worker_id = worker_id

        def score(self, requests: object, candidate: Candidate) -> float:
            return float(candidate.worker_id == self.worker_id)

    workers = [Candidate(worker_id, Load(), Work()) for worker_id in ("a", "b")]
    choice = Policy((Weighted(Prefers("a"), 1.0), Weighted(Prefers("b"), 2.0))).pick((), workers)
    assert choice is not None
    assert choice.worker_id == "b"


@given(st.lists(st.tuples(st.sampled_from(["reserve", "progress", "release"]), st.integers(0, 5), st.integers(0, 50))))
def test_totals_are_the_sum_of_what_is_open(operations: list[tuple[str, int, int]]) -> None:
    reservations, live = Reservations(), set()
    for operation, number, size in operations:
        request_id = str(number)
        match operation:
            case "reserve" if request_id not in live:
                reservations.reserve(request_id, Work(size, 2 * size, 1))
                live.add(request_id)
            case "progress" if request_id in live:
                reservations.progress(request_id, size)
            case "release":
                reservations.release(request_id)
                live.discard(request_id)
        reservations.check()
    for request_id in live:
        reservations.release(request_id)
    assert reservations.total == Work()
