"""What a worker needs of an engine. Stands between the worker's engine loop and whatever computes tokens.

The loop calls an engine from one thread only: submit and cancel between steps, then step. An engine never touches
text: tokens in, tokens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from protos.messages import Failure, Load, ModelInfo, Pin, Request, TokenDelta
from workers.kv.block import BlockFormat, HeldBlock
from workers.kv.journal import Changes
from workers.speculative.stats import SpeculationStats


class EngineLimits(NamedTuple):
    """What an engine takes on at once, for as long as it lives."""

    max_running: int  # outputs
    step_tokens: int  # token budget of one step


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
    kv_foreign_pages: int = 0  # of mapped blocks, in the prefix tree: no memory of the store
    kv_pinned_pages: int = 0
    page_size: int = 0
    speculation: SpeculationStats | None = None  # None: no drafters


class StepResult(NamedTuple):
    """What one step produced."""

    deltas: Sequence[TokenDelta] = ()
    failures: tuple[Failure, ...] = ()
    started: tuple[str, ...] = ()  # requests with an output that ran for the first time
    num_tokens: int = 0  # rows computed in this step
    num_sequences: int = 0


class Adoption(NamedTuple):
    """What became of a block that was given to an engine."""

    num_tokens: int  # of its prefix that the prefix cache has now
    way: Literal["mapped", "copied", "unused"]  # unused: there is no room, or it was there already


class Engine(Protocol):
    """Computes tokens for many requests at once. Not thread-safe; one owner."""

    @property
    def model(self) -> ModelInfo:
        """The model served and its limits."""

    @property
    def limits(self) -> EngineLimits:
        """How much runs at once."""

    def submit(self, request: Request) -> None:
        """Take a request. Raises InvalidRequest if it can never run here, DuplicateRequest if its id is live."""

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its outputs, and free its pages. Unknown ids are ignored: they may have ended."""

    def step(self) -> StepResult:
        """Advance every runnable sequence by one step. Returns at once with no deltas when there is nothing to do."""

    def wake(self) -> None:
        """There is something to do between steps: a step that waits for others to compute returns. Any thread."""

    def load(self) -> Load:
        """The load after the last step."""

    def stats(self) -> EngineStats:
        """Counters for metrics."""

    def take_kv_changes(self) -> Changes:
        """Blocks that the prefix cache has gained and lost since they were last taken, by name (`protos.blocks`)."""

    def kv_blocks(self) -> list[int]:
        """The names of all blocks that the prefix cache holds now."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything. It may also be for pins, of which no delta tells."""

    @property
    def block_format(self) -> BlockFormat | None:
        """What engines must agree in to exchange prefixes; None: this one exchanges none. Safe from any thread."""

    def export_prefix(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> bool:
        """Copy the keys and values of a prefix of whole pages into the payload of a block that is to hold them.

        False, and nothing is copied, if the prefix cache has not all of it, or not any more.
        """

    def adopt_prefix(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> Adoption:
        """Put a block's prefix into the prefix cache, if there is room; `token_ids` are those of its label.

        Takes the block over, and closes it when nothing of it is in use.
        """

    def pin(self, pin: Pin) -> None:
        """Compute a prefix, if need be, and keep its whole pages until it is unpinned.

        Where memory does not allow it, that is logged and there is no pin. Pins never keep a request from running: one
        that has no room beside them ends them.
        """

    def unpin(self, pin_id: str) -> None:
        """End a pin. Unknown ids are ignored: there may have been no room for it."""

    def close(self) -> None:
        """Release memory, threads and processes. Idempotent."""
