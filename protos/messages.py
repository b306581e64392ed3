"""Frozen messages that cross the boundary between the wire and the engine.

Requests are complete: ingress has validated them and filled every default in, so no later stage knows a default.
What is made for every token or step is a tuple: that costs a fraction of what a frozen dataclass does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]
Speculation = Literal["auto", "off"]  # whether tokens are drafted ahead: where it pays, or never


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Ranges are those of `SamplingParams` in inference.proto, already checked."""

    seed: int
    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to report; None: no log-probabilities
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What one output had emitted on a worker that was lost."""

    index: int
    token_ids: tuple[int, ...]
    finished: bool = False


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Another worker that has more of a prompt in its prefix cache. Router to worker."""

    worker_id: str
    address: str  # of its session server
    num_tokens: int  # of the prompt, whole blocks


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix to compute and keep. Router to worker."""

    pin_id: str
    cache_salt: str
    token_ids: tuple[int, ...]
    prefix_source: PrefixSource | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request for an engine. Router to worker."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str = ""
    priority: int = 0  # larger runs first
    prompt_logprobs_from: int = 0  # first prompt position whose log-probability is wanted
    deadline: float | None = None  # seconds since the epoch
    resume: tuple[ResumePoint, ...] = ()
    speculation: Speculation = "auto"
    prefix_source: PrefixSource | None = None
    traceparent: str = ""  # of the span that it is a part of; empty: it is not traced


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The log-probability of the token at one position, and of the most probable ones there (best first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an output ended, and what matched if it was a stop."""

    reason: FinishReason
    stop: str | None = None
    stop_token_id: int | None = None


class TokenDelta(NamedTuple):
    """New tokens of one output, as an engine yields them: no text yet. Engine to text layer."""

    request_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None
    cached_tokens: int | None = None  # on the output's first delta
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


class Delta(NamedTuple):
    """New text and tokens of one output. Worker to router."""

    request_id: str
    index: int  # type: ignore[assignment]  # as above
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: Finish | None = None
    cached_tokens: int | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


def joined(deltas: Sequence[Delta]) -> Delta:
    """Successive deltas of one output as one. At least one, in order; a finish can only be on the last."""
    if len(deltas) == 1:
        return deltas[0]
    return deltas[0]._replace(
        text="".join([delta.text for delta in deltas]),
        token_ids=tuple([token_id for delta in deltas for token_id in delta.token_ids]),
        logprobs=tuple([position for delta in deltas for position in delta.logprobs]),
        finish=deltas[-1].finish,
        prompt_logprobs=tuple([position for delta in deltas for position in delta.prompt_logprobs]),
    )


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended in an error on a worker. Worker to router."""

    request_id: str
    kind: str
    message: str


class Load(NamedTuple):
    """A worker's load as its scheduler sees it. Worker to router."""

    num_running: int = 0
    num_waiting: int = 0
    pending_prefill_tokens: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    draining: bool = False


class EngineTotals(NamedTuple):
    """What an engine has done, since it started or within a time. Worker to router, router to operators."""

    seconds: float = 0.0  # the time, by the worker's clock
    num_steps: int = 0  # that computed something
    num_step_outputs: int = 0  # that took part in them, summed
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries_tokens: int = 0  # looked up in the prefix cache
    prefix_hit_tokens: int = 0  # of those, found
    attention_keys: int = 0  # that outputs attended to, each by itself
    attention_read_keys: int = 0  # that were read for it
    budget_tokens: int = 0  # of steps that left prompt tokens for later
    budget_used_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those


class KVEvents(NamedTuple):
    """What has changed in a worker's prefix cache, in names of blocks (`protos.blocks`). Worker to router."""

    sequence: int  # one more than that of the session's message before, snapshots included
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    snapshot: bool = False  # `stored` is everything there is


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a served model is called and what it can take."""

    name: str
    max_context: int  # prompt and output, tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
