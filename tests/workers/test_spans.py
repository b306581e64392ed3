"""What a worker says of a request in its trace, however it ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from protos.messages import Request, Sampling
from protos.tracing import Tracer, Tracing
from tests.collector import Collector, Span
from tests.workers.engine.drive import torch_engine
from workers.loop import EngineLoop
from workers.metrics import WorkerMetrics

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture
def tracer(collector: Collector) -> Iterator[Tracer]:
    tracer = Tracer(Tracing(collector.endpoint), role="worker", instance="w")
    yield tracer
    tracer.close()


@pytest.fixture
def loop(tracer: Tracer, target_dir: Path, tokenizer: Tokenizer) -> EngineLoop:
    """That turns when it is told to, with one session."""
    metrics = WorkerMetrics(model_name="m", worker_id="w")
    loop = EngineLoop(torch_engine(target_dir), tokenizer, metrics, deliver=lambda _: None, stall_s=60, tracer=tracer)
    loop.open(1)
    loop._turn()
    return loop


def submit(loop: EngineLoop, traceparent: str = TRACEPARENT, **options: float) -> None:
    sampling = Sampling(seed=1, max_tokens=5, temperature=0.0, ignore_eos=True)
    loop.submit(1, Request("a", tuple(range(1, 20)), sampling, traceparent=traceparent, **options))  # type: ignore[arg-type]


def by_name(spans: list[Span]) -> dict[str, Span]:
    return {span.name: span for span in spans}


def test_a_request_that_is_answered_has_each_phase(loop: EngineLoop, tracer: Tracer, collector: Collector) -> None:
    submit(loop)
    while loop.num_live:
        loop._turn()
    tracer.close()
    spans = by_name(collector.wait(lambda spans: len(spans) == 4))
    worker, phases = spans["worker"], [spans[name] for name in ("queue", "prefill", "decode")]
    assert worker.parent == TRACEPARENT.split("-")[2]
    assert {span.parent for span in phases} == {worker.span}
    assert worker.attributes == {
        "gen_ai.usage.input_tokens": 19,
        "gen_ai.usage.output_tokens": 5,
        "headwater.outcome": "length",
    }
    times = [time for span in phases for time in (span.begin_ns, span.end_ns)]
    assert times == pytest.approx(sorted(times), abs=1e6, rel=0)  # the clock is asked for each of them
    assert spans["decode"].end_ns > spans["decode"].begin_ns


@pytest.mark.parametrize("ending", ["cancelled", "DeadlineExceeded", "EngineFailure"])
def test_a_request_that_is_not_is_told_with_the_reason(
    loop: EngineLoop, tracer: Tracer, collector: Collector, ending: str
) -> None:
    submit(loop, deadline=1.0) if ending == "DeadlineExceeded" else submit(loop)
    if ending == "cancelled":
        loop._turn()
        loop.cancel(1, "a")
    loop._turn()
    if ending == "EngineFailure":
        loop._break("it is over")
    tracer.close()
    spans = by_name(collector.wait(bool))
    worker = spans["worker"]
    assert (worker.attributes["headwater.outcome"], worker.is_error) == (ending, ending != "cancelled")
    assert (
        ("decode" in spans) == (worker.attributes["gen_ai.usage.output_tokens"] > 0) == (ending != "DeadlineExceeded")
    )


def test_a_request_without_a_trace_makes_no_span(loop: EngineLoop, tracer: Tracer, collector: Collector) -> None:
    submit(loop, traceparent="")
    while loop.num_live:
        loop._turn()
    tracer.close()
    assert collector.spans == []
