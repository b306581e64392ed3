"""One output being made: its tokens, how far they are computed, and its pages."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.messages import PositionLogprobs, Request
from workers.kv.cache import PageTable


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's outputs. Mutated only by Scheduler."""

    request: Request
    index: int
    arrival: int  # order among all sequences
    tokens: list[int]  # prompt, then output
    table: PageTable
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    num_prompt_scored: int = 0  # prompt positions whose log-probability has been taken
    cached_tokens: int = 0  # found in the cache when the sequence first ran
    started: bool = False
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)  # not yet delivered

    @property
    def num_prompt(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.tokens) - 1

    @property
    def wants_output(self) -> bool:
        return self.request.sampling.max_tokens > 0

    @property
    def first_needed_row(self) -> int:
        """The first position whose logits are still wanted; what lies before may come from the cache.

        The logits of position p choose the token at p + 1.
        """
        last = len(self.tokens) - 1
        if self.request.sampling.prompt_logprobs is None:
            return last
        first_scored = max(1, self.request.prompt_logprobs_from) + self.num_prompt_scored
        return first_scored - 1 if first_scored < self.num_prompt else last
