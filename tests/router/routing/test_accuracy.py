"""When predictions fail, and what is done about it."""

from __future__ import annotations

import itertools

from prometheus_client import generate_latest

from protos.messages import KVEvents
from router.metrics import RouterMetrics
from router.routing.accuracy import Accuracy, Totals
from router.routing.index import PrefixIndex

BLOCK = 16


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def fail(accuracy: Accuracy, worker_id: str, times: int) -> int:
    """How often a resync is asked for."""
    return sum(accuracy.observe(worker_id, 100, 100 - BLOCK, BLOCK) for _ in range(times))


def test_errors_of_a_block_add_up_to_a_resync_of_that_worker() -> None:
    accuracy = Accuracy(clock=Clock())
    assert fail(accuracy, "a", 7) == fail(accuracy, "b", 7) == 0
    assert not any(accuracy.observe("a", 100, 100 + error, BLOCK) for error in (0, 15, -15) for _ in range(20))
    assert accuracy.observe("a", 0, BLOCK, BLOCK), "what was not expected counts as well"
    assert fail(accuracy, "b", 1) == 1


def test_a_snapshot_wipes_the_slate() -> None:
    clock = Clock()
    accuracy = Accuracy(clock=clock)
    assert fail(accuracy, "a", 8) == 1
    accuracy.refreshed("a")
    clock.now_s += 10
    assert fail(accuracy, "a", 7) == 0
    accuracy.forget("a")
    assert fail(accuracy, "a", 7) == 0
    assert fail(accuracy, "a", 1) == 1


def test_asking_that_does_not_help_becomes_rare_and_recovers() -> None:
    clock = Clock()
    accuracy = Accuracy(clock=clock, max_wrong=1, max_interval_s=8)
    asked = []
    for _ in range(400):
        if fail(accuracy, "a", 1):
            asked.append(clock.now_s - 100)
            accuracy.refreshed("a")
        clock.now_s += 0.25
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert waits[:5] == [1, 2, 4, 8, 8]
    assert set(waits[4:]) == {8}
    clock.now_s += 100
    assert fail(accuracy, "a", 1) == 1
    clock.now_s += 1
    assert fail(accuracy, "a", 1) == 1


def test_what_was_lost_on_the_way_is_healed() -> None:
    """Removals are lost although the numbers are in order, as when an engine is cleared behind its server."""
    index, accuracy, chain = PrefixIndex(100), Accuracy(clock=Clock()), list(range(1, 9))
    index.update("a", KVEvents(1, tuple(chain)))
    truth: tuple[int, ...] = ()
    replies = 0
    while index.match(chain) and replies < 50:
        replies += 1
        if accuracy.observe("a", index.match(chain)["a"].known * BLOCK, 0, BLOCK):
            index.update("a", KVEvents(1, truth, snapshot=True))
            accuracy.refreshed("a")
    assert replies == 8


def test_sums_are_kept_over_all_workers() -> None:
    accuracy = Accuracy(clock=Clock())
    accuracy.observe("a", 100, 60, BLOCK)
    accuracy.observe("b", 10, 40, BLOCK)
    assert accuracy.totals == Totals(2, 110, 100, 70)


def test_routing_without_hits_can_be_seen() -> None:
    metrics = RouterMetrics()
    metrics.watch_index(lambda: 3)
    for _ in range(5):
        metrics.route_decisions.labels("cold").inc()
        metrics.observe_prediction(predicted_tokens=32, cached_tokens=0)
    text = generate_latest(metrics.registry).decode()
    assert 'headwater_route_decisions_total{reason="cold"} 5.0' in text
    assert "headwater_route_predicted_cached_tokens_total 160.0" in text
    assert "headwater_route_cached_tokens_total 0.0" in text
    assert 'headwater_route_prediction_error_tokens_bucket{le="16.0"} 0.0' in text
    assert 'headwater_route_prediction_error_tokens_bucket{le="64.0"} 5.0' in text
    assert "headwater_index_blocks 3.0" in text
