"""The client: one method per call of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from protos import errors
from protos.client import requests, responses
from protos.client.endpoints import ClientTLS, Endpoint, Endpoints
from protos.client.retry import Attempts, RetryPolicy
from protos.client.stream import AnswerStream
from protos.client.types import (
    Completion,
    GenerateEvent,
    PinnedPrefix,
    Prompt,
    RouteExplanation,
    SamplingOptions,
    Scores,
    ServedModel,
    Topology,
)
from protos.convert import overview_from_proto
from protos.messages import Speculation
from protos.overview import Overview
from protos.v1 import cluster_pb2 as cluster_pb
from protos.v1 import inference_pb2 as pb

_T = TypeVar("_T")
_Method = Callable[[Endpoint], Callable[..., Awaitable[_T]]]


class Client:
    """Connections to a cluster's routers. Use as an async context manager, or call `close`."""

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        tls: ClientTLS | None = None,
        api_key: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        resume: bool = True,
    ) -> None:
        """`target` is one router as host:port, or several: with commas between them, or a sequence.

        `timeout_s` bounds each call, retries included. Without `resume` a stream that breaks after its first event ends
        in its error.
        """
        self._endpoints = Endpoints.connect(target, tls)
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._resume = resume

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls in progress are cancelled."""
        await self._endpoints.close()

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        request_id: str = "",
        speculation: Speculation = "auto",
        priority: int | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Continue a prompt: events as they come. `sampling` takes the fields of SamplingOptions.

        `speculation` "off" has every token computed by itself: never another text, only another speed. Larger
        priorities run first. Closing the iterator (`aclose`, or cancelling the task that reads it) cancels the request
        in the cluster. Raises InvalidParameter if both a text and token ids are given: the wire can carry only one.
        """
        request = requests.generate_request(
            prompt,
            token_ids,
            model=model,
            request_id=request_id,
            speculation=speculation,
            priority=priority,
            sampling=SamplingOptions(**sampling),
        )
        async with aclosing(self._stream(request).events()) as events:
            async for event in events:
                yield event

    async def complete(
        self,
        prompt: Prompt | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        request_id: str = "",
        speculation: Speculation = "auto",
        priority: int | None = None,
        **sampling: Any,
    ) -> Completion:
        """Continue a prompt: the whole answer. Arguments and errors as for `generate`."""
        request = requests.generate_request(
            prompt,
            token_ids,
            model=model,
            request_id=request_id,
            speculation=speculation,
            priority=priority,
            sampling=SamplingOptions(**sampling),
        )
        stream = self._stream(request)
        async with aclosing(stream.events()) as events:
            everything = [event async for event in events]
        return responses.to_completion(everything, stream.route)

    async def score(
        self,
        context: Prompt,
        continuations: Sequence[Prompt],
        *,
        model: str = "",
        request_id: str = "",
        priority: int | None = None,
    ) -> Scores:
        """Log-probabilities of continuations of one context. All are text, or all are token ids.

        A text context is tokenized once and each text continuation alone, without special tokens, so the tokens at the
        seam may differ from those of the joined text.
        """
        request = requests.score_request(context, continuations, model=model, request_id=request_id, priority=priority)
        return responses.to_scores(await self._unary(lambda router: router.stub.Score, request))

    async def tokenize(self, text: str | bytes, *, model: str = "") -> tuple[int, ...]:
        """Token ids of a text, as a prompt would be tokenized."""
        request = pb.TokenizeRequest(model=model, text=requests.as_bytes(text))
        return tuple((await self._unary(lambda router: router.stub.Tokenize, request)).ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model)
        requests.extend(request.ids, "token_ids", token_ids)
        return (await self._unary(lambda router: router.stub.Detokenize, request)).text

    async def models(self) -> tuple[ServedModel, ...]:
        """The models served; none while the cluster has never had a worker."""
        return responses.to_models(await self._unary(lambda router: router.stub.ListModels, pb.ListModelsRequest()))

    async def abort(self, request_id: str) -> bool:
        """Stop a live request by its id; False if there is none. Every router is asked: one of them holds it."""
        request = pb.AbortRequest(request_id=request_id)
        asked = [self._unary(lambda router: router.stub.Abort, request, Endpoints([e])) for e in self._endpoints]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        if any(isinstance(answer, pb.AbortResponse) and answer.found for answer in answers):
            return True
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return False

    # The cluster service

    async def topology(self) -> tuple[Topology, ...]:
        """What each router sees of workers and queue, in the order of the target. For admins."""
        answers = await self._every(lambda router: router.cluster_stub.GetTopology, cluster_pb.GetTopologyRequest())
        return tuple(map(responses.to_topology, answers))

    async def overview(self) -> tuple[Overview, ...]:
        """How the cluster has done within the last minute, as each router tells; `protos.overview.merged` joins them.

        For admins.
        """
        answers = await self._every(lambda router: router.cluster_stub.GetOverview, cluster_pb.GetOverviewRequest())
        return tuple(map(overview_from_proto, answers))

    async def explain_route(
        self,
        prompt: Prompt | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        max_tokens: int | None = None,
    ) -> RouteExplanation:
        """Where a prompt would run now and why, as one router sees it. Places nothing."""
        request = requests.explain_request(prompt, token_ids, model=model, max_tokens=max_tokens)
        return responses.to_explanation(await self._unary(lambda router: router.cluster_stub.ExplainRoute, request))

    async def drain(self, worker_id: str, *, resume: bool = False) -> int:
        """Have no router give the worker new work, or with `resume` give it some again; requests that it still runs.

        For admins. Raises InvalidParameter if a router does not know the worker; what others did then stands.
        """
        request = cluster_pb.DrainRequest(worker_id=worker_id, resume=resume)
        answers = await self._every(lambda router: router.cluster_stub.Drain, request)
        return sum(answer.num_live for answer in answers)

    async def pin_prefix(
        self, prompt: Prompt | None = None, *, token_ids: Sequence[int] | None = None, model: str = ""
    ) -> PinnedPrefix:
        """Have every worker compute the prompt's beginning and keep it for this caller's requests."""
        request = requests.pin_request(prompt, token_ids, model=model)
        answers = await self._every(lambda router: router.cluster_stub.PinPrefix, request)
        [pin] = responses.to_pins([answer.pin for answer in answers])
        return pin

    async def unpin_prefix(self, pin_id: str) -> bool:
        """Let a prefix go; False if the caller has no such pin."""
        request = cluster_pb.UnpinPrefixRequest(pin_id=pin_id)
        answers = await self._every(lambda router: router.cluster_stub.UnpinPrefix, request)
        return any(answer.found for answer in answers)

    async def pins(self) -> tuple[PinnedPrefix, ...]:
        """What the caller has pinned."""
        answers = await self._every(lambda router: router.cluster_stub.ListPins, cluster_pb.ListPinsRequest())
        return responses.to_pins([pin for answer in answers for pin in answer.pins])

    async def _every(self, method: _Method[_T], request: object) -> list[_T]:
        """Every router's answer; all are asked before the first error is raised."""
        asked = [self._unary(method, request, Endpoints([endpoint])) for endpoint in self._endpoints]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _stream(self, request: pb.GenerateRequest) -> AnswerStream:
        return AnswerStream(request, self._attempts(), self._metadata, resume=self._resume)

    async def _unary(self, method: _Method[_T], request: object, endpoints: Endpoints | None = None) -> _T:
        """Every unary call may be repeated: none changes what another one answers."""
        attempts = self._attempts(endpoints)
        while True:
            call, timeout_s = method(attempts.next()), attempts.remaining_s()
            try:
                response = await call(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as rpc_error:
                error = errors.from_rpc_error(rpc_error)
                await attempts.failed(error, may_repeat=error.retryable)
            else:
                attempts.answered()
                return response

    def _attempts(self, endpoints: Endpoints | None = None) -> Attempts:
        return Attempts(self._retry, endpoints or self._endpoints, self._timeout_s)
