"""Messages survive the wire exactly."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import convert, errors
from protos.messages import (
    Delta,
    EngineTotals,
    Failure,
    Finish,
    KVEvents,
    Load,
    Pin,
    PositionLogprobs,
    PrefixSource,
    Request,
    ResumePoint,
    Sampling,
)
from protos.overview import Latency, Overview, WorkerOverview, WorkerState
from protos.v1 import cluster_pb2 as cluster_pb
from protos.v1 import inference_pb2 as pb
from protos.v1 import session_pb2 as session_pb
from protos.v1 import totals_pb2 as totals_pb

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
real = st.floats(allow_nan=False)
text = st.text(st.characters(codec="utf-8"), max_size=20)
ids = st.lists(u32, max_size=8).map(tuple)
maybe_u32 = st.none() | u32
positions = st.builds(PositionLogprobs, u32, real, st.lists(st.tuples(u32, real), max_size=3).map(tuple))
position_lists = st.lists(positions, max_size=3).map(tuple)
finishes = (
    st.builds(Finish, st.just("stop"), stop=text)
    | st.builds(Finish, st.just("stop"), stop_token_id=u32)
    | st.builds(Finish, st.sampled_from(["stop", "length", "abort"]))
)
samplings = st.builds(
    Sampling,
    seed=u64,
    max_tokens=u32,
    n=u32,
    temperature=real,
    top_k=u32,
    top_p=real,
    min_p=real,
    repetition_penalty=real,
    presence_penalty=real,
    frequency_penalty=real,
    logit_bias=st.dictionaries(u32, real, max_size=4),
    stop=st.lists(text, max_size=3).map(tuple),
    stop_token_ids=ids,
    min_tokens=u32,
    ignore_eos=st.booleans(),
    logprobs=maybe_u32,
    prompt_logprobs=maybe_u32,
)
sources = st.builds(PrefixSource, text, text, u32)
requests = st.builds(
    Request,
    request_id=text,
    token_ids=ids,
    sampling=samplings,
    cache_salt=text,
    priority=st.integers(-(2**31), 2**31 - 1),
    prompt_logprobs_from=u32,
    deadline=st.none() | st.floats(1, 1e12),
    resume=st.lists(st.builds(ResumePoint, u32, ids, st.booleans()), max_size=3).map(tuple),
    speculation=st.sampled_from(["auto", "off"]),
    prefix_source=st.none() | sources,
)
pins = st.builds(Pin, text, text, ids, st.none() | sources)
events = st.builds(KVEvents, u64, st.lists(u64).map(tuple), st.lists(u64).map(tuple), st.booleans())
deltas = st.builds(
    Delta,
    request_id=text,
    index=u32,
    text=text,
    token_ids=ids,
    logprobs=position_lists,
    finish=st.none() | finishes,
    cached_tokens=maybe_u32,
    prompt_logprobs=position_lists,
)
totals = st.builds(EngineTotals, real, *[u64] * (len(EngineTotals._fields) - 1))
latencies = st.builds(Latency, st.lists(real, max_size=3).map(tuple), st.lists(u64, max_size=4).map(tuple))
reals = st.lists(real, max_size=3).map(tuple)
states = st.sampled_from(get_args(WorkerState))
workers = st.builds(WorkerOverview, text, states, u32, u32, u64, u64, totals, totals)
overviews = st.builds(
    Overview,
    st.tuples(text),
    text,
    window_s=real,
    num_live=u32,
    num_waiting=u32,
    outcomes=st.dictionaries(text, u64, max_size=3),
    time_to_first_token=latencies,
    inter_token=latencies,
    generation_history=reals,
    prompt_history=reals,
    workers=st.lists(workers, max_size=2).map(tuple),
)
loads = st.builds(Load, u32, u32, u64, u64, u64, st.booleans())


@given(requests)
def test_requests(request: Request) -> None:
    wire = convert.submit_to_proto(request).SerializeToString()
    assert convert.submit_from_proto(session_pb.Submit.FromString(wire)) == request


@given(pins)
def test_pins(pin: Pin) -> None:
    wire = convert.pin_to_proto(pin).SerializeToString()
    assert convert.pin_from_proto(session_pb.Pin.FromString(wire)) == pin


@given(events)
def test_kv_events(change: KVEvents) -> None:
    wire = convert.kv_events_to_proto(change).SerializeToString()
    assert convert.kv_events_from_proto(session_pb.KVEvents.FromString(wire)) == change


@given(deltas)
def test_deltas(delta: Delta) -> None:
    wire = convert.delta_to_proto(delta).SerializeToString()
    assert convert.delta_from_proto(session_pb.WorkerDelta.FromString(wire)) == delta


@given(st.builds(Failure, text, text, text))
def test_failures(failure: Failure) -> None:
    wire = convert.failure_to_proto(failure).SerializeToString()
    assert convert.delta_from_proto(session_pb.WorkerDelta.FromString(wire)) == failure


@given(totals)
def test_totals(told: EngineTotals) -> None:
    wire = convert.totals_to_proto(told).SerializeToString()
    assert convert.totals_from_proto(totals_pb.EngineTotals.FromString(wire)) == told


@given(overviews)
def test_overviews(overview: Overview) -> None:
    wire = convert.overview_to_proto(overview).SerializeToString()
    assert convert.overview_from_proto(cluster_pb.GetOverviewResponse.FromString(wire)) == overview


@given(loads)
def test_loads(load: Load) -> None:
    wire = convert.load_to_proto(load).SerializeToString()
    assert convert.load_from_proto(session_pb.WorkerLoad.FromString(wire)) == load


def test_failures_carry_whether_to_retry() -> None:
    assert convert.failure_to_proto(Failure("r", "Overloaded", "full")).error.retryable
    assert not convert.failure_to_proto(Failure("r", "EngineFailure", "bug")).error.retryable
    assert isinstance(convert.failure_to_error(Failure("r", "Overloaded", "full")), errors.Overloaded)


def test_unknown_finish_reason_is_an_engine_failure() -> None:
    with pytest.raises(errors.EngineFailure, match="unknown"):
        convert.finish_from_proto(pb.Finish())
