"""Several drafters' trees as one: paths that begin alike are one path.

RASD fuses a retrieval tree with a draft model's tree by longest prefix ("RASD: Retrieval-Augmented Speculative
Decoding", arXiv 2503.03434, section 3.3); here any number of trees are fused, and a node that several drafters propose
carries the bits of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workers.speculative.tree import ROOT, DraftTree


def fuse(drafts: Sequence[DraftTree], drafters: Sequence[int]) -> DraftTree:
    """One tree of all nodes, each with the source bits of its `drafters`.

    Where paths meet, the higher probability counts.
    """
    if len(drafts) == 1:
        [draft], [number] = drafts, drafters
        sources = (1 << number,) * len(draft)
        return draft if draft.sources == sources else replace(draft, sources=sources)
    union = _Union()
    for number, draft in zip(drafters, drafts, strict=True):
        union.add(draft, sources=(1 << number,) * len(draft))
    return union.tree()


def graft(draft: DraftTree, more: DraftTree, at: int = ROOT) -> DraftTree:
    """A draft with another one hung under one of its nodes: it went on from there."""
    union = _Union()
    union.add(draft, sources=draft.sources)
    union.add(more, sources=more.sources, at=at)
    return union.tree()


class _Union:
    """Trees laid over each other. Lives within one call."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}
        self._probabilities: list[float] = []
        self._sources: list[int] = []

    def add(self, draft: DraftTree, *, sources: Sequence[int], at: int = ROOT) -> None:
        """`at`: the node of the union so far that is the draft's root."""
        place = {ROOT: at}
        for node, (token_id, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            edge = place[parent], token_id
            here = place[node] = self._nodes.setdefault(edge, len(self._nodes))
            if here == len(self._probabilities):
                self._probabilities.append(draft.probabilities[node])
                self._sources.append(sources[node])
            else:
                self._probabilities[here] = max(self._probabilities[here], draft.probabilities[node])
                self._sources[here] |= sources[node]

    def tree(self) -> DraftTree:
        return DraftTree(
            tuple([token_id for _, token_id in self._nodes]),
            tuple([parent for parent, _ in self._nodes]),
            tuple(self._probabilities),
            tuple(self._sources),
        )
