"""What a worker needs of a drafter: guesses of how sequences go on, before the target's step, and learning after it.

A drafter can be wrong, late or silent: that costs time, never a token. It is used from the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from protos.messages import Sampling
from workers.speculative.tree import DraftTree

Key = tuple[str, int]  # request id and output index, as the engine knows them


class Draws(NamedTuple):
    """How the target chooses a sequence's tokens, where that is not just the most probable one."""

    sampling: Sampling
    output: int  # which of the request's


class Context(NamedTuple):
    """A sequence that wants a draft."""

    key: Key
    salt: str  # whose data it is: what is learnt of one salt's tokens is never shown to another's
    tokens: Sequence[int]  # prompt, then output; the last is the draft's root. Read before the next step only
    num_prompt: int
    num_guessed: int = 0  # tokens at the end that the target has not confirmed: nothing of them is to be kept
    draws: Draws | None = None  # None: greedily
    can_wait: bool = True  # a draft is worth a wait
    traceparent: str = ""  # of the request; empty: it is not traced


class Verified(NamedTuple):
    """What one step of the target said of one sequence."""

    context: Context  # with the new tokens
    num_new: int  # tokens that the step added
    draft: DraftTree  # as it was verified; empty if there was none
    nodes: tuple[int, ...]  # of it, those that were right, from the root down
    top_ids: Sequence[Sequence[int]] = ()  # by row of the draft, the target's most probable tokens, if asked for


class Drafter(Protocol):
    """Guesses continuations. One contract suite runs against every drafter."""

    @property
    def name(self) -> str:
        """For metrics and configuration."""

    @property
    def num_top_ids(self) -> int:
        """How many of the target's most probable tokens it learns from at each row; 0: none."""

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """A draft for each context, of at most max_nodes nodes; an empty one where it has no guess."""

    def learn(self, verified: Sequence[Verified]) -> None:
        """What became of sequences in a step, with a draft or without."""

    def forget(self, key: Key) -> None:
        """The sequence has ended. Keys that were never seen are ignored."""


@runtime_checkable
class Scout(Protocol):
    """A drafter that can tell at next to no cost when it ought to be asked."""

    def is_sure(self, contexts: Sequence[Context]) -> bool:
        """Whether a draft for one of these is very probably right. Asked now and then, while no drafts are made."""
