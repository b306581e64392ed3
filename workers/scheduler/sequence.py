"""One output being made: its tokens, how far they are computed, and its pages."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.messages import PositionLogprobs, Request
from workers.kv.cache import PageTable
from workers.model.greedy import is_plain


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's outputs. Mutated only by Scheduler.

    What a decode step asks for again and again is worked out of the request once.
    """

    request: Request
    index: int
    arrival: int  # order among all sequences
    tokens: list[int]  # prompt, then output
    table: PageTable
    stop_token_ids: frozenset[int] = frozenset()  # that end it, the model's own among them
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    num_lost: int = 0  # leading tokens that had been computed when a preemption took them
    num_prompt_scored: int = 0  # prompt positions whose log-probability has been taken
    cached_tokens: int = 0  # found in the cache when the sequence first ran
    started: bool = False
    was_passed: bool = False  # a step was filled with others for lack of room for its prompt
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)  # not yet delivered
    num_prompt: int = field(init=False)
    num_given: int = field(init=False)  # tokens it began with: the prompt, and what others had answered
    min_length: int = field(init=False)  # tokens, prompt included, before a stop token may end it
    max_length: int = field(init=False)  # tokens, prompt included
    scores_prompt: bool = field(init=False)  # one output does for all: they share the prompt
    wants_output: bool = field(init=False)
    wants_logits: bool = field(init=False)  # the largest logit's token alone does not do where one is sampled

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.num_prompt = len(self.request.token_ids)
        self.num_given = len(self.tokens)
        self.min_length = self.num_prompt + max(1, sampling.min_tokens)
        self.max_length = self.num_prompt + sampling.max_tokens
        self.scores_prompt = sampling.prompt_logprobs is not None and self.index == 0
        self.wants_output = sampling.max_tokens > 0
        self.wants_logits = sampling.logprobs is not None or not is_plain(sampling)

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
    def first_needed_row(self) -> int:
        """The first position whose logits are still wanted; what lies before may come from the cache.

        The logits of position p choose the token at p + 1.
        """
        last = len(self.tokens) - 1
        if not self.scores_prompt:
            return last
        first_scored = max(1, self.request.prompt_logprobs_from) + self.num_prompt_scored
        return first_scored - 1 if first_scored < self.num_prompt else last
