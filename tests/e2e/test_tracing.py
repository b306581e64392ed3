"""One trace of a request across router, worker and drafter, as its collector gets it."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass

import grpc

from protos.client import Client
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as rpc
from tests.collector import Collector, Span

PARENT = "00f067aa0ba902b7"
NUM_TOKENS = 96
MAX_ASKED = 60
SLACK_NS = 50_000_000  # between the clocks of processes of one machine, as each reads them
PROMPT = b"def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"


@dataclass(frozen=True)
class Answer:
    """What the caller of a traced request knows of it."""

    trace: str
    num_prompt: int
    num_made: int
    worker_id: str
    route: str


async def ask(target: str) -> Answer:
    """For a caller that traces."""
    trace = secrets.token_hex(16)
    sampling = pb.SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    request = pb.GenerateRequest(text=PROMPT, sampling=sampling)
    async with grpc.aio.insecure_channel(target) as channel:
        call = rpc.InferenceStub(channel).Generate(request, metadata=(("traceparent", f"00-{trace}-{PARENT}-01"),))
        async for response in call:
            usage = response.usage
        said = dict(await call.trailing_metadata())
    return Answer(
        trace, usage.prompt_tokens, usage.completion_tokens, said["headwater-worker"], said["headwater-route"]
    )


def of(spans: list[Span], trace: str) -> dict[tuple[str, str], Span]:
    """One trace's spans, by who has made them and their name."""
    return {(span.service.removeprefix("headwater-"), span.name): span for span in spans if span.trace == trace}


def within(inner: Span, outer: Span) -> bool:
    return outer.begin_ns - SLACK_NS <= inner.begin_ns <= inner.end_ns <= outer.end_ns + SLACK_NS


async def test_a_traced_request_is_one_trace(target: str, client: Client, collector_port: int) -> None:
    with Collector(collector_port) as collector:
        await client.complete("not traced", max_tokens=4)
        began = time.time_ns()
        answer = await ask(target)
        spans = await asyncio.to_thread(collector.wait, lambda spans: len(of(spans, answer.trace)) >= 6)
    assert {span.trace for span in spans} == {answer.trace}
    named = of(spans, answer.trace)
    call, worker = named["router", "Generate"], named["worker", "worker"]
    assert (call.parent, worker.parent) == (PARENT, call.span)
    assert call.begin_ns >= began - SLACK_NS
    assert call.attributes == {
        "gen_ai.usage.input_tokens": answer.num_prompt,
        "gen_ai.usage.output_tokens": answer.num_made,
        "headwater.cached_tokens": 0,
        "headwater.outcome": "length",
        "headwater.route": answer.route,
        "headwater.worker": answer.worker_id,
    }
    assert call.events == ("first token",)
    assert worker.attributes["gen_ai.usage.output_tokens"] == answer.num_made == NUM_TOKENS
    phases = [named["worker", phase] for phase in ("queue", "prefill", "decode")]
    assert {phase.parent for phase in phases} == {worker.span}
    assert all(within(phase, worker) for phase in phases)
    assert all(within(span, call) for span in (worker, named["router", "queue"]))
    assert not any(span.is_error for span in spans)


async def test_what_was_drafted_elsewhere_is_of_the_same_trace(target: str, collector_port: int) -> None:
    """Which drafters a step asks is up to what they gain: asked again and again, the pool has its turn."""
    with Collector(collector_port) as collector:
        asked: set[str] = set()
        while not (drafts := [span for span in collector.spans if span.name == "drafter"]):
            assert len(asked) < MAX_ASKED, "no drafter has told of a sequence"
            asked |= {answer.trace for answer in await asyncio.gather(*[ask(target) for _ in range(3)])}
        trace = drafts[0].trace
        spans = await asyncio.to_thread(collector.wait, lambda spans: ("router", "Generate") in of(spans, trace))
    named = of(spans, trace)
    assert trace in asked
    assert named["drafter", "drafter"].parent == named["router", "Generate"].span
    assert sum(span.attributes["headwater.followed_tokens"] for span in drafts) > 0
