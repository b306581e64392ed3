"""Spans as a real collector gets them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.errors import ConfigError
from protos.tracing import Event, Tracer, Tracing
from tests.collector import Collector

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-1] + "0"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def tracer(collector: Collector, sample_ratio: float = 1.0) -> Tracer:
    return Tracer(Tracing(collector.endpoint, sample_ratio), role="router", instance="r1")


def test_a_call_goes_on_with_its_callers_trace(collector: Collector) -> None:
    traced = tracer(collector)
    with traced.call("Generate", [("traceparent", CALLER), ("other", b"\0")]) as span:
        begin = time.monotonic()
        child = traced.record("queue", span.traceparent, begin=begin, end=begin + 0.5, events=[Event("sent", begin)])
        span.note({"tokens": 3})
        span.happened(Event("first token", begin))
    traced.close()
    generate, queue = sorted(collector.wait(lambda spans: len(spans) == 2), key=lambda span: span.name)
    assert generate.trace == queue.trace == CALLER.split("-")[1]
    assert generate.parent == CALLER.split("-")[2]
    assert queue.parent == generate.span
    assert child.startswith(f"00-{queue.trace}-{queue.span}-")
    assert queue.end_ns - queue.begin_ns == pytest.approx(0.5e9, abs=1e6)
    assert (generate.attributes, generate.events, queue.events) == ({"tokens": 3}, ("first token",), ("sent",))
    assert generate.service == "headwater-router"
    assert not generate.is_error


def test_without_a_caller_a_trace_begins_here(collector: Collector) -> None:
    traced = tracer(collector)
    for metadata in ([], [("traceparent", "nonsense")]):
        with traced.call("Generate", metadata) as span:
            span.fail("Overloaded")
    traced.close()
    spans = collector.wait(lambda spans: len(spans) == 2)
    assert len({span.trace for span in spans}) == 2
    assert [(span.parent, span.is_error) for span in spans] == [("", True)] * 2


@pytest.mark.parametrize(("metadata", "ratio"), [([("traceparent", UNSAMPLED)], 1.0), ([], 0.0)])
def test_what_is_not_sampled_is_not_carried_on(
    collector: Collector, metadata: list[tuple[str, str]], ratio: float
) -> None:
    traced = tracer(collector, ratio)
    with traced.call("Generate", metadata) as span:
        assert span.traceparent == ""
        assert traced.record("queue", span.traceparent, begin=1.0, end=2.0) == ""
    with traced.call("Generate", [("traceparent", CALLER)]):  # its caller has decided
        pass
    traced.close()
    [span] = collector.wait(bool)
    assert span.parent == CALLER.split("-")[2]


def test_off_makes_nothing() -> None:
    off = Tracer(None, role="router", instance="r1")
    with off.call("Generate", [("traceparent", CALLER)]) as span:
        span.note({"tokens": 3})
        span.fail("Overloaded")
        assert span.traceparent == ""
    assert off.record("queue", CALLER, begin=1.0, end=2.0) == ""
    off.close()


def test_without_a_collector_nothing_waits() -> None:
    traced = Tracer(Tracing("127.0.0.1:9"), role="router", instance="r1")
    for _ in range(10):
        with traced.call("Generate", []):
            pass
    traced.close(timeout_s=0.1)
    traced.close()


def test_an_authority_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.tracing\.ca_file.*cannot be read"):
        Tracer(Tracing("127.0.0.1:9", is_tls=True, ca_file=tmp_path / "none.pem"), role="router", instance="r1")
