"""From protos to what callers get."""

from __future__ import annotations

from collections.abc import Sequence

from protos import errors
from protos.client.types import (
    Completion,
    ContinuationScore,
    GenerateEvent,
    Output,
    OutputDelta,
    PinnedPrefix,
    PromptInfo,
    RouteCandidate,
    RouteExplanation,
    Scores,
    ServedModel,
    TenantQueue,
    Topology,
    Usage,
    WorkerView,
)
from protos.convert import finish_from_proto, logprobs_from_proto, state_from_proto
from protos.v1 import cluster_pb2 as cluster_pb
from protos.v1 import inference_pb2 as pb


def to_event(response: pb.GenerateResponse) -> GenerateEvent:
    """One message of a stream."""
    return GenerateEvent(
        prompt=_prompt_info(response.prompt) if response.HasField("prompt") else None,
        outputs=tuple(_output_delta(output) for output in response.outputs),
        prompt_logprobs=tuple(logprobs_from_proto(position) for position in response.prompt_logprobs),
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def to_completion(events: Sequence[GenerateEvent], route: str = "") -> Completion:
    """All events of one stream, joined. A stream that ended without error has its usage."""
    prompt, usage = events[0].prompt, events[-1].usage
    if prompt is None or usage is None:
        raise errors.EngineFailure("the stream came without its facts; client and router differ in version")
    deltas = [delta for event in events for delta in event.outputs]
    indices = sorted({delta.index for delta in deltas})
    return Completion(
        prompt=prompt,
        outputs=tuple(_output([delta for delta in deltas if delta.index == index]) for index in indices),
        prompt_logprobs=tuple(position for event in events for position in event.prompt_logprobs),
        usage=usage,
        route=route,
    )


def to_scores(response: pb.ScoreResponse) -> Scores:
    """The scores and their usage."""
    scores = tuple(
        ContinuationScore(score.logprob, tuple(score.token_ids), tuple(score.token_logprobs))
        for score in response.scores
    )
    return Scores(scores, _usage(response.usage))


def to_models(response: pb.ListModelsResponse) -> tuple[ServedModel, ...]:
    """The models served."""
    return tuple(
        ServedModel(model.name, model.max_context, model.vocab_size, model.num_workers) for model in response.models
    )


def to_topology(response: cluster_pb.GetTopologyResponse) -> Topology:
    """What one router sees."""
    return Topology(
        router_id=response.router_id,
        model=response.model,
        policy=response.policy,
        num_waiting=response.queue.num_requests,
        num_waiting_tokens=response.queue.num_tokens,
        workers=tuple(map(_worker, response.workers)),
        tenants=tuple(TenantQueue(t.tenant, t.num_waiting, t.num_running) for t in response.queue.tenants),
    )


def to_explanation(response: cluster_pb.ExplainRouteResponse) -> RouteExplanation:
    """Where a prompt would run, and why."""
    candidates = tuple(
        RouteCandidate(
            c.worker_id, c.cost, c.cached_tokens, c.live_tokens, c.load_tokens, c.has_room, c.fetchable_tokens
        )
        for c in response.candidates
    )
    return RouteExplanation(response.worker_id, response.reason, response.prompt_tokens, candidates)


def to_pins(messages: Sequence[cluster_pb.PinnedPrefix]) -> tuple[PinnedPrefix, ...]:
    """Each pin once, whichever routers told of it."""
    pins: dict[str, PinnedPrefix] = {}
    for message in sorted(messages, key=lambda message: message.num_workers):
        pins.setdefault(message.pin_id, PinnedPrefix(message.pin_id, message.num_tokens, message.num_workers))
    return tuple(pins[pin_id] for pin_id in dict.fromkeys(message.pin_id for message in messages))


def _worker(message: cluster_pb.Worker) -> WorkerView:
    return WorkerView(
        worker_id=message.worker_id,
        address=message.address,
        state=state_from_proto(message.state),
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        pending_prefill_tokens=message.pending_prefill_tokens,
        kv_used_tokens=message.kv_used_tokens,
        kv_capacity_tokens=message.kv_capacity_tokens,
        reserved_outputs=message.reserved_outputs,
        reserved_prefill_tokens=message.reserved_prefill_tokens,
        reserved_decode_tokens=message.reserved_decode_tokens,
        known_cached_tokens=message.known_cached_tokens,
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
