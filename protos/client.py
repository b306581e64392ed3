"""A typed asyncio client of `headwater.v1.Inference`. Imports gRPC and the protos only.

    async with Client("localhost:9000") as client:
        async for event in client.generate("Once upon a time", max_tokens=32):
            print("".join(output.text for output in event.outputs), end="")

Errors are those of `protos.errors`. Calls that failed in a retryable way are sent again a bounded number of times, with
jitter and no earlier than the router asked for; a stream only before its first message, never after it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, get_args

import grpc

from protos import errors
from protos.convert import finish_from_proto, logprobs_from_proto, speculation_to_proto
from protos.messages import Finish, PositionLogprobs, Speculation
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc

Prompt = str | bytes | Sequence[int]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen; see `SamplingParams` in inference.proto. None: the router's default."""

    n: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Facts of a request."""

    request_id: str
    model: str
    num_tokens: int
    seed: int  # in force, given or chosen
    worker_id: str


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new in one output."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None  # on the output's last delta


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """One message of a stream."""

    prompt: PromptInfo | None  # on the first event
    outputs: tuple[OutputDelta, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...]
    usage: Usage | None  # on the last event


@dataclass(frozen=True, slots=True)
class Output:
    """One complete output."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer."""

    prompt: PromptInfo
    outputs: tuple[Output, ...]  # by index
    prompt_logprobs: tuple[PositionLogprobs, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first output's text."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How probable one continuation is."""

    logprob: float  # the sum
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """One score per continuation, in the order asked."""

    scores: tuple[ContinuationScore, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A served model and its limits."""

    name: str
    max_context: int
    vocab_size: int
    num_workers: int


@dataclass(frozen=True, slots=True)
class ClientTLS:
    """PEM files. Without `ca_file` the system's authorities count; certificate and key are for mutual TLS."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast a failed call is sent again."""

    max_attempts: int = 4
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def delay_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds before attempt number `attempt + 1`: doubling, jittered, no earlier than the router asked for."""
        delay_s = min(self.first_delay_s * 2.0 ** (attempt - 1), self.max_delay_s) * random.uniform(0.5, 1.0)
        return delay_s if retry_after_s is None else max(delay_s, retry_after_s * random.uniform(1.0, 1.2))


class Client:
    """A connection to a cluster. Use as an async context manager, or call `close`."""

    def __init__(
        self,
        target: str,
        *,
        tls: ClientTLS | None = None,
        api_key: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """`timeout_s` bounds each call, retries included."""
        self._channel = _channel(target, tls)
        self._stub: pb_grpc.InferenceAsyncStub = pb_grpc.InferenceStub(self._channel)
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        request_id: str = "",
        speculation: Speculation = "auto",
        **sampling: Any,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Continue a prompt: events as they come. `sampling` takes the fields of SamplingOptions.

        `speculation` "off" has every token computed by itself: never another text, only another speed.
        Closing the iterator (`aclose`, or cancelling the task that reads it) cancels the request in the cluster.
        Raises InvalidParameter if both a text and token ids are given: the wire can carry only one of them.
        """
        request = pb.GenerateRequest(
            request_id=request_id,
            model=model,
            sampling=_sampling_to_proto(SamplingOptions(**sampling)),
            speculation=_speculation_to_proto(speculation),
        )
        _set_content(request, "prompt", prompt, token_ids)
        deadline = self._deadline()
        for attempt in range(1, self._retry.max_attempts + 1):
            call = self._stub.Generate(request, timeout=_remaining_s(deadline), metadata=self._metadata)
            started = False
            try:
                async for response in call:
                    started = True
                    yield _event(response)
                return
            except grpc.aio.AioRpcError as error:
                await self._before_retry(errors.from_rpc_error(error), attempt, deadline, may_retry=not started)
            finally:
                call.cancel()

    async def complete(
        self,
        prompt: Prompt | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        request_id: str = "",
        speculation: Speculation = "auto",
        **sampling: Any,
    ) -> Completion:
        """Continue a prompt: the whole answer. Arguments and errors as for `generate`."""
        events = self.generate(
            prompt, token_ids=token_ids, model=model, request_id=request_id, speculation=speculation, **sampling
        )
        return _completion([event async for event in events])

    async def score(
        self, context: Prompt, continuations: Sequence[Prompt], *, model: str = "", request_id: str = ""
    ) -> Scores:
        """Log-probabilities of continuations of one context. All are text, or all are token ids.

        A text context is tokenized once and each text continuation alone, without special tokens, so the tokens at the
        seam may differ from those of the joined text.
        """
        request = pb.ScoreRequest(request_id=request_id, model=model)
        _set_content(request, "the context", context, None)
        for index, continuation in enumerate(continuations):
            _set_content(request.continuations.add(), f"continuation {index}", continuation, None)
        response = await self._unary(self._stub.Score, request)
        scores = tuple(
            ContinuationScore(score.logprob, tuple(score.token_ids), tuple(score.token_logprobs))
            for score in response.scores
        )
        return Scores(scores, _usage(response.usage))

    async def tokenize(self, text: str | bytes, *, model: str = "") -> tuple[int, ...]:
        """Token ids of a text, as a prompt would be tokenized."""
        request = pb.TokenizeRequest(model=model, text=_as_bytes(text))
        return tuple((await self._unary(self._stub.Tokenize, request)).ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model)
        _extend(request.ids, "token_ids", token_ids)
        return (await self._unary(self._stub.Detokenize, request)).text

    async def models(self) -> tuple[ServedModel, ...]:
        """The models served; none while the cluster has never had a worker."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return tuple(
            ServedModel(model.name, model.max_context, model.vocab_size, model.num_workers) for model in response.models
        )

    async def abort(self, request_id: str) -> bool:
        """Stop a live request by its id; False if there is none."""
        return (await self._unary(self._stub.Abort, pb.AbortRequest(request_id=request_id))).found

    async def _unary(self, method: Callable[..., Awaitable[_T]], request: object) -> _T:
        """Every unary call may be repeated: none changes what another one answers."""
        deadline = self._deadline()
        for attempt in range(1, self._retry.max_attempts + 1):
            try:
                return await method(request, timeout=_remaining_s(deadline), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                await self._before_retry(errors.from_rpc_error(error), attempt, deadline)
        raise AssertionError("the last attempt returns or raises")

    async def _before_retry(
        self, error: errors.HeadwaterError, attempt: int, deadline: float | None, *, may_retry: bool = True
    ) -> None:
        """Wait until the next attempt; raises the error if there must not be one."""
        delay_s = self._retry.delay_s(attempt, error.retry_after_s)
        in_time = deadline is None or time.monotonic() + delay_s < deadline
        if not (may_retry and error.retryable and in_time and attempt < self._retry.max_attempts):
            raise error
        await asyncio.sleep(delay_s)

    def _deadline(self) -> float | None:
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s


def _channel(target: str, tls: ClientTLS | None) -> grpc.aio.Channel:
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),  # our own retries decide when to try again
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    ca, key, cert = (None if path is None else path.read_bytes() for path in (tls.ca_file, tls.key_file, tls.cert_file))
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options=options)


def _remaining_s(deadline: float | None) -> float | None:
    """Raises DeadlineExceeded once no time is left: such a call is not worth sending."""
    if deadline is None:
        return None
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise errors.DeadlineExceeded("the call's time was over before it was sent; give it a longer timeout")
    return remaining_s


def _set_content(
    message: pb.GenerateRequest | pb.ScoreRequest | pb.Continuation,
    name: str,
    content: Prompt | None,
    token_ids: Sequence[int] | None,
) -> None:
    """Text or token ids into the message's oneof. Raises InvalidParameter for both, EmptyPrompt for neither."""
    if content is not None and token_ids is not None:
        raise errors.InvalidParameter(f"{name} was given both as text and as token ids; give one of them")
    if content is None and token_ids is None:
        raise errors.EmptyPrompt(f"{name} is missing; give text or token ids")
    if isinstance(content, str | bytes):
        message.text = _as_bytes(content)
        return
    message.tokens.SetInParent()
    _extend(message.tokens.ids, name, token_ids if content is None else content)


def _extend(ids: Any, name: str, token_ids: Sequence[int] | None) -> None:
    try:
        ids.extend(token_ids or ())
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.TokenOutOfRange(
            f"{name} has something that is no token id ({error}); give integers from 0 up"
        ) from None


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidText(
            f"the text cannot be encoded as UTF-8: {error.reason} at {error.start}; remove it"
        ) from None


def _sampling_to_proto(options: SamplingOptions) -> pb.SamplingParams:
    fields = {name: getattr(options, name) for name in SamplingOptions.__slots__}
    try:
        return pb.SamplingParams(**{name: value for name, value in fields.items() if value is not None})
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.InvalidParameter(f"a sampling option has a value that cannot be sent: {error}") from None


def _speculation_to_proto(speculation: Speculation) -> pb.Speculation.ValueType:
    if speculation not in get_args(Speculation):
        raise errors.InvalidParameter(f"speculation is {speculation!r}; give one of {', '.join(get_args(Speculation))}")
    return speculation_to_proto(speculation)


def _event(response: pb.GenerateResponse) -> GenerateEvent:
    return GenerateEvent(
        prompt=_prompt_info(response.prompt) if response.HasField("prompt") else None,
        outputs=tuple(_output_delta(output) for output in response.outputs),
        prompt_logprobs=tuple(logprobs_from_proto(position) for position in response.prompt_logprobs),
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def _prompt_info(message: pb.PromptInfo) -> PromptInfo:
    return PromptInfo(message.request_id, message.model, message.num_tokens, message.seed, message.worker_id)


def _output_delta(message: pb.OutputDelta) -> OutputDelta:
    return OutputDelta(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprobs_from_proto(position) for position in message.logprobs),
        finish=finish_from_proto(message.finish) if message.HasField("finish") else None,
    )


def _usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def _completion(events: Sequence[GenerateEvent]) -> Completion:
    """All events of one stream, joined. A stream that ended without error has its facts and its usage."""
    prompt, usage = events[0].prompt, events[-1].usage
    if prompt is None or usage is None:
        raise errors.EngineFailure("the stream ended without its usage; client and router differ in version")
    deltas = [delta for event in events for delta in event.outputs]
    indices = sorted({delta.index for delta in deltas})
    return Completion(
        prompt=prompt,
        outputs=tuple(_output([delta for delta in deltas if delta.index == index]) for index in indices),
        prompt_logprobs=tuple(position for event in events for position in event.prompt_logprobs),
        usage=usage,
    )


def _output(deltas: Sequence[OutputDelta]) -> Output:
    finish = deltas[-1].finish
    if finish is None:
        raise errors.EngineFailure(f"output {deltas[-1].index} has no finish; client and router differ in version")
    return Output(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
        finish=finish,
    )
