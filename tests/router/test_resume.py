"""Two routers over the same workers: one dies, the client goes on at the other, and the reader sees one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from protos import errors
from protos.client import Client, Completion, GenerateEvent, RetryPolicy
from protos.client.responses import to_completion
from protos.messages import Request, ResumePoint
from protos.v1 import inference_pb2 as pb
from router.server import RouterServer
from tests.router.conftest import router_config, until
from tests.router.scripted_worker import Emit, ScriptedWorker, answer, hang

NUM_TOKENS = 6
FAST = RetryPolicy(max_attempts=8, first_delay_s=0.01, max_delay_s=0.1)


class Pair:
    """Two routers and the worker that both know."""

    def __init__(self, worker: ScriptedWorker, routers: list[RouterServer], addresses: list[str]) -> None:
        self.worker = worker
        self.routers = routers
        self.addresses = addresses


@pytest.fixture
async def pair(tokenizer_dir: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        worker = ScriptedWorker("w0", answer(NUM_TOKENS))
        members = {"w0": await worker.start()}
        stack.push_async_callback(worker.kill)
        routers, addresses = [], []
        for name in ("r0", "r1"):
            router = RouterServer(
                router_config(), model_name="tiny", tokenizer_dir=tokenizer_dir, session_token="secret", router_id=name
            )
            addresses.append((await router.start()).grpc)
            stack.push_async_callback(router.stop, 0)
            router.set_workers(members)
            routers.append(router)
        await until(lambda: all(router.num_connected for router in routers))
        yield Pair(worker, routers, addresses)


async def broken_at(pair: Pair, num_tokens: int, *, n: int) -> Completion:
    """The answer that a reader puts together whose router stops when it has so many tokens of each output."""

    async def script(request: Request, emit: Emit) -> None:
        await (answer(NUM_TOKENS) if request.resume else hang(num_tokens))(request, emit)

    pair.worker.script = script
    events: list[GenerateEvent] = []
    async with Client(pair.addresses, retry=FAST) as client:
        stream = client.generate("w5 w6", n=n, max_tokens=NUM_TOKENS, seed=9, request_id="mine")
        while sum(len(output.token_ids) for event in events for output in event.outputs) < n * num_tokens:
            events.append(await anext(stream))
        await pair.routers[0].stop(0)
        return to_completion(events + [event async for event in stream])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_tokens", range(1, NUM_TOKENS))
async def test_a_router_that_stops_is_healed(pair: Pair, num_tokens: int, n: int) -> None:
    async with Client(pair.addresses[1]) as client:
        whole = await client.complete("w5 w6", n=n, max_tokens=NUM_TOKENS, seed=9, request_id="mine")
    assert await broken_at(pair, num_tokens, n=n) == whole
    first, second = pair.worker.submitted[1:]
    assert first.resume == ()
    assert second.resume == tuple(ResumePoint(i, whole.outputs[i].token_ids[:num_tokens]) for i in range(n))
    assert second.sampling == first.sampling


async def test_finished_outputs_stay_finished(pair: Pair) -> None:
    async with Client(pair.addresses[0]) as client:
        whole = await client.complete([5], n=2, max_tokens=NUM_TOKENS, seed=9)
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5]), request_id="mine")
        request.sampling.CopyFrom(pb.SamplingParams(n=2, max_tokens=NUM_TOKENS, seed=9))
        request.received.add(index=0, finished=True)
        request.received.add(index=1, token_ids=whole.outputs[1].token_ids[:4])
        (endpoint,) = client._endpoints
        responses = [response async for response in endpoint.stub.Generate(request)]
    deltas = [output for response in responses for output in response.outputs]
    assert {delta.index for delta in deltas} == {1}
    assert tuple(token_id for delta in deltas for token_id in delta.token_ids) == whole.outputs[1].token_ids[4:]
    assert responses[-1].usage.completion_tokens == 2
    assert pair.worker.submitted[1].resume == (
        ResumePoint(0, (), finished=True),
        ResumePoint(1, whole.outputs[1].token_ids[:4]),
    )


async def test_calls_go_to_whoever_is_up(pair: Pair) -> None:
    async with Client(pair.addresses, retry=FAST) as client:
        await pair.routers[0].stop(0)
        answers = await asyncio.gather(*(client.complete([5], max_tokens=2) for _ in range(8)))
        assert {completion.outputs[0].token_ids for completion in answers} == {(10, 11)}
        assert await client.tokenize("w5") == (0, 5)
        await pair.routers[1].stop(0)
        with pytest.raises(errors.NoWorker):
            await client.complete([5])
