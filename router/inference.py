"""The public service: each call is validated, tokenized, admitted, streamed and ended here.

First on a request's path: the bytes of a client become a frozen `Request` in a `Group`, which admission places.
"""

# ruff: noqa: N802  (gRPC names the methods)

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from protos import errors
from protos.convert import speculation_from_proto
from protos.messages import ModelInfo, Request, Sampling
from protos.tracing import Tracer, current
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc
from router import spans
from router.admission import Admission
from router.calls import Calls, Context
from router.fleet import Fleet
from router.group import Group
from router.pacer import Pacer
from router.stream import Stream
from router.tenants import Tenant, Tenants
from router.tokenizer import Tokenizer
from router.validation import Rules, check_prompt, check_received, check_token_ids, decode_text

WORKER_TRAILER = "headwater-worker"
ROUTE_TRAILER = "headwater-route"


class Inference(pb_grpc.InferenceServicer):
    """Serves `headwater.v1.Inference`. Each call ends in its answer or in one typed error with its trailer."""

    def __init__(
        self,
        rules: Rules,
        *,
        tokenizer: Tokenizer,
        tenants: Tenants,
        admission: Admission,
        fleet: Fleet,
        calls: Calls,
        pacer: Pacer,
        tracer: Tracer,
        router_id: str,
    ) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._tenants = tenants
        self._admission = admission
        self._fleet = fleet
        self._calls = calls
        self._pacer = pacer
        self._tracer = tracer
        self._router_id = router_id
        self._serial = itertools.count(1)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Writes to the context rather than yielding, so that a client's disconnect ends this very coroutine."""
        await self._calls.answer("Generate", context, partial(self._generate, request, context))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """One worker request per continuation, in one packed group: the context is computed once."""
        return await self._calls.answer("Score", context, partial(self._score, request, context))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """As a text prompt is tokenized, special tokens included."""
        return await self._calls.answer("Tokenize", context, partial(self._tokenize, request))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """The text of token ids, special tokens included."""
        return await self._calls.answer("Detokenize", context, partial(self._detokenize, request))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Empty until the first worker has told its limits."""
        return await self._calls.answer("ListModels", context, self._list_models)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Ends a live Generate with finish reason ABORT, a live Score with the error Aborted."""
        return await self._calls.answer("Abort", context, partial(self._abort, request))

    async def _generate(self, request: pb.GenerateRequest, context: Context, tenant: Tenant) -> str:
        """The outcome, after the last message."""
        group = await self._generate_group(request, context, tenant)
        (stream,) = group.streams
        if not stream.ended:  # a resumed call may lack nothing but its last message
            self._admission.admit(group)
        try:
            with self._pacer.stream():
                while (response := await stream.next_response()) is not None:
                    await context.write(response)
        finally:
            self._conclude(group, context)
            self._admission.release(group)
        return stream.outcome

    async def _score(self, request: pb.ScoreRequest, context: Context, tenant: Tenant) -> pb.ScoreResponse:
        group = await self._score_group(request, context, tenant)
        self._admission.admit(group)
        try:
            scores = [await _continuation_score(stream) for stream in group.streams]
        finally:
            self._conclude(group, context)
            self._admission.release(group)
        return pb.ScoreResponse(scores=scores, usage=_score_usage(group))

    def _conclude(self, group: Group, context: Context) -> None:
        """Say in the call's trailer and trace which worker ran the group, and why that one."""
        decision = self._admission.decision(group)
        spans.record(self._tracer, current(), group, decision)
        if decision is not None:
            context.set_trailing_metadata(((WORKER_TRAILER, decision.worker_id), (ROUTE_TRAILER, str(decision))))

    async def _tokenize(self, request: pb.TokenizeRequest, _: Tenant) -> pb.TokenizeResponse:
        self._rules.check_model(request.model)
        return pb.TokenizeResponse(ids=await self._tokenizer.encode(decode_text("text", request.text)))

    async def _detokenize(self, request: pb.DetokenizeRequest, _: Tenant) -> pb.DetokenizeResponse:
        self._rules.check_model(request.model)
        check_token_ids("ids", request.ids, self._tokenizer.vocab_size)
        return pb.DetokenizeResponse(text=await self._tokenizer.decode(request.ids))

    async def _list_models(self, _: Tenant) -> pb.ListModelsResponse:
        model = self._fleet.model
        return pb.ListModelsResponse(models=[] if model is None else [self._model_message(model)])

    async def _abort(self, request: pb.AbortRequest, tenant: Tenant) -> pb.AbortResponse:
        return pb.AbortResponse(found=self._admission.abort(_group_id(tenant, request.request_id)))

    # --- from protos to groups ---

    async def _generate_group(self, request: pb.GenerateRequest, context: Context, tenant: Tenant) -> Group:
        started = time.monotonic()
        client_id = self._client_id(tenant, request.request_id)
        self._rules.check_model(request.model)
        text = decode_text("prompt", request.text) if request.HasField("text") else None
        model = await self._admission.model()
        token_ids = await self._token_ids("the prompt", text, request.tokens)
        check_prompt("the prompt", token_ids, model)
        sampling = self._rules.resolve(request.sampling, num_prompt_tokens=len(token_ids), model=model)
        remaining_s = self._remaining_s(context)
        worker_request = Request(
            request_id=self._session_id(client_id),
            token_ids=token_ids,
            sampling=sampling,
            cache_salt=self._tenants.cache_salt(tenant),
            priority=min(request.priority, tenant.max_priority),
            deadline=time.time() + remaining_s,
            resume=check_received(request.received, sampling, has_seed=request.sampling.HasField("seed"), model=model),
            speculation=speculation_from_proto(request.speculation),
            traceparent=current().traceparent,
        )
        group_id = _group_id(tenant, client_id)
        stream = Stream(worker_request, client_id=client_id, group_id=group_id, model=model.name, created=started)
        return Group(group_id, (stream,), tenant, remaining_s)

    async def _score_group(self, request: pb.ScoreRequest, context: Context, tenant: Tenant) -> Group:
        started = time.monotonic()
        client_id = self._client_id(tenant, request.request_id)
        self._rules.check_model(request.model)
        self._rules.check_num_continuations(len(request.continuations))
        text = decode_text("context", request.text) if request.HasField("text") else None
        model = await self._admission.model()
        shared = await self._token_ids("the context", text, request.tokens)
        check_prompt("the context", shared, model)
        continuations = [
            await self._continuation(index, continuation, is_text=text is not None)
            for index, continuation in enumerate(request.continuations)
        ]
        self._rules.check_score_tokens(sum(len(shared) + len(continuation) for continuation in continuations))
        for index, continuation in enumerate(continuations):
            check_prompt(f"the context with continuation {index}", shared + continuation, model)
        remaining_s = self._remaining_s(context)
        group_id, deadline = _group_id(tenant, client_id), time.time() + remaining_s
        salt, priority = self._tenants.cache_salt(tenant), min(request.priority, tenant.max_priority)
        streams = tuple(
            Stream(
                replace(
                    self._score_request(client_id, shared, continuation),
                    cache_salt=salt,
                    priority=priority,
                    deadline=deadline,
                ),
                client_id=client_id,
                group_id=group_id,
                model=model.name,
                prefill_tokens=len(continuation) + (0 if index else len(shared)),
                created=started,
            )
            for index, continuation in enumerate(continuations)
        )
        return Group(group_id, streams, tenant, remaining_s)

    def _score_request(self, client_id: str, shared: tuple[int, ...], continuation: tuple[int, ...]) -> Request:
        """Computes nothing but the log-probabilities of the continuation's tokens."""
        return Request(
            request_id=self._session_id(client_id),
            token_ids=shared + continuation,
            sampling=Sampling(seed=0, max_tokens=0, temperature=0.0, prompt_logprobs=0),
            prompt_logprobs_from=len(shared),
            traceparent=current().traceparent,
        )

    async def _continuation(self, index: int, continuation: pb.Continuation, *, is_text: bool) -> tuple[int, ...]:
        """A text continuation is tokenized alone and without special tokens."""
        name = f"continuation {index}"
        if continuation.WhichOneof("content") not in (None, "text" if is_text else "tokens"):
            raise errors.InvalidParameter(
                f"{name} and the context differ in kind; give text with a text context, token ids with token ids"
            )
        text = decode_text(name, continuation.text) if continuation.HasField("text") else None
        return await self._token_ids(name, text, continuation.tokens, special_tokens=False)

    async def _token_ids(
        self, name: str, text: str | None, tokens: pb.TokenIds, *, special_tokens: bool = True
    ) -> tuple[int, ...]:
        """The ids of whichever of the two was given. Raises EmptyPrompt if it is empty or neither was."""
        token_ids = tuple(tokens.ids)
        if text:
            token_ids = await self._tokenizer.encode(text, special_tokens=special_tokens)
        if not token_ids:
            raise errors.EmptyPrompt(f"{name} is empty; give at least one character of text or one token id")
        return token_ids

    def _client_id(self, tenant: Tenant, request_id: str) -> str:
        self._rules.check_request_id(request_id)
        client_id = request_id or f"{self._router_id}-{next(self._serial)}"
        self._admission.check_id(_group_id(tenant, client_id))
        return client_id

    def _session_id(self, client_id: str) -> str:
        """An id no worker has seen: a client may use its own again as soon as the request has ended."""
        return f"{client_id}@{self._router_id}.{next(self._serial)}"

    def _remaining_s(self, context: Context) -> float:
        remaining_s: float | None = context.time_remaining()  # None, whatever the stubs say, without a deadline
        limit_s = self._rules.limits.max_request_s
        return limit_s if remaining_s is None else min(remaining_s, limit_s)

    def _model_message(self, model: ModelInfo) -> pb.Model:
        return pb.Model(
            name=model.name,
            max_context=model.max_context,
            vocab_size=model.vocab_size,
            num_workers=self._fleet.num_connected,
        )


