"""The client against a scripted service: what is retried, what is not, and how errors are named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from protos import errors
from protos.client import Client, RetryPolicy
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc

FAST = RetryPolicy(max_attempts=3, first_delay_s=0.01, max_delay_s=0.02)
FIRST = pb.GenerateResponse(prompt=pb.PromptInfo(seed=1), outputs=[pb.OutputDelta(text="a", token_ids=[1])])
LAST = pb.GenerateResponse(
    outputs=[pb.OutputDelta(text="b", token_ids=[2], finish=pb.Finish(reason=pb.FINISH_REASON_STOP, stop="x"))],
    usage=pb.Usage(prompt_tokens=1, completion_tokens=2),
)
Turn = list[pb.GenerateResponse | errors.HeadwaterError | float]


class Service(pb_grpc.InferenceServicer):
    """Plays one turn per Generate or Abort: messages, pauses, an error."""

    def __init__(self, turns: list[Turn]) -> None:
        self.turns = turns
        self.calls: list[pb.GenerateRequest] = []
        self.metadata: dict[str, Any] = {}
        self.cancelled = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.calls.append(request)
        self.metadata = dict(context.invocation_metadata())
        try:
            for part in self.turns[min(len(self.calls), len(self.turns)) - 1]:
                await self._play(part, context)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: N802
        self.calls.append(pb.GenerateRequest())
        for part in self.turns[min(len(self.calls), len(self.turns)) - 1]:
            await self._play(part, context)
        return pb.AbortResponse(found=True)

    async def _play(self, part: pb.GenerateResponse | errors.HeadwaterError | float, context: Any) -> None:
        match part:
            case errors.HeadwaterError():
                await context.abort(part.status, part.message, errors.trailers(part))
            case pb.GenerateResponse():
                await context.write(part)
            case seconds:
                await asyncio.sleep(seconds)

    Score = Tokenize = Detokenize = ListModels = None  # type: ignore[assignment]


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves turns; gives the service and a client of it."""
    servers: list[Any] = []

    async def start(*turns: Turn, **options: Any) -> tuple[Service, Client]:
        service = Service(list(turns))
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_InferenceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = Client(f"127.0.0.1:{port}", **{"retry": FAST} | options)
        servers.append((server, client))
        return service, client

    yield start
    for server, client in servers:
        await client.close()
        await server.stop(None)


@pytest.mark.parametrize(
    "error",
    [errors.WorkerLost("x"), errors.NoWorker("x"), errors.Draining("x"), errors.Overloaded("x", retry_after_s=0.01)],
)
async def test_retryable_error_before_the_first_message_is_repeated(serve: Serve, error: errors.HeadwaterError) -> None:
    service, client = await serve([error], [error], [FIRST, LAST])
    completion = await client.complete("p")
    assert completion.text == "ab"
    assert completion.outputs[0].token_ids == (1, 2)
    assert completion.outputs[0].finish.stop == "x"
    assert len(service.calls) == 3


async def test_attempts_are_bounded(serve: Serve) -> None:
    service, client = await serve([errors.NoWorker("none")])
    with pytest.raises(errors.NoWorker, match="none"):
        await client.complete("p")
    assert len(service.calls) == 3


@pytest.mark.parametrize("error", [errors.PromptTooLong("x"), errors.EngineFailure("x"), errors.DuplicateRequest("x")])
async def test_other_errors_are_not_repeated(serve: Serve, error: errors.HeadwaterError) -> None:
    service, client = await serve([error])
    with pytest.raises(type(error)):
        await client.complete("p")
    assert len(service.calls) == 1


async def test_retry_waits_as_long_as_the_router_asked(serve: Serve) -> None:
    _, client = await serve([errors.Overloaded("full", retry_after_s=0.2)], [FIRST, LAST])
    started = time.monotonic()
    await client.complete("p")
    assert time.monotonic() - started >= 0.2


async def test_retry_stays_within_the_timeout(serve: Serve) -> None:
    service, client = await serve([errors.Overloaded("full", retry_after_s=30)], timeout_s=0.5)
    with pytest.raises(errors.Overloaded):
        await client.complete("p")
    assert len(service.calls) == 1


async def test_timeout_is_a_deadline(serve: Serve) -> None:
    service, client = await serve([30.0], timeout_s=0.1)
    with pytest.raises(errors.DeadlineExceeded):
        await client.complete("p")
    assert len(service.calls) == 1


async def test_unary_calls_are_repeated(serve: Serve) -> None:
    service, client = await serve([errors.NoWorker("none")], [])
    assert await client.abort("x")
    assert len(service.calls) == 2


async def test_closing_the_iterator_cancels_the_call(serve: Serve) -> None:
    service, client = await serve([FIRST, 30.0])
    events = client.generate("p")
    await anext(events)
    await events.aclose()
    async with asyncio.timeout(2):
        await service.cancelled.wait()


async def test_absent_options_stay_absent_and_zeros_are_sent(serve: Serve) -> None:
    service, client = await serve([FIRST, LAST], api_key="key")
    await client.complete("p", temperature=0.0, seed=0, stop=["x"])
    sampling = service.calls[0].sampling
    assert {field.name for field, _ in sampling.ListFields()} == {"temperature", "seed", "stop"}
    assert service.metadata["authorization"] == "Bearer key"


async def test_both_kinds_of_prompt_are_refused_before_sending(serve: Serve) -> None:
    service, client = await serve([FIRST, LAST])
    with pytest.raises(errors.InvalidParameter, match="both"):
        await client.complete("p", token_ids=[1])
    with pytest.raises(errors.EmptyPrompt):
        await client.complete()
    assert not service.calls


@pytest.mark.parametrize(
    ("prompt", "options", "kind"),
    [
        ([-1], {}, errors.TokenOutOfRange),
        ([2**32], {}, errors.TokenOutOfRange),
        (["a"], {}, errors.TokenOutOfRange),
        ("\ud800", {}, errors.InvalidText),
        ("p", {"n": -1}, errors.InvalidParameter),
        ("p", {"max_tokens": 2**40}, errors.InvalidParameter),
    ],
)
async def test_what_the_wire_cannot_carry_is_refused(
    serve: Serve, prompt: Any, options: Any, kind: type[Exception]
) -> None:
    service, client = await serve([FIRST, LAST])
    with pytest.raises(kind):
        await client.complete(prompt, **options)
    assert not service.calls


async def test_nobody_there_is_unavailable_after_bounded_attempts() -> None:
    async with Client("127.0.0.1:1", retry=FAST) as client:
        with pytest.raises(errors.NoWorker):
            await client.complete("p")
