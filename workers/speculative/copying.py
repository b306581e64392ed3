"""A drafter that copies: what followed the sequence's last tokens where they stood before, in its prompt or output.

Aggressive decoding (Ge et al., "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding", arXiv
2205.10350, section 3) and prompt lookup: after a mismatch the target's own token is kept, and copying resumes as soon
as the sequence's end is found again. Until then, guesses are less sure: that the target has replaced, inserted or left
out a few tokens of what it copies, or that it says what followed its last token alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import ROOT, DraftTree

MAX_PLACES = 8  # earlier places of the same two tokens that are remembered: the latest
LONGEST_MATCH = 32  # tokens; a longer one says no more
MAX_BRANCHES = 2  # different continuations
MAX_ASTRAY = 4  # tokens after a mismatch within which the source is not given up
LEFT_OUT = 8  # tokens of the source that may have been left out
FIRST = {"left out": 0.45, "replaced": 0.4, "inserted": 0.3, "one token": 0.2}  # that a guess of the kind is right, …
NEXT = 0.75  # … and each token after its first
LEAST = 0.05  # probability of a path that is worth a node
SURE_MATCH = 5  # tokens that agree; what follows them is very probably right


class _Found(NamedTuple):
    """A place to copy from: what stands there may follow the sequence."""

    place: int
    first: float  # probability of the first token, as a guess
    next: float  # of each after it, if those before were right
    num_agreed: int = 0  # tokens before it that equal the sequence's last ones, if it is a match


@dataclass(slots=True)
class _Index:
    """What is known of one sequence. Mutated only by Copying."""

    num_known: int = 1  # tokens that have been taken in
    places: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # of what followed the pair
    latest: dict[int, int] = field(default_factory=dict)  # of what followed the token
    matches: dict[int, int] = field(default_factory=dict)  # places that may follow the last token: tokens that agree
    source: int = 0  # the place that was last copied from, …
    length: int = 0  # … and the number of tokens that the copy followed; 0: none has

    def extend(self, tokens: Sequence[int], num_known: int) -> None:
        """Take in what is new of the known tokens."""
        places, latest = self.places, self.latest
        for place in range(self.num_known, num_known):
            before = tokens[place - 1]
            latest[before] = place
            if place > 1:
                found = places.setdefault((tokens[place - 2], before), [])
                found.append(place)
                if len(found) > MAX_PLACES:
                    del found[0]
            if num_known - place <= LONGEST_MATCH:  # longer ago than the longest match: it makes no difference
                self.matches = self.matched(self.matches, tokens, place)
        self.num_known = max(self.num_known, num_known)

    def matched(self, before: Mapping[int, int], tokens: Sequence[int], last: int) -> dict[int, int]:
        """Places after what agrees with the tokens up to the last one, and how much agrees; `before`: without it."""
        token_id = tokens[last]
        matches = {
            place + 1: min(length + 1, LONGEST_MATCH) for place, length in before.items() if tokens[place] == token_id
        }
        for place in self.places.get((tokens[last - 1], token_id), ()):
            matches.setdefault(place, 2)
        if len(matches) > MAX_PLACES:
            matches = dict(sorted(matches.items(), key=lambda match: (-match[1], -match[0]))[:MAX_PLACES])
        return matches

    def copies(self, tokens: Sequence[int]) -> list[_Found]:
        """Where the sequence's last two tokens, or more, stood before; the longest match first."""
        matches = self.matches
        for place in range(self.num_known, len(tokens)):  # guessed ones
            matches = self.matched(matches, tokens, place)
        ranked = sorted([(length, place) for place, length in matches.items()], reverse=True)
        return [_Found(place, length / (length + 1), length / (length + 1), length) for length, place in ranked]

    def guesses(self, tokens: Sequence[int]) -> list[_Found]:
        """Where else to copy from, the likeliest first."""
        found = [*self._astray(tokens)]
        latest = self.latest.get(tokens[-1])
        if latest is not None:
            found.append(_Found(latest, FIRST["one token"], NEXT))
        return found

    def _astray(self, tokens: Sequence[int]) -> Iterator[_Found]:
        """Where the source goes on if the target has only just left it."""
        at, place = self.length, self.source
        while at < len(tokens) and place < len(tokens) and tokens[at] == tokens[place]:
            at, place = at + 1, place + 1
        num_astray = len(tokens) - at
        if self.length == 0 or not 0 < num_astray <= MAX_ASTRAY:
            return
        for left_out in range(place, min(place + LEFT_OUT, self.length)):
            if tokens[left_out] == tokens[-1]:
                yield _Found(left_out + 1, FIRST["left out"], NEXT)
                break
        yield _Found(place + num_astray, FIRST["replaced"], NEXT)
        yield _Found(place, FIRST["inserted"], NEXT)


class Copying:
    """A Drafter that looks continuations up in the sequence itself."""

    name = "copy"
    num_top_ids = 0

    def __init__(self) -> None:
        self._indexes: dict[Key, _Index] = {}

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter. The best place first; another continuation takes at most a quarter of the nodes."""
        return [self._draft(context, max_nodes) for context in contexts]

    def is_sure(self, contexts: Sequence[Context]) -> bool:
        """See Scout."""
        for context in contexts:
            index = self._indexes.setdefault(context.key, _Index())
            index.extend(context.tokens, len(context.tokens))
            if max(index.matches.values(), default=0) >= SURE_MATCH:
                return True
        return False

    def learn(self, verified: Sequence[Verified]) -> None:
        """Nothing to learn: the sequences themselves are looked at when a draft is wanted."""

    def forget(self, key: Key) -> None:
        self._indexes.pop(key, None)

    def _draft(self, context: Context, max_nodes: int) -> DraftTree:
        tokens = context.tokens
        if len(tokens) < 3:
            return DraftTree()
        index = self._indexes.setdefault(context.key, _Index())
        index.extend(tokens, len(tokens) - context.num_guessed)
        copies = index.copies(tokens)
        if copies and copies[0].num_agreed > context.num_guessed:
            index.source, index.length = copies[0].place - context.num_guessed, len(tokens) - context.num_guessed
        return _tree(tokens, _branches(tokens, copies or index.guesses(tokens)), max_nodes)


def _branches(tokens: Sequence[int], found: Sequence[_Found]) -> list[_Found]:
    """The best places that differ in what stands there."""
    branches: dict[int, _Found] = {}  # by their first token
    for one in found:
        if one.place < len(tokens):
            branches.setdefault(tokens[one.place], one)
            if len(branches) == MAX_BRANCHES:
                break
    return list(branches.values())


def _tree(tokens: Sequence[int], branches: Sequence[_Found], max_nodes: int) -> DraftTree:
    """The continuation from the best place, and the beginning of one that differs."""
    aside = max_nodes // 4 if len(branches) > 1 else 0
    chosen: list[int] = []
    parents: list[int] = []
    probabilities: list[float] = []
    for branch, room in zip(branches, (max_nodes - aside, aside), strict=False):
        period = len(tokens) - branch.place
        path = probability = branch.first
        for step in range(room):
            if path < LEAST:
                break
            parents.append(len(chosen) - 1 if step else ROOT)
            chosen.append(tokens[branch.place + step % period])  # a source that reaches the end goes round
            probabilities.append(probability)
            probability = branch.next
            path *= probability
    return DraftTree(tuple(chosen), tuple(parents), tuple(probabilities), (1,) * len(chosen))
