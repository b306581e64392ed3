"""Between frozen messages and the wire: of a router-worker session, and of what routers tell to operators.

On a request's path this stands twice on either side of the session: the router turns a `Request` into a `Submit`, the
worker turns it back; the worker turns a `Delta` or `Failure` into a `WorkerDelta`, the router turns it back.
Every pair is exact: `x_from_proto(x_to_proto(m)) == m`.
"""

from __future__ import annotations

from types import MappingProxyType

from protos import errors
from protos.messages import (
    Delta,
    EngineTotals,
    Failure,
    Finish,
    FinishReason,
    KVEvents,
    Load,
    Pin,
    PositionLogprobs,
    PrefixSource,
    Request,
    ResumePoint,
    Sampling,
    Speculation,
)
from protos.overview import Latency, Overview, WorkerOverview, WorkerState
from protos.v1 import cluster_pb2 as cluster_pb
from protos.v1 import inference_pb2 as pb
from protos.v1 import session_pb2 as session_pb
from protos.v1 import totals_pb2 as totals_pb

_REASON_TO_PROTO: MappingProxyType[FinishReason, pb.FinishReason.ValueType] = MappingProxyType(
    {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH, "abort": pb.FINISH_REASON_ABORT}
)
_REASON_FROM_PROTO: MappingProxyType[int, FinishReason] = MappingProxyType(
    {number: reason for reason, number in _REASON_TO_PROTO.items()}
)

_STATE_TO_PROTO: MappingProxyType[WorkerState, cluster_pb.WorkerState.ValueType] = MappingProxyType(
    {
        "unknown": cluster_pb.WORKER_STATE_UNSPECIFIED,
        "connecting": cluster_pb.WORKER_STATE_CONNECTING,
        "warming": cluster_pb.WORKER_STATE_WARMING,
        "ready": cluster_pb.WORKER_STATE_READY,
        "draining": cluster_pb.WORKER_STATE_DRAINING,
    }
)
_STATE_FROM_PROTO: MappingProxyType[int, WorkerState] = MappingProxyType(
    {number: state for state, number in _STATE_TO_PROTO.items()}
)

_SPECULATION_TO_PROTO: MappingProxyType[Speculation, pb.Speculation.ValueType] = MappingProxyType(
    {"auto": pb.SPECULATION_AUTO, "off": pb.SPECULATION_OFF}
)
_SPECULATION_FROM_PROTO: MappingProxyType[int, Speculation] = MappingProxyType(
    {number: choice for choice, number in _SPECULATION_TO_PROTO.items()}
)


def submit_to_proto(request: Request) -> session_pb.Submit:
    """The request as it goes to a worker."""
    return session_pb.Submit(
        request_id=request.request_id,
        token_ids=request.token_ids,
        sampling=sampling_to_proto(request.sampling),
        cache_salt=request.cache_salt,
        resume=[resume_to_proto(point) for point in request.resume],
        priority=request.priority,
        prompt_logprobs_from=request.prompt_logprobs_from or None,
        deadline=request.deadline or 0.0,
        speculation=speculation_to_proto(request.speculation),
        prefix_source=prefix_source_to_proto(request.prefix_source),
        traceparent=request.traceparent,
    )


def submit_from_proto(submit: session_pb.Submit) -> Request:
    """The request as a worker runs it."""
    return Request(
        request_id=submit.request_id,
        token_ids=tuple(submit.token_ids),
        sampling=sampling_from_proto(submit.sampling),
        cache_salt=submit.cache_salt,
        priority=submit.priority,
        prompt_logprobs_from=submit.prompt_logprobs_from,
        deadline=submit.deadline or None,
        resume=tuple(resume_from_proto(point) for point in submit.resume),
        speculation=speculation_from_proto(submit.speculation),
        prefix_source=prefix_source_from_proto(submit.prefix_source) if submit.HasField("prefix_source") else None,
        traceparent=submit.traceparent,
    )


def prefix_source_to_proto(source: PrefixSource | None) -> session_pb.PrefixSource | None:
    """Who has more of a prompt, as a wire message."""
    if source is None:
        return None
    return session_pb.PrefixSource(worker_id=source.worker_id, address=source.address, num_tokens=source.num_tokens)


def prefix_source_from_proto(message: session_pb.PrefixSource) -> PrefixSource:
    """Who has more of a prompt, from a wire message."""
    return PrefixSource(message.worker_id, message.address, message.num_tokens)


def pin_to_proto(pin: Pin) -> session_pb.Pin:
    """A prefix to keep, as a wire message."""
    return session_pb.Pin(
        pin_id=pin.pin_id,
        cache_salt=pin.cache_salt,
        token_ids=pin.token_ids,
        prefix_source=prefix_source_to_proto(pin.prefix_source),
    )


