"""What one step computes: the scheduler's decision, frozen before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from protos.messages import PositionLogprobs
from workers.kv.cache import PageCopy
from workers.scheduler.sequence import Sequence


class Chunk(NamedTuple):
    """The next tokens of one sequence that this step computes, and which of their logits are wanted."""

    sequence: Sequence
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
    started: tuple[Sequence, ...]  # run for the first time
    leaves_prompt: bool = False  # prompt tokens that could not be taken any more wait for another step

    @property
    def num_tokens(self) -> int:
        return sum([chunk.num_tokens for chunk in self.chunks])


class ChunkResult(NamedTuple):
    """What computing a chunk gave."""

    token_id: int | None = None
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
