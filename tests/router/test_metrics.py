"""What a router exports before anything has happened, and beside what happens."""

from __future__ import annotations

from router.metrics import LOSS_REASONS, OUTCOMES, RouterMetrics


def test_counters_of_faults_begin_at_zero() -> None:
    """Of a series that began at 1, Prometheus would not see the first increase."""
    sample = RouterMetrics().registry.get_sample_value
    for outcome in OUTCOMES:
        assert sample("headwater_requests_total", {"method": "Generate", "outcome": outcome}) == 0
    for reason in LOSS_REASONS:
        assert sample("headwater_worker_losses_total", {"reason": reason}) == 0
    for outcome in ("resumed", "given_up"):
        assert sample("headwater_recoveries_total", {"outcome": outcome}) == 0
    for reason in ("gap", "error"):
        assert sample("headwater_index_resyncs_total", {"reason": reason}) == 0


def test_what_is_configured_stands_beside_what_is() -> None:
    metrics = RouterMetrics()
    metrics.want({"router": 1, "worker": 2, "drafter": 0})
    metrics.limit(max_queued_requests=7, max_queued_tokens=70)
    sample = metrics.registry.get_sample_value
    assert sample("headwater_processes_wanted", {"role": "worker"}) == 2
    assert sample("headwater_processes_wanted", {"role": "drafter"}) == 0
    assert sample("headwater_queue_max_requests") == 7
    assert sample("headwater_queue_max_tokens") == 70