def pin_from_proto(message: session_pb.Pin) -> Pin:
    """A prefix to keep, from a wire message."""
    source = prefix_source_from_proto(message.prefix_source) if message.HasField("prefix_source") else None
    return Pin(message.pin_id, message.cache_salt, tuple(message.token_ids), source)


def speculation_to_proto(speculation: Speculation) -> pb.Speculation.ValueType:
    """The choice as a wire value."""
    return _SPECULATION_TO_PROTO[speculation]


def speculation_from_proto(value: int) -> Speculation:
    """The choice from a wire value; one that was not made is "auto". Raises InvalidParameter for an unknown one."""
    if value == pb.SPECULATION_UNSPECIFIED:
        return "auto"
    found = _SPECULATION_FROM_PROTO.get(value)
    if found is None:
        raise errors.InvalidParameter(f"speculation {value} is unknown; give SPECULATION_AUTO or SPECULATION_OFF")
    return found


def sampling_to_proto(sampling: Sampling) -> session_pb.ResolvedSampling:
    """Complete sampling parameters as a wire message."""
    return session_pb.ResolvedSampling(
        n=sampling.n,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def sampling_from_proto(message: session_pb.ResolvedSampling) -> Sampling:
    """Complete sampling parameters from a wire message."""
    return Sampling(
        seed=message.seed,
        max_tokens=message.max_tokens,
        n=message.n,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=MappingProxyType(dict(message.logit_bias)),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def resume_to_proto(point: ResumePoint) -> session_pb.Resume:
    """What an output had emitted, as a wire message."""
    return session_pb.Resume(index=point.index, token_ids=point.token_ids, finished=point.finished)


def resume_from_proto(message: session_pb.Resume) -> ResumePoint:
    """What an output had emitted, from a wire message."""
    return ResumePoint(index=message.index, token_ids=tuple(message.token_ids), finished=message.finished)


def delta_to_proto(delta: Delta) -> session_pb.WorkerDelta:
    """New text and tokens as they go to the router."""
    return session_pb.WorkerDelta(
        request_id=delta.request_id,
        output=output_to_proto(delta),
        cached_tokens=delta.cached_tokens,
        prompt_logprobs=[logprobs_to_proto(position) for position in delta.prompt_logprobs],
    )


def delta_from_proto(message: session_pb.WorkerDelta) -> Delta | Failure:
    """What a worker says of one request: new tokens, or that it failed."""
    if message.HasField("error"):
        return Failure(message.request_id, message.error.kind, message.error.message)
    output = message.output
    return Delta(
        request_id=message.request_id,
        index=output.index,
        text=output.text,
        token_ids=tuple(output.token_ids),
        logprobs=tuple(logprobs_from_proto(position) for position in output.logprobs),
        finish=finish_from_proto(output.finish) if output.HasField("finish") else None,
        cached_tokens=message.cached_tokens if message.HasField("cached_tokens") else None,
        prompt_logprobs=tuple(logprobs_from_proto(position) for position in message.prompt_logprobs),
    )


def failure_to_proto(failure: Failure) -> session_pb.WorkerDelta:
    """A request's failure as it goes to the router; `retryable` follows from the kind."""
    retryable = failure_to_error(failure).retryable
    detail = pb.ErrorDetail(kind=failure.kind, message=failure.message, retryable=retryable)
    return session_pb.WorkerDelta(request_id=failure.request_id, error=detail)


def failure_to_error(failure: Failure) -> errors.HeadwaterError:
    """The typed error a failure stands for; an unknown kind becomes EngineFailure."""
    return errors.from_detail(pb.ErrorDetail(kind=failure.kind, message=failure.message))


def output_to_proto(delta: Delta) -> pb.OutputDelta:
    """The part of a delta that a client sees."""
    return pb.OutputDelta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[logprobs_to_proto(position) for position in delta.logprobs],
        finish=None if delta.finish is None else finish_to_proto(delta.finish),
    )


def logprobs_to_proto(position: PositionLogprobs) -> pb.PositionLogprobs:
    """Log-probabilities of one position as a wire message."""
    top = [pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in position.top]
    return pb.PositionLogprobs(token_id=position.token_id, logprob=position.logprob, top=top)


def logprobs_from_proto(message: pb.PositionLogprobs) -> PositionLogprobs:
    """Log-probabilities of one position from a wire message."""
    return PositionLogprobs(
        message.token_id, message.logprob, tuple((candidate.token_id, candidate.logprob) for candidate in message.top)
    )


def finish_to_proto(finish: Finish) -> pb.Finish:
    """Why an output ended, as a wire message; at most one of `stop` and `stop_token_id` is set."""
    assert finish.stop is None or finish.stop_token_id is None, finish
    message = pb.Finish(reason=_REASON_TO_PROTO[finish.reason])
    if finish.stop is not None:
        message.stop = finish.stop
    if finish.stop_token_id is not None:
        message.stop_token_id = finish.stop_token_id
    return message


def finish_from_proto(message: pb.Finish) -> Finish:
    """Why an output ended, from a wire message. A reason this version does not know is an EngineFailure."""
    reason = _REASON_FROM_PROTO.get(message.reason)
    if reason is None:
        raise errors.EngineFailure(f"finish reason {message.reason} is unknown: router and worker differ in version")
    return Finish(
        reason,
        stop=message.stop if message.HasField("stop") else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
    )


def load_to_proto(load: Load) -> session_pb.WorkerLoad:
    """A worker's load as a wire message."""
    return session_pb.WorkerLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        pending_prefill_tokens=load.pending_prefill_tokens,
        kv_used_tokens=load.kv_used_tokens,
        kv_capacity_tokens=load.kv_capacity_tokens,
        draining=load.draining,
    )


