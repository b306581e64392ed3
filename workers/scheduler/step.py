"""What one step computes: the scheduler's decision, frozen before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos.messages import PositionLogprobs
from workers.kv.cache import PageCopy
from workers.scheduler.sequence import Sequence as RunningSequence


class Chunk(NamedTuple):
    """The next tokens of one sequence that this step computes, and which of their logits are wanted."""

    sequence: RunningSequence
    start: int  # position of the first token
    num_tokens: int
    first_scored_row: int  # positions [first_scored_row, num_scored_rows + it) give prompt log-probabilities
    num_scored_rows: int
    samples: bool  # the last position's logits choose a new token

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: pages to copy first, then the chunks of the flat stream in order."""

    chunks: tuple[Chunk, ...]
    copies: tuple[PageCopy, ...]
    started: tuple[RunningSequence, ...]  # run for the first time
    num_tokens: int  # of all chunks
    leaves_prompt: bool = False  # prompt tokens that could not be taken any more wait for another step


class ChunkResults(NamedTuple):
    """What computing a plan's chunks gave, in their order: columns, as most steps fill the first alone."""

    token_ids: Sequence[int | None]  # None where nothing was to be sampled
    logprobs: Sequence[PositionLogprobs | None]
    prompt_logprobs: Sequence[tuple[PositionLogprobs, ...]]

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int | None]) -> ChunkResults:
        """Without log-probabilities."""
        return cls(token_ids, [None] * len(token_ids), [()] * len(token_ids))
