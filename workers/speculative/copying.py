"""A drafter that copies: what followed the sequence's last tokens where they stood before, in its prompt or output.

Aggressive decoding (Ge et al., "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding", arXiv
2205.10350, section 3) and prompt lookup: after a mismatch the target's own token is kept, and copying resumes as soon
as the sequence's end is found again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import ROOT, DraftTree

MAX_PLACES = 8  # earlier places of the same two tokens that are remembered: the latest
LONGEST_MATCH = 32  # tokens; a longer one says no more
MAX_BRANCHES = 2  # different continuations


@dataclass(slots=True)
class _Index:
    """Where each pair of tokens stood. Mutated only by Copying."""

    num_indexed: int = 0  # tokens of which it has been told what followed
    places: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # of what followed the pair

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new, but not the end of the sequence: nothing has followed it."""
        places = self.places
        for place in range(max(self.num_indexed, 2), len(tokens)):
            found = places.setdefault((tokens[place - 2], tokens[place - 1]), [])
            found.append(place)
            if len(found) > MAX_PLACES:
                del found[0]
        self.num_indexed = len(tokens)


class Copying:
    """A Drafter that looks continuations up in the sequence itself."""

    name = "copy"
    num_top_ids = 0

    def __init__(self) -> None:
        self._indexes: dict[Key, _Index] = {}

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter. The longest match first; another continuation takes at most a quarter of the nodes."""
        return [self._draft(context, max_nodes) for context in contexts]

    def learn(self, verified: Sequence[Verified]) -> None:
        """Nothing to learn: the sequences themselves are looked at when a draft is wanted."""

    def forget(self, key: Key) -> None:
        self._indexes.pop(key, None)

    def _draft(self, context: Context, max_nodes: int) -> DraftTree:
        tokens = context.tokens
        if len(tokens) < 3:
            return DraftTree()
        index = self._indexes.setdefault(context.key, _Index())
        index.extend(tokens)
        places = index.places.get((tokens[-2], tokens[-1]), ())
        matches = sorted(((_match(tokens, place), place) for place in places), reverse=True)
        return _tree(tokens, matches, max_nodes)


def _match(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` equal the sequence's last ones."""
    longest = min(place, LONGEST_MATCH)
    length = 2
    while length < longest and tokens[place - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


def _tree(tokens: Sequence[int], matches: Sequence[tuple[int, int]], max_nodes: int) -> DraftTree:
    """The continuation of the best match, and the beginning of one that differs."""
    branches: dict[int, tuple[int, int]] = {}  # by their first token
    for length, place in matches:
        branches.setdefault(tokens[place], (length, place))
        if len(branches) == MAX_BRANCHES:
            break
    aside = max_nodes // 4 if len(branches) > 1 else 0
    chosen: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    for (length, place), room in zip(branches.values(), (max_nodes - aside, aside), strict=False):
        period = len(tokens) - place
        for step in range(room):
            parents.append(len(chosen) - 1 if step else ROOT)
            chosen.append(tokens[place + step % period])  # a source that reaches the end goes round
            probabilities.append(length / (length + 1))
    return DraftTree(tuple(chosen), tuple(parents), tuple(probabilities), (1,) * len(chosen))
