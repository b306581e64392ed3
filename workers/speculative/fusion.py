"""Several drafters' trees as one: paths that begin alike are one path.

RASD fuses a retrieval tree with a draft model's tree by longest prefix ("RASD: Retrieval-Augmented Speculative
Decoding", arXiv 2503.03434, section 3.3); here any number of trees are fused, and a node that several drafters propose
carries the bits of all.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.speculative.tree import ROOT, DraftTree


def fuse(drafts: Sequence[DraftTree], drafters: Sequence[int]) -> DraftTree:
    """One tree of all nodes, each with the source bits of its `drafters`.

    Where paths meet, the higher probability counts.
    """
    if len(drafts) == 1:
        [draft], [number] = drafts, drafters
        return DraftTree(draft.tokens, draft.parents, draft.probabilities, (1 << number,) * len(draft))
    nodes: dict[tuple[int, int], int] = {}
    probabilities: list[float] = []
    sources: list[int] = []
    for number, draft in zip(drafters, drafts, strict=True):
        place = {ROOT: ROOT}
        for node, (token_id, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            edge = place[parent], token_id
            at = place[node] = nodes.setdefault(edge, len(nodes))
            if at == len(probabilities):
                probabilities.append(draft.probabilities[node])
                sources.append(1 << number)
            else:
                probabilities[at] = max(probabilities[at], draft.probabilities[node])
                sources[at] |= 1 << number
    return DraftTree(
        tuple([token_id for _, token_id in nodes]),
        tuple([parent for parent, _ in nodes]),
        tuple(probabilities),
        tuple(sources),
    )
