"""From a caller's arguments to protos. What the wire cannot carry is refused here, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from protos import errors
from protos.client.types import Prompt, SamplingOptions
from protos.convert import speculation_to_proto
from protos.messages import Speculation
from protos.v1 import cluster_pb2 as cluster_pb
from protos.v1 import inference_pb2 as pb


def generate_request(
    prompt: Prompt | None,
    token_ids: Sequence[int] | None,
    *,
    model: str,
    request_id: str,
    speculation: Speculation,
    priority: int | None,
    sampling: SamplingOptions,
) -> pb.GenerateRequest:
    """Raises InvalidParameter, TokenOutOfRange, InvalidText or EmptyPrompt."""
    request = pb.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=_sampling_to_proto(sampling),
        speculation=_speculation_to_proto(speculation),
    )
    set_priority(request, priority)
    set_content(request, "prompt", prompt, token_ids)
    return request


def score_request(
    context: Prompt, continuations: Sequence[Prompt], *, model: str, request_id: str, priority: int | None
) -> pb.ScoreRequest:
    """Raises as `generate_request` does."""
    request = pb.ScoreRequest(request_id=request_id, model=model)
    set_priority(request, priority)
    set_content(request, "the context", context, None)
    for index, continuation in enumerate(continuations):
        set_content(request.continuations.add(), f"continuation {index}", continuation, None)
    return request


def explain_request(
    prompt: Prompt | None, token_ids: Sequence[int] | None, *, model: str, max_tokens: int | None
) -> cluster_pb.ExplainRouteRequest:
    """Raises InvalidParameter, TokenOutOfRange, InvalidText or EmptyPrompt."""
    request = cluster_pb.ExplainRouteRequest(model=model)
    set_content(request, "prompt", prompt, token_ids)
    try:
        if max_tokens is not None:
            request.max_tokens = max_tokens
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.InvalidParameter(f"max_tokens cannot be sent ({error}); give an integer from 0 up") from None
    return request


def pin_request(prompt: Prompt | None, token_ids: Sequence[int] | None, *, model: str) -> cluster_pb.PinPrefixRequest:
    """Raises as `explain_request` does."""
    request = cluster_pb.PinPrefixRequest(model=model)
    set_content(request, "prompt", prompt, token_ids)
    return request


def set_priority(request: pb.GenerateRequest | pb.ScoreRequest, priority: int | None) -> None:
    """Raises InvalidParameter if it is no 32-bit integer."""
    if priority is None:
        return
    try:
        request.priority = priority
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.InvalidParameter(f"priority cannot be sent ({error}); give an integer of 32 bits") from None


def set_content(
    message: pb.GenerateRequest
    | pb.ScoreRequest
    | pb.Continuation
    | cluster_pb.ExplainRouteRequest
    | cluster_pb.PinPrefixRequest,
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
        message.text = as_bytes(content)
        return
    message.tokens.SetInParent()
    extend(message.tokens.ids, name, token_ids if content is None else content)


def extend(ids: Any, name: str, token_ids: Sequence[int] | None) -> None:
    """Append token ids to a repeated field. Raises TokenOutOfRange for what is none."""
    try:
        ids.extend(token_ids or ())
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.TokenOutOfRange(
            f"{name} has something that is no token id ({error}); give integers from 0 up"
        ) from None


def as_bytes(text: str | bytes) -> bytes:
    """Raises InvalidText if the text has no UTF-8 form."""
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
