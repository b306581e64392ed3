"""A Generate that survives the router it began on.

What a worker answers is a function of prompt, parameters, seed and the tokens before, so the client needs to keep no
more than the tokens to have any router go on where a broken stream stood.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import grpc

from protos import errors
from protos.client.responses import to_event
from protos.client.retry import Attempts
from protos.client.types import GenerateEvent, OutputDelta, PromptInfo, Usage
from protos.v1 import inference_pb2 as pb

ROUTE_TRAILER = "headwater-route"
Metadata = Sequence[tuple[str, str]]


class Received:
    """What a stream has brought, over all its calls. Mutated only by AnswerStream."""

    def __init__(self, sampling: pb.SamplingParams) -> None:
        self.prompt: PromptInfo | None = None  # of the first call; it stands
        self.has_begun = False
        self.has_usage = False
        self._num_outputs = sampling.n if sampling.HasField("n") else 1
        self._generates = not sampling.HasField("max_tokens") or sampling.max_tokens > 0
        self._open: dict[int, array[int]] = {}  # tokens of outputs that go on
        self._finished: set[int] = set()
        self._num_tokens = 0
        self._num_earlier = 0  # of those, from earlier calls
        self._has_prompt_logprobs = False
        self._had_prompt_logprobs = False  # from an earlier call

    @property
    def has_every_finish(self) -> bool:
        return len(self._finished) == self._num_outputs

    @property
    def usage(self) -> Usage:
        """What the client itself knows: the tokens it was sent."""
        assert self.prompt is not None
        return Usage(self.prompt.num_tokens, cached_tokens=0, completion_tokens=self._num_tokens)

    def rest_of(self, request: pb.GenerateRequest) -> pb.GenerateRequest:
        """The request for what has not been received. Begins a call."""
        self._had_prompt_logprobs, self._num_earlier = self._has_prompt_logprobs, self._num_tokens
        if self.prompt is None:
            return request
        rest = pb.GenerateRequest()
        rest.CopyFrom(request)
        rest.request_id = self.prompt.request_id  # so that Abort finds it under the id that was reported
        rest.sampling.seed = self.prompt.seed
        if self._has_prompt_logprobs and self._generates:
            rest.sampling.ClearField("prompt_logprobs")
        for index, token_ids in self._open.items():
            rest.received.add(index=index, token_ids=token_ids)
        for index in self._finished:
            rest.received.add(index=index, finished=True)
        return rest

    def take(self, event: GenerateEvent) -> GenerateEvent:
        """Note what came; the event without what an earlier call has brought, with the tokens of all calls counted."""
        for delta in event.outputs:
            self._take_delta(delta)
        self.has_begun = True
        self.has_usage |= event.usage is not None
        self._has_prompt_logprobs |= bool(event.prompt_logprobs)
        if self.prompt is not None:
            event = self._without_facts(event)
        self.prompt = self.prompt or event.prompt
        return event

    def _take_delta(self, delta: OutputDelta) -> None:
        self._num_tokens += len(delta.token_ids)
        if delta.finish is None:
            self._open.setdefault(delta.index, array("I")).extend(delta.token_ids)
        else:
            self._open.pop(delta.index, None)
            self._finished.add(delta.index)

    def _without_facts(self, event: GenerateEvent) -> GenerateEvent:
        if event.prompt is None and event.usage is None and not event.prompt_logprobs:
            return event
        return replace(
            event,
            prompt=None,
            prompt_logprobs=() if self._had_prompt_logprobs else event.prompt_logprobs,
            usage=event.usage and self._with_earlier(event.usage),
        )

    def _with_earlier(self, usage: Usage) -> Usage:
        """A router counts what it sent itself."""
        return replace(usage, completion_tokens=self._num_earlier + usage.completion_tokens)


class AnswerStream:
    """One answer, over as many calls as it takes. Owned by the iterator that reads it."""

    def __init__(self, request: pb.GenerateRequest, attempts: Attempts, metadata: Metadata, *, resume: bool) -> None:
        self._request = request
        self._attempts = attempts
        self._metadata = metadata
        self._resume = resume
        self._received = Received(request.sampling)
        self.route = ""  # of the last call that ended: which worker ran it, and why

    async def events(self) -> AsyncGenerator[GenerateEvent, None]:
        """The answer's events until its usage. Raises the error of a call after which there is no other."""
        received = self._received
        while True:
            call = self._call()
            try:
                async for response in call:
                    yield self._take(response)
                self.route = _route(await call.trailing_metadata())
                error: errors.HeadwaterError = errors.WorkerLost("the stream ended before its answer; send it again")
            except grpc.aio.AioRpcError as rpc_error:
                error = errors.from_rpc_error(rpc_error)
            finally:
                call.cancel()
            if received.has_usage:
                return
            if self._may_repeat(error) and received.has_every_finish:
                yield GenerateEvent(None, (), (), received.usage)
                return
            await self._attempts.failed(error, may_repeat=self._may_repeat(error))

    def _call(self) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]:
        endpoint, timeout_s = self._attempts.next(), self._attempts.remaining_s()
        rest = self._received.rest_of(self._request)
        return endpoint.stub.Generate(rest, timeout=timeout_s, metadata=self._metadata)

    def _take(self, response: pb.GenerateResponse) -> GenerateEvent:
        event = self._received.take(to_event(response))
        self._attempts.answered()
        if event.outputs:
            self._attempts.progressed()
        return event

    def _may_repeat(self, error: errors.HeadwaterError) -> bool:
        """A router that has not noticed the break yet still holds the request's id."""
        if self._received.has_begun and not (self._resume and self._received.prompt):
            return False
        return error.retryable or (isinstance(error, errors.DuplicateRequest) and not self._attempts.is_first)


def _route(trailers: grpc.aio.Metadata | None) -> str:
    values = [value for key, value in trailers or () if key == ROUTE_TRAILER and isinstance(value, str)]
    return values[0] if values else ""
