"""Random draft trees for property tests, and what a tree means: its paths."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

Path = tuple[int, ...]
_NODE = st.tuples(st.integers(0, 10**6), st.integers(0, 5), st.floats(0, 1), st.integers(1, 7))


def grown(nodes: Sequence[tuple[int, int, float, int]]) -> DraftTree:
    """The tree that (parent, token, probability, source) make in order; a parent is any earlier node or the root."""
    edges: dict[tuple[int, int], tuple[float, int]] = {}
    for parent, token_id, probability, source in nodes:
        edges.setdefault((parent % (len(edges) + 1) - 1, token_id), (probability, source))
    return DraftTree(
        tuple(token_id for _, token_id in edges),
        tuple(parent for parent, _ in edges),
        tuple(probability for probability, _ in edges.values()),
        tuple(source for _, source in edges.values()),
    )


def trees(max_nodes: int = MAX_NODES) -> st.SearchStrategy[DraftTree]:
    """Few different tokens, so that trees have paths in common."""
    return st.lists(_NODE, max_size=max_nodes).map(grown)


def paths(tree: DraftTree) -> list[Path]:
    """By node, the tokens from the root to it."""
    found: list[Path] = []
    for token_id, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(() if parent == ROOT else found[parent]), token_id))
    return found