def load_from_proto(message: session_pb.WorkerLoad) -> Load:
    """A worker's load from a wire message."""
    return Load(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        pending_prefill_tokens=message.pending_prefill_tokens,
        kv_used_tokens=message.kv_used_tokens,
        kv_capacity_tokens=message.kv_capacity_tokens,
        draining=message.draining,
    )


def totals_to_proto(totals: EngineTotals) -> totals_pb.EngineTotals:
    """An engine's totals as a wire message, whose fields have the same names."""
    return totals_pb.EngineTotals(**totals._asdict())


def totals_from_proto(message: totals_pb.EngineTotals) -> EngineTotals:
    """An engine's totals from a wire message."""
    return EngineTotals(*(getattr(message, name) for name in EngineTotals._fields))


def kv_events_to_proto(events: KVEvents) -> session_pb.KVEvents:
    """Changes of a prefix cache as a wire message."""
    return session_pb.KVEvents(
        sequence=events.sequence, snapshot=events.snapshot, stored=events.stored, removed=events.removed
    )


def kv_events_from_proto(message: session_pb.KVEvents) -> KVEvents:
    """Changes of a prefix cache from a wire message."""
    return KVEvents(message.sequence, tuple(message.stored), tuple(message.removed), message.snapshot)


def overview_to_proto(overview: Overview) -> cluster_pb.GetOverviewResponse:
    """What one router tells, as a wire message."""
    [router_id] = overview.router_ids
    return cluster_pb.GetOverviewResponse(
        router_id=router_id,
        model=overview.model,
        window_s=overview.window_s,
        num_live=overview.num_live,
        num_waiting=overview.num_waiting,
        outcomes=overview.outcomes,
        time_to_first_token=_latency_to_proto(overview.time_to_first_token),
        inter_token=_latency_to_proto(overview.inter_token),
        generation_history=overview.generation_history,
        prompt_history=overview.prompt_history,
        workers=map(_worker_to_proto, overview.workers),
    )


def overview_from_proto(message: cluster_pb.GetOverviewResponse) -> Overview:
    """What one router tells, from a wire message."""
    return Overview(
        router_ids=(message.router_id,),
        model=message.model,
        window_s=message.window_s,
        num_live=message.num_live,
        num_waiting=message.num_waiting,
        outcomes=dict(message.outcomes),
        time_to_first_token=_latency_from_proto(message.time_to_first_token),
        inter_token=_latency_from_proto(message.inter_token),
        generation_history=tuple(message.generation_history),
        prompt_history=tuple(message.prompt_history),
        workers=tuple(map(_worker_from_proto, message.workers)),
    )


def state_to_proto(state: WorkerState) -> cluster_pb.WorkerState.ValueType:
    """A worker's state on the wire."""
    return _STATE_TO_PROTO[state]


def state_from_proto(number: int) -> WorkerState:
    """`unknown` for states of later versions."""
    return _STATE_FROM_PROTO.get(number, "unknown")


def _latency_to_proto(latency: Latency) -> cluster_pb.Latency:
    return cluster_pb.Latency(bounds=latency.bounds, counts=latency.counts)


def _latency_from_proto(message: cluster_pb.Latency) -> Latency:
    return Latency(tuple(message.bounds), tuple(message.counts))


def _worker_to_proto(worker: WorkerOverview) -> cluster_pb.WorkerOverview:
    return cluster_pb.WorkerOverview(
        worker_id=worker.worker_id,
        state=state_to_proto(worker.state),
        num_running=worker.num_running,
        num_waiting=worker.num_waiting,
        kv_used_tokens=worker.kv_used_tokens,
        kv_capacity_tokens=worker.kv_capacity_tokens,
        recent=totals_to_proto(worker.recent),
        window=totals_to_proto(worker.window),
    )


def _worker_from_proto(message: cluster_pb.WorkerOverview) -> WorkerOverview:
    return WorkerOverview(
        worker_id=message.worker_id,
        state=state_from_proto(message.state),
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        kv_used_tokens=message.kv_used_tokens,
        kv_capacity_tokens=message.kv_capacity_tokens,
        recent=totals_from_proto(message.recent),
        window=totals_from_proto(message.window),
    )
