"""What callers of the client give and get, all frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from protos.messages import Finish, PositionLogprobs
from protos.overview import WorkerState

Prompt = str | bytes | Sequence[int]


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
    route: str = field(default="", compare=False)  # for people: the last call's worker, and why that one

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
class WorkerView:
    """One worker, as a router sees it."""

    worker_id: str
    address: str
    state: WorkerState
    num_running: int  # outputs, over all routers, as the worker last said; so are the next four
    num_waiting: int
    pending_prefill_tokens: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    reserved_outputs: int  # what this router has given it and not had back
    reserved_prefill_tokens: int
    reserved_decode_tokens: int
    known_cached_tokens: int  # in its prefix cache, as this router knows


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """What one tenant has at a router."""

    tenant: str
    num_waiting: int  # requests
    num_running: int  # outputs


@dataclass(frozen=True, slots=True)
class Topology:
    """One router, its queue and its workers."""

    router_id: str
    model: str
    policy: str  # how it chooses workers
    num_waiting: int  # requests without a worker
    num_waiting_tokens: int  # of their prompts
    workers: tuple[WorkerView, ...]
    tenants: tuple[TenantQueue, ...]


@dataclass(frozen=True, slots=True)
class RouteCandidate:
    """What a prompt would cost one worker, in tokens of work."""

    worker_id: str
    cost: float
    cached_tokens: int  # of the prompt, in its prefix cache
    live_tokens: int  # of the prompt, in use there by requests that run
    load_tokens: int  # work ahead of the prompt
    has_room: bool  # whether it would take the prompt now
    fetchable_tokens: int = 0  # of the prompt, that it would fetch from another worker


@dataclass(frozen=True, slots=True)
class RouteExplanation:
    """Where a prompt would run now, and why."""

    worker_id: str  # empty if no worker is ready
    reason: str
    prompt_tokens: int
    candidates: tuple[RouteCandidate, ...]  # best first


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that workers keep."""

    pin_id: str
    num_tokens: int  # whole blocks
    num_workers: int  # that have it now; of several routers, as the one that knows of the fewest
