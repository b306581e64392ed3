"""What a worker needs of an engine. Stands between the worker's engine loop and whatever computes tokens.

The loop calls an engine from one thread only: submit and cancel between steps, then step. An engine never touches
text: tokens in, tokens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from protos.messages import Failure, Load, ModelInfo, Request, TokenDelta
from workers.speculative.stats import SpeculationStats


class EngineStats(NamedTuple):
    """Running totals since the engine started, and the state of now."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0  # prompt tokens of requests whose prompt is complete
    generation_tokens: int = 0
    computed_tokens: int = 0  # rows that went through the model
    repeated_tokens: int = 0  # of those, rows that had been computed before
    budget_tokens: int = 0  # the token budget of steps that left prompt tokens for later
    budget_used_tokens: int = 0  # of that, used
    prefix_queries_tokens: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hit_tokens: int = 0  # of those, found
    attention_segments: int = 0  # attended to, in one layer
    attention_keys: int = 0  # keys that the sequences of all steps see, each by itself, in one layer
    attention_read_keys: int = 0  # keys that their segments read: less, where keys are shared
    kv_free_pages: int = 0
    kv_cached_pages: int = 0  # held by the prefix tree alone: free as soon as needed
    kv_total_pages: int = 0
    page_size: int = 0
    speculation: SpeculationStats | None = None  # None: no drafters


class StepResult(NamedTuple):
    """What one step produced."""

    deltas: Sequence[TokenDelta] = ()
    failures: tuple[Failure, ...] = ()
    started: tuple[str, ...] = ()  # requests with an output that ran for the first time
    num_tokens: int = 0  # rows computed in this step
    num_sequences: int = 0


class Engine(Protocol):
    """Computes tokens for many requests at once. Not thread-safe; one owner."""

    @property
    def model(self) -> ModelInfo:
        """The model served and its limits."""

    def submit(self, request: Request) -> None:
        """Take a request. Raises InvalidRequest if it can never run here, DuplicateRequest if its id is live."""

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its outputs, and free its pages. Unknown ids are ignored: they may have ended."""

    def step(self) -> StepResult:
        """Advance every runnable sequence by one step. Returns at once with no deltas when there is nothing to do."""

    def load(self) -> Load:
        """The load after the last step."""

    def stats(self) -> EngineStats:
        """Counters for metrics."""

    def close(self) -> None:
        """Release memory, threads and processes. Idempotent."""
