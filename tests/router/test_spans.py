"""What the router says of a call in its trace: whose it is, what it waited for, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from protos import errors
from protos.tracing import Tracing
from tests.collector import Collector
from tests.router.conftest import Cluster, until
from tests.router.scripted_worker import answer, hang, refuse

Start = Callable[..., Any]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


async def wait(collector: Collector, num_spans: int) -> Any:
    return await asyncio.to_thread(collector.wait, lambda spans: len(spans) >= num_spans)


async def test_a_call_has_its_wait_and_hands_its_trace_on(collector: Collector, start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(tracing=Tracing(collector.endpoint))
    worker = await cluster.add_worker("w0", answer(4))
    client = await cluster.client()
    await client.complete("w5 w6", max_tokens=4)
    await client.tokenize("w5")  # no work for a worker, and no span
    call, wait_for_worker = sorted(await wait(collector, 2), key=lambda span: span.name)
    assert (call.name, wait_for_worker.name, wait_for_worker.parent) == ("Generate", "queue", call.span)
    assert worker.submitted[0].traceparent.startswith(f"00-{call.trace}-{call.span}-")
    assert call.attributes["headwater.worker"] == "w0"
    assert call.attributes["gen_ai.usage.output_tokens"] == 4
    assert call.events == ("first token",)
    assert len(collector.spans) == 2


async def test_a_request_that_went_on_elsewhere_says_so(collector: Collector, start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(tracing=Tracing(collector.endpoint))
    first = await cluster.add_worker("w0", hang(3))
    client = await cluster.client()
    task = asyncio.create_task(client.complete("w5", max_tokens=12))
    await until(lambda: bool(first.submitted))
    second = await cluster.add_worker("w1", answer(12))
    await asyncio.sleep(0.05)  # the first tokens reach the client
    await first.kill()
    await task
    call, *_ = [span for span in await wait(collector, 2) if span.name == "Generate"]
    assert call.events == ("first token", "went on elsewhere")
    assert call.attributes["headwater.worker"] == "w1"
    assert second.submitted[0].traceparent == first.submitted[0].traceparent
    assert not call.is_error


async def test_a_call_that_fails_is_an_error(collector: Collector, start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(tracing=Tracing(collector.endpoint))
    await cluster.add_worker("w0", refuse("EngineFailure", "it is broken"))
    client = await cluster.client()
    with pytest.raises(errors.EngineFailure):
        await client.complete("w5", max_tokens=4)
    with pytest.raises(errors.UnknownModel):
        await client.complete("w5", model="another")
    spans = [span for span in await wait(collector, 3) if span.name == "Generate"]
    assert [(span.is_error, span.attributes["headwater.outcome"]) for span in spans] == [
        (True, "EngineFailure"),
        (True, "UnknownModel"),
    ]


async def test_without_tracing_workers_are_told_of_no_trace(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", answer(4))
    await (await cluster.client()).complete("w5", max_tokens=4)
    assert worker.submitted[0].traceparent == ""
