"""A service that knows the whole answer in advance, goes on with it where it is asked to, and breaks off when told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos import errors
from protos.client import GenerateEvent
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc

CHOSEN_SEED = 7
Break = Callable[[Any], Any]  # how a stream breaks off, given its context


def lost(error: errors.HeadwaterError) -> Break:
    """The router says so."""

    async def end(context: Any) -> None:
        await context.abort(error.status, error.message, errors.trailers(error))

    return end


async def cut(context: Any) -> None:
    """What a client sees of a connection that is gone."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


async def close(context: Any) -> None:
    """The stream ends as if it were complete."""


def token(seed: int, index: int, position: int) -> int:
    return 1000 * seed + 100 * index + position


def length(index: int) -> int:
    """Outputs end one after another."""
    return 2 + 2 * index


def messages(request: pb.GenerateRequest, worker_id: str) -> Iterator[pb.GenerateResponse]:
    """What has not been received, a token of each output a message."""
    sampling = request.sampling
    seed = sampling.seed if sampling.HasField("seed") else CHOSEN_SEED
    at = dict.fromkeys(range(sampling.n or 1), 0) | {r.index: len(r.token_ids) for r in request.received}
    for received in request.received:
        known = [token(seed, received.index, position) for position in range(len(received.token_ids))]
        assert list(received.token_ids) == known, "what the client has received is not what it was sent"
        if received.finished:
            del at[received.index]
    num_sent, is_first = 0, True
    while at:
        response = pb.GenerateResponse()
        if is_first:
            response.prompt.CopyFrom(pb.PromptInfo(request_id=request.request_id or "made", num_tokens=4, seed=seed))
            response.prompt.worker_id = worker_id
            if sampling.HasField("prompt_logprobs"):
                response.prompt_logprobs.add(token_id=5, logprob=-0.5)
        for index in list(at):
            response.outputs.append(_delta(seed, index, at[index]))
            at[index] += 1
            num_sent += 1
            if at[index] == length(index):
                del at[index]
        if not at:
            response.usage.CopyFrom(pb.Usage(prompt_tokens=4, cached_tokens=3, completion_tokens=num_sent))
        is_first = False
        yield response


def _delta(seed: int, index: int, position: int) -> pb.OutputDelta:
    token_id = token(seed, index, position)
    delta = pb.OutputDelta(index=index, text=f"<{token_id}>", token_ids=[token_id])
    delta.logprobs.add(token_id=token_id, logprob=-float(position))
    if position + 1 == length(index):
        delta.finish.CopyFrom(pb.Finish(reason=pb.FINISH_REASON_STOP, stop=f"stop{index}"))
    return delta


@dataclass
class Story(pb_grpc.InferenceServicer):
    """One router. `plan` says of each Generate in turn after how many messages it breaks, and how; then none does."""

    plan: list[tuple[int, Break]] = field(default_factory=list)
    name: str = "w"
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)  # ids of requests that Abort finds
    pause: asyncio.Event | None = None  # a stream that begins waits here after its first message
    num_open: int = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.requests.append(request)
        num_messages, end = self.plan.pop(0) if self.plan else (1000, close)
        self.num_open += 1
        try:
            for count, response in enumerate(messages(request, self.name)):
                if count == num_messages:
                    await end(context)
                    return
                await context.write(response)
                if self.pause is not None:
                    await self.pause.wait()
        finally:
            self.num_open -= 1

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: N802
        self.aborts.append(request.request_id)
        return pb.AbortResponse(found=request.request_id in self.held)

    Score = Tokenize = Detokenize = ListModels = None  # type: ignore[assignment]


class Router:
    """A Story on a port. A test stops it as a crash would, and starts it again there."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_InferenceServicer_to_server(self.story, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def kill(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)


@asynccontextmanager
async def routers(*stories: Story) -> AsyncIterator[list[Router]]:
    async with AsyncExitStack() as stack:
        started = []
        for story in stories:
            router = Router(story)
            await router.start()
            stack.push_async_callback(router.kill)
            started.append(router)
        yield started


def joined(events: list[GenerateEvent]) -> dict[str, Any]:
    """Everything the events say, however it was cut."""
    facts = [event.prompt for event in events if event.prompt]
    usages = [event.usage for event in events]
    assert events[0].prompt is facts[0]
    assert usages[-1] is not None
    assert usages[:-1] == [None] * (len(events) - 1)
    deltas = [delta for event in events for delta in event.outputs]
    of = {i: [delta for delta in deltas if delta.index == i] for i in sorted({delta.index for delta in deltas})}
    return {
        "facts": facts,
        "usage": usages[-1],
        "prompt_logprobs": [position for event in events for position in event.prompt_logprobs],
        "text": {i: "".join(delta.text for delta in own) for i, own in of.items()},
        "tokens": {i: [token_id for delta in own for token_id in delta.token_ids] for i, own in of.items()},
        "logprobs": {i: [position for delta in own for position in delta.logprobs] for i, own in of.items()},
        "finishes": {i: [delta.finish for delta in own if delta.finish] for i, own in of.items()},
    }
