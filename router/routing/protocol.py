"""Which worker runs a packed group: the question, what is known of each worker, and the answer.

Stands between admission, which asks, and the session, which reserves. Policies do no I/O and read no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from protos.messages import Load
from router.work import Work

Reason = Literal[
    "only",  # there was one candidate
    "affinity",  # the longest match among the candidates is on the chosen worker
    "spread",  # another worker has a longer match, but going there would have cost more
    "fetch",  # the same, and the chosen one can take what it lacks from there
    "cold",  # no candidate has anything of the prompt; the least loaded one was chosen
    "balanced",  # the least loaded one, matches not considered
    "turn",  # the next one in turn
    "random",
    "hash",  # the first in the key's own order that is not overloaded
]


class Ask(NamedTuple):
    """A packed group that wants a worker."""

    num_tokens: int  # of the prompt, what is shared within the group counted once
    decode_tokens: int  # at most, over all outputs
    num_outputs: int
    key: int  # the name of the first block, or a hash of the whole prompt if shorter: equal within a prefix group


class Candidate(NamedTuple):
    """A worker that could run the group now."""

    worker_id: str
    load: Load  # as the worker last said, over all routers
    reserved: Work  # what this router gave it and has not had back
    cached_tokens: int = 0  # of the prompt, in its cache or about to be
    live_tokens: int = 0  # of the prompt, in use there by requests that run: attention over them is computed once
    fetchable_tokens: int = (
        0  # of the prompt, not cached but in another worker's cache, and it can take them from there
    )


class Estimate(NamedTuple):
    """What it would cost a worker to run the group."""

    worker_id: str
    cost: float  # tokens of work until the group's end
    cached_tokens: int
    live_tokens: int
    load_tokens: int  # of the cost, work that is there already
    fetchable_tokens: int = 0


class Decision(NamedTuple):
    """Who runs the group, and why."""

    worker_id: str
    reason: Reason
    cost: float
    cached_tokens: int  # of the prompt, predicted to be found in the worker's cache
    fetchable_tokens: int = 0  # beside them, predicted to be taken from another worker's
    runner_up: str | None = None
    runner_up_cost: float = 0.0

    def __str__(self) -> str:
        """One line, for people: a trailer, a log, a trace."""
        line = f"{self.reason} {self.worker_id} cost={self.cost:.0f} cached={self.cached_tokens}"
        line += f" fetchable={self.fetchable_tokens}" if self.fetchable_tokens else ""
        return line if self.runner_up is None else f"{line} next={self.runner_up} cost={self.runner_up_cost:.0f}"


class Policy(Protocol):
    """A way to choose. The order of the candidates never matters; their ids are unique."""

    @property
    def name(self) -> str:
        """What configuration and explanations call it."""

    def pick(self, ask: Ask, candidates: Sequence[Candidate]) -> Decision | None:
        """The choice, or None if there are no candidates. Only this may move a turn on."""

    def explain(self, ask: Ask, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Every candidate, best first: the first is what `pick` would choose now. Changes nothing."""
