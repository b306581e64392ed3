"""A draft: guessed continuations of one sequence, as a tree that the target verifies in one step.

Between drafters, which grow trees, and the scheduler, which puts them behind the sequences' last tokens. Rows of a
step count from the root: row 0 is the sequence's last token, row i + 1 is node i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from workers.attention.protocol import MAX_TREE_ROWS

Distribution: TypeAlias = NDArray[np.float64]  # over the vocabulary

ROOT = -1  # the parent of a tree's first nodes: the sequence's last token, which is no node itself
MAX_NODES = MAX_TREE_ROWS - 1


@dataclass(frozen=True)
class DraftTree:
    """Nodes in an order in which parents come first; siblings differ in their tokens.

    A node's probability is what its drafter gives its token after its parent, its source the drafters that proposed it:
    bit i for the i-th of the worker's drafters. Where a node's children were drawn at random and shall be verified by
    rejection, `drawn_from` has by the node the distribution that they were drawn from; they are in the order drawn, and
    their probabilities tell nothing of their tokens, so that a cut does not either.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    sources: tuple[int, ...] = ()
    drawn_from: Mapping[int, Distribution] = field(default_factory=dict, compare=False)

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Sequence[float], source: int = 1) -> DraftTree:
        """One continuation."""
        parents = tuple(range(ROOT, len(tokens) - 1))
        return cls(tuple(tokens), parents, tuple(probabilities), (source,) * len(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether each node continues the one before."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Each node's distance from the root, from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def path_probabilities(self) -> tuple[float, ...]:
        """The probability that all nodes from the root to each are right, by the drafters' belief."""
        paths: list[float] = []
        for parent, probability in zip(self.parents, self.probabilities, strict=True):
            paths.append(probability if parent == ROOT else paths[parent] * probability)
        return tuple(paths)

    @cached_property
    def masks(self) -> tuple[int, ...]:
        """By row, the rows it sees: its ancestors and itself."""
        masks = [1]
        for row, parent in enumerate(self.parents, start=1):
            masks.append(masks[parent + 1] | 1 << row)
        return tuple(masks)

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """The node that follows a node (or ROOT) by a token."""
        return {edge: node for node, edge in enumerate(zip(self.parents, self.tokens, strict=True))}

    def keep(self, nodes: Iterable[int]) -> DraftTree:
        """The tree of these nodes alone. With each, its parent must be among them."""
        kept = sorted(nodes)
        place = {node: number for number, node in enumerate(kept)} | {ROOT: ROOT}
        return DraftTree(
            tuple([self.tokens[node] for node in kept]),
            tuple([place[self.parents[node]] for node in kept]),
            tuple([self.probabilities[node] for node in kept]),
            tuple([self.sources[node] for node in kept]),
            {place[node]: drawn for node, drawn in self.drawn_from.items() if node in place},
        )

    def path(self, node: int) -> list[int]:
        """The tokens from the root down to a node; of ROOT, none."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def find(self, tokens: Sequence[int]) -> int | None:
        """The node that these tokens lead to from the root; None if the tree has no such path."""
        node = ROOT
        for token_id in tokens:
            child = self.children.get((node, token_id))
            if child is None:
                return None
            node = child
        return node

    def below(self, top: int) -> DraftTree:
        """What hangs under a node, as a tree of its own: the draft that is left once the path to the node is true."""
        place = {top: ROOT}
        for node in range(top + 1, len(self)):
            if self.parents[node] in place:
                place[node] = len(place) - 1
        nodes = list(place)[1:]
        return DraftTree(
            tuple([self.tokens[node] for node in nodes]),
            tuple([place[self.parents[node]] for node in nodes]),
            tuple([self.probabilities[node] for node in nodes]),
            tuple([self.sources[node] for node in nodes]),
        )

    def after(self, tokens: Sequence[int]) -> DraftTree:
        """What is left of the draft once the sequence has gone on with these tokens: empty if they were not in it."""
        top = self.find(tokens)
        if top is None:
            return DraftTree()
        return self if top == ROOT else self.below(top)

    def trunk(self) -> DraftTree:
        """Of its paths, the one of which most tokens are expected to be right: a chain, for who verifies no trees."""
        if self.is_chain:
            return self
        expected: list[float] = []
        for parent, probability in zip(self.parents, self.path_probabilities, strict=True):
            expected.append(probability + (0.0 if parent == ROOT else expected[parent]))
        node, nodes = max(range(len(self)), key=expected.__getitem__), list[int]()
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return self.keep(nodes)

    def cut(self, max_nodes: int) -> DraftTree:
        """The nodes that are most probably right, at most so many."""
        if len(self) <= max_nodes:
            return self
        paths = self.path_probabilities
        return self.keep(sorted(range(len(self)), key=lambda node: (-paths[node], node))[:max_nodes])

    def check(self) -> None:
        """Assert that the tree is as its docstring says."""
        assert len(self.tokens) == len(self.parents) == len(self.probabilities) == len(self.sources)
        assert len(self) <= MAX_NODES, f"a draft of {len(self)} nodes"
        assert all(ROOT <= parent < node for node, parent in enumerate(self.parents)), "a node before its parent"
        assert len(self.children) == len(self), "siblings with the same token"
        assert all(0 <= probability <= 1 for probability in self.probabilities)
        assert all(source > 0 for source in self.sources), "a node of no drafter"
