"""One sequence in a drafter's process: its tokens, and the tree that has been drafted after them.

The tree grows where it is most probably right: first along the one likely continuation, then from the runners-up, the
outcomes that would break it. As the target's tokens come, it is walked down; what is left is the next draft, made while
the target was computing (PEARL, Liu et al., arXiv 2408.11850, sections 4.2 and 4.3, with a tree in place of a chain).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from workers.speculative.protocol import Context, Draws, Key
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

LEAST_AHEAD = 0.1  # probability of a path that is still worth going on from
ROUNDS_AHEAD = 3  # of as many nodes as the target verifies in a step
PATIENCE = 1024  # tokens of a prompt for each time that a drafter may have nothing yet


@dataclass(slots=True, eq=False)
class Growth:
    """A place that a tree can grow from. Mutated only by Drafted."""

    token_id: int
    probability: float
    parent: Growth | None = None  # None: the last token of the sequence
    children: dict[int, Growth] = field(default_factory=dict)
    is_grown: bool = False  # a drafter has said what it knows of what follows

    @property
    def path(self) -> list[int]:
        """The tokens from the root down."""
        tokens, place = [], self
        while place.parent is not None:
            tokens.append(place.token_id)
            place = place.parent
        return tokens[::-1]

    def add(self, draft: DraftTree) -> DraftTree:
        """Hang a draft under this place; what of it is new."""
        places, new = {ROOT: self}, []
        for node, (token_id, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            above = places[parent]
            if token_id not in above.children:
                above.children[token_id] = Growth(token_id, draft.probabilities[node], above)
                new.append(node)
            places[node] = above.children[token_id]
            if parent != ROOT:
                above.is_grown = True
        self.is_grown = True
        return draft if len(new) == len(draft) else draft.keep(_with_ancestors(draft, new))

    def leaves(self, path: float = 1.0) -> Iterator[tuple[float, Growth]]:
        """Places without children below this one, or it itself, with their paths' probabilities."""
        if not self.children:
            yield path, self
        for child in self.children.values():
            yield from child.leaves(path * child.probability)

    def size(self) -> int:
        """Nodes below."""
        return sum(1 + child.size() for child in self.children.values())


class Drafted:
    """Mutated only by DraftServer."""

    def __init__(
        self,
        key: Key,
        salt: str,
        tokens: list[int],
        num_prompt: int,
        *,
        max_nodes: int,
        draws: Draws | None = None,
        traceparent: str = "",
    ) -> None:
        self.key = key
        self.traceparent = traceparent
        self.opened = time.monotonic()
        self.num_first = len(tokens)  # as it was opened
        self.num_drafted = 0  # tokens
        self._draws = draws
        self.salt = salt
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.max_nodes = max_nodes  # wanted at a time
        self._root = Growth(ROOT, 1.0)
        self._at = self._root  # the place that is being grown
        self._num_tries = 1 + len(tokens) // PATIENCE

    @property
    def is_wanting(self) -> bool:
        """Whether the target may be waiting: nothing has been drafted yet after its last token."""
        return not self._root.children and not self._root.is_grown

    def follow(self, first: int, tokens: Sequence[int]) -> bool:
        """The target's tokens from place `first` on; False if there is a gap."""
        if first > len(self.tokens):
            return False
        new = tokens[len(self.tokens) - first :]
        self.tokens += new
        for token_id in new:
            self._root = self._root.children.get(token_id) or Growth(token_id, 1.0)
        if new:
            self._root.parent = None
            self._num_tries = max(self._num_tries, 1)
        return True

    def next(self) -> Context | None:
        """Where to draft next, the best place first; None if nothing is worth it before the target has said more."""
        path, self._at = max(self._open(), key=lambda place: place[0], default=(0.0, self._root))
        if path < LEAST_AHEAD or self._root.size() >= min(ROUNDS_AHEAD * self.max_nodes, MAX_NODES):
            return None
        guessed = self._at.path
        return Context(self.key, self.salt, [*self.tokens, *guessed], self.num_prompt, len(guessed), self._draws)

    def grow(self, draft: DraftTree) -> tuple[list[int], DraftTree]:
        """What was drafted for the last `next`: the tokens that it assumes, and what of it is new."""
        if not len(draft) and self._at is self._root and self._num_tries > 1:
            self._num_tries -= 1  # a long prompt is read bit by bit
            return [], draft
        new = self._at.add(draft)
        self.num_drafted += len(new)
        return self._at.path, new

    def _open(self) -> list[tuple[float, Growth]]:
        return [(path, place) for path, place in self._root.leaves() if not place.is_grown]


def _with_ancestors(draft: DraftTree, nodes: Sequence[int]) -> set[int]:
    kept = set(nodes)
    for node in nodes:
        parent = draft.parents[node]
        while parent != ROOT and parent not in kept:
            kept.add(parent)
            parent = draft.parents[parent]
    return kept