def _group_id(tenant: Tenant, client_id: str) -> str:
    """Tenants choose ids without knowing each other's."""
    return f"{tenant.name}/{client_id}"


async def _continuation_score(stream: Stream) -> pb.ContinuationScore:
    """The score of one continuation, when its stream has ended."""
    positions: list[pb.PositionLogprobs] = []
    while (response := await stream.next_response()) is not None:
        positions.extend(response.prompt_logprobs)
    if stream.outcome == "abort":
        raise errors.Aborted("the call was aborted before its scores were complete")
    token_ids = stream.request.token_ids[stream.request.prompt_logprobs_from :]
    _check_positions(stream, token_ids, positions)
    logprobs = [position.logprob for position in positions]
    return pb.ContinuationScore(logprob=sum(logprobs), token_ids=token_ids, token_logprobs=logprobs)


def _check_positions(stream: Stream, token_ids: Sequence[int], positions: Sequence[pb.PositionLogprobs]) -> None:
    if [position.token_id for position in positions] != list(token_ids):
        raise errors.EngineFailure(
            f"worker {stream.worker_id} scored {len(positions)} tokens, not the {len(token_ids)} asked for; report this"
        )


def _score_usage(group: Group) -> pb.Usage:
    """The context counts once, and so do its cached tokens."""
    first = group.streams[0]
    return pb.Usage(prompt_tokens=group.num_tokens, cached_tokens=first.usage.cached_tokens)
