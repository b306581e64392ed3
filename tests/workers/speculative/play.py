"""Drafters on their own: sequences that a made-up target continues, step by step, with what a verification tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workers.speculative.protocol import Context, Drafter, Verified
from workers.speculative.tree import ROOT, DraftTree

Ranked = Callable[[Sequence[int]], list[int]]  # after these tokens, the most probable ones: the first is chosen


def context(tokens: Sequence[int], *, name: str = "a", salt: str = "", num_prompt: int | None = None) -> Context:
    return Context((name, 0), salt, list(tokens), len(tokens) if num_prompt is None else num_prompt)


def verify(drafter: Drafter, before: Context, draft: DraftTree, ranked: Ranked) -> Verified:
    """One step of the target; the context is a new one, with the new tokens."""
    tokens, node, nodes = list(before.tokens), ROOT, list[int]()
    while True:
        tokens.append(ranked(tokens)[0])
        child = draft.children.get((node, tokens[-1]))
        if child is None:
            break
        node = child
        nodes.append(node)
    return told(drafter, before, draft, ranked, tokens[len(before.tokens) :], nodes)


def told(
    drafter: Drafter, before: Context, draft: DraftTree, ranked: Ranked, new: Sequence[int], nodes: Sequence[int]
) -> Verified:
    """What a drafter hears of a step that added these tokens: the top tokens too, if it asks for them."""
    paths: list[list[int]] = []
    for token_id, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append([*(() if parent == ROOT else paths[parent]), token_id])
    count = drafter.num_top_ids
    top_ids = [ranked([*before.tokens, *path])[:count] for path in ([], *paths)] if count else []
    after = before._replace(tokens=[*before.tokens, *new])
    return Verified(after, len(new), draft, tuple(nodes), top_ids)


@dataclass
class Play:
    """A drafter at work. Mutated only by its test."""

    drafter: Drafter
    ranked: Ranked
    max_nodes: int = 12
    proposed: list[tuple[Context, DraftTree]] = field(default_factory=list)
    num_accepted: int = 0

    def step(self, contexts: Sequence[Context]) -> list[Context]:
        """Propose, verify, learn; the contexts after it."""
        drafts = self.drafter.propose(contexts, self.max_nodes)
        assert len(drafts) == len(contexts)
        for draft in drafts:
            draft.check()
            assert len(draft) <= self.max_nodes
        pairs = list(zip(contexts, drafts, strict=True))
        self.proposed += pairs
        verified = [verify(self.drafter, before, draft, self.ranked) for before, draft in pairs]
        self.num_accepted += sum(len(one.nodes) for one in verified)
        self.drafter.learn(verified)
        return [one.context for one in verified]

    def run(self, contexts: Sequence[Context], num_steps: int) -> list[Context]:
        for _ in range(num_steps):
            contexts = self.step(contexts)
        return list(contexts)


def successors(first: int = 0, size: int = 100) -> Ranked:
    """Tokens of [first, first + size): each is followed by one of its own, by the one before it now and then."""

    def ranked(tokens: Sequence[int]) -> list[int]:
        turn = tokens[-1] * 7 + (tokens[-2] if len(tokens) > 1 and tokens[-1] % 5 == 0 else 0)
        return [first + (turn + 13 * rank + 1) % size for rank in range(8)]

    return ranked
