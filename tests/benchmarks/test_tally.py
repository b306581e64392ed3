"""From traces to metrics."""

from __future__ import annotations

import pytest

from benchmarks.tally import NothingCompletedError, tally, token_gaps
from benchmarks.traffic import Trace
from protos import errors

DONE = Trace(
    due_s=10.0,
    sent_s=10.0,
    ended_s=12.0,
    arrivals=((10.5, 1), (11.5, 4), (12.0, 1)),
    prompt_tokens=20,
    cached_tokens=5,
)


def failed(error: errors.HeadwaterError) -> Trace:
    return Trace(due_s=10.0, sent_s=10.0, ended_s=10.1, error=error)


def test_a_message_of_k_tokens_counts_as_k_gaps() -> None:
    assert list(token_gaps(DONE.arrivals)) == [0.25, 0.25, 0.25, 0.25, 0.5]
    assert list(token_gaps([(1.0, 8)])) == []


def test_latency_runs_from_when_the_request_was_due() -> None:
    values = tally([DONE]).values
    assert values["ttft_p50_ms"] == pytest.approx(500)
    assert values["itl_p50_ms"] == pytest.approx(250)
    assert values["e2e_p99_ms"] == pytest.approx(2000)
    assert values["output_tokens_per_s"] == pytest.approx(3.0)
    assert values["cached_percent"] == pytest.approx(25)


def test_refusals_and_errors_are_counted_apart_by_kind() -> None:
    measured = tally(
        [DONE, failed(errors.Overloaded("full")), failed(errors.Overloaded("full")), failed(errors.WorkerLost("gone"))]
    )
    assert measured.refusals == {"Overloaded": 2}
    assert measured.errors == {"WorkerLost": 1}
    counted = {name: measured.values[name] for name in ("num_requests", "num_completed", "num_refused", "num_errors")}
    assert counted == {"num_requests": 4, "num_completed": 1, "num_refused": 2, "num_errors": 1}


def test_a_run_in_which_nothing_completed_fails_and_names_the_kinds() -> None:
    with pytest.raises(NothingCompletedError, match=r"none of 1 requests completed: .'Overloaded': 1"):
        tally([failed(errors.Overloaded("full"))])
