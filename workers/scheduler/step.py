"""What one step computes: the scheduler's decision, frozen before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos.messages import PositionLogprobs
from workers.kv.cache import PageCopy
from workers.scheduler.sequence import Sequence as RunningSequence
from workers.speculative.tree import DraftTree


class Chunk(NamedTuple):
    """The next tokens of one sequence that this step computes, and which of their logits are wanted.

    With a draft, those are the sequence's last token and the draft's nodes, and all of their logits are wanted.
    """

    sequence: RunningSequence
    start: int  # position of the first token
    num_tokens: int
    first_scored_row: int  # positions [first_scored_row, num_scored_rows + it) give prompt log-probabilities
    num_scored_rows: int
    samples: bool  # the last position's logits choose a new token
    draft: DraftTree | None = None

    @property
    def stop(self) -> int:
        """Where the slots end that the chunk fills; of a draft, positions end earlier unless it is a chain."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: pages to copy first, then the chunks of the flat stream in order."""

    chunks: tuple[Chunk, ...]
    copies: tuple[PageCopy, ...]
    started: tuple[RunningSequence, ...]  # run for the first time
    num_tokens: int  # of all chunks
    leaves_prompt: bool = False  # prompt tokens that could not be taken any more wait for another step
    num_drafted: int = 0  # of the tokens, nodes of drafts


class Walk(NamedTuple):
    """How far the target agreed with a draft: the tokens it chose, and the nodes that had guessed them."""

    token_ids: tuple[int, ...]  # one more than nodes: the last was not guessed
    nodes: tuple[int, ...]  # from the root down
    logprobs: tuple[PositionLogprobs, ...] = ()  # of the tokens, if asked for


class ChunkResults(NamedTuple):
    """What computing a plan's chunks gave, in their order: columns, as most steps fill the first alone."""

    token_ids: Sequence[int | None]  # None where nothing was to be sampled
    logprobs: Sequence[PositionLogprobs | None]
    prompt_logprobs: Sequence[tuple[PositionLogprobs, ...]]
    walks: Sequence[Walk | None]  # of chunks with a draft; their tokens and log-probabilities are here alone
    top_ids: Sequence[Sequence[Sequence[int]]] = ()  # if asked for: the most probable tokens of each choosing row

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int | None]) -> ChunkResults:
        """Without log-probabilities and drafts."""
        nothing = [None] * len(token_ids)
        return cls(token_ids, nothing, [()] * len(token_ids), nothing)
