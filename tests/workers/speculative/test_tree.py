"""Draft trees: what a tree says of its nodes is what its parents and tokens mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.speculative.trees import paths, trees
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree


def ancestry(tree: DraftTree, node: int) -> list[int]:
    """The node and its ancestors, the root left out."""
    line = []
    while node != ROOT:
        line.append(node)
        node = tree.parents[node]
    return line


def closure(tree: DraftTree, nodes: set[int]) -> set[int]:
    return {ancestor for node in nodes for ancestor in ancestry(tree, node)}


@given(trees())
@settings(deadline=None)
def test_depths_masks_and_path_probabilities_follow_the_ancestors(tree: DraftTree) -> None:
    tree.check()
    assert tree.masks[0] == 1
    for node in range(len(tree)):
        line = ancestry(tree, node)
        assert tree.depths[node] == len(line) == len(paths(tree)[node])
        assert tree.masks[node + 1] == 1 | sum(1 << ancestor + 1 for ancestor in line)
        expected = 1.0
        for ancestor in line:
            expected *= tree.probabilities[ancestor]
        assert tree.path_probabilities[node] == pytest.approx(expected, abs=1e-12)


@given(trees())
@settings(deadline=None)
def test_children_lead_along_every_path(tree: DraftTree) -> None:
    for node, path in enumerate(paths(tree)):
        at = ROOT
        for token_id in path:
            at = tree.children[at, token_id]
        assert at == node
    assert len(tree.children) == len(tree)


@given(trees(), st.data())
@settings(deadline=None)
def test_keeping_nodes_with_their_parents_keeps_their_paths(tree: DraftTree, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, len(tree) - 1))) if len(tree) else set()
    nodes = sorted(closure(tree, chosen))
    kept = tree.keep(data.draw(st.permutations(nodes)))
    kept.check()
    assert paths(kept) == [paths(tree)[node] for node in nodes]
    assert kept.probabilities == tuple(tree.probabilities[node] for node in nodes)
    assert kept.sources == tuple(tree.sources[node] for node in nodes)


def test_a_node_is_not_kept_without_its_parent() -> None:
    with pytest.raises(KeyError):
        DraftTree.chain([5, 6, 7], [0.5] * 3).keep([0, 2])


@given(trees())
@settings(deadline=None)
def test_only_one_continuation_is_a_chain(tree: DraftTree) -> None:
    assert tree.is_chain == (tree.depths == tuple(range(1, len(tree) + 1)))


@given(st.lists(st.integers(0, 9), max_size=MAX_NODES))
@settings(deadline=None)
def test_a_chain_is_its_tokens_in_order(tokens: list[int]) -> None:
    tree = DraftTree.chain(tokens, [0.25] * len(tokens), source=4)
    tree.check()
    assert tree.is_chain
    assert len(tree) == len(tokens)
    assert paths(tree) == [tuple(tokens[: depth + 1]) for depth in range(len(tokens))]
    assert set(tree.sources) <= {4}


def test_an_empty_tree_is_a_chain_of_nothing() -> None:
    DraftTree().check()
    assert DraftTree().is_chain
    assert DraftTree().masks == (1,)
    assert DraftTree().keep([]) == DraftTree()


BRANCHED = DraftTree((3, 4, 5, 6, 3), (ROOT, 0, ROOT, 0, 3), (0.9, 0.8, 0.1, 0.2, 0.5), (1, 2, 3, 1, 2))


def test_a_path_leads_to_its_node() -> None:
    assert [BRANCHED.path(node) for node in range(5)] == [[3], [3, 4], [5], [3, 6], [3, 6, 3]]
    assert BRANCHED.path(ROOT) == []
    assert [BRANCHED.find(BRANCHED.path(node)) for node in range(5)] == [0, 1, 2, 3, 4]
    assert BRANCHED.find([]) == ROOT
    assert BRANCHED.find([4]) is None
    assert BRANCHED.find([3, 6, 3, 3]) is None


def test_what_is_left_hangs_under_the_tokens_that_came() -> None:
    assert BRANCHED.after([3]) == DraftTree((4, 6, 3), (ROOT, ROOT, 1), (0.8, 0.2, 0.5), (2, 1, 2))
    assert BRANCHED.after([3, 6]) == BRANCHED.below(3) == DraftTree((3,), (ROOT,), (0.5,), (2,))
    assert BRANCHED.after([]) is BRANCHED
    assert BRANCHED.below(ROOT) == BRANCHED
    for unforeseen in ([3, 4], [5], [9], [3, 9], [3, 6, 3, 3]):
        assert BRANCHED.after(unforeseen) == DraftTree()


@given(trees(), st.lists(st.integers(0, 5), max_size=6))
@settings(deadline=None)
def test_what_is_left_are_the_paths_that_begin_so(tree: DraftTree, tokens: list[int]) -> None:
    """In their order, cut off, with all that is said of their last nodes."""
    left, come = tree.after(tokens), tuple(tokens)
    left.check()
    expected = [node for node, path in enumerate(paths(tree)) if len(path) > len(come) and path[: len(come)] == come]
    assert paths(left) == [paths(tree)[node][len(come) :] for node in expected]
    assert left.probabilities == tuple(tree.probabilities[node] for node in expected)
    assert left.sources == tuple(tree.sources[node] for node in expected)
    at = tree.find(tokens)
    assert (at is None) == (come not in [(), *paths(tree)])
    assert at is None or tree.path(at) == tokens


TREE = DraftTree((3, 4, 3), (ROOT, ROOT, 0), (0.5, 0.25, 1.0), (1, 2, 3))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (replace(TREE, parents=(ROOT, 2, 0)), "a node before its parent"),
        (replace(TREE, parents=(ROOT, 1, 0)), "a node before its parent"),
        (replace(TREE, parents=(ROOT, -2, 0)), "a node before its parent"),
        (replace(TREE, tokens=(3, 3, 3)), "siblings with the same token"),
        (replace(TREE, sources=(1, 0, 3)), "a node of no drafter"),
        (replace(TREE, probabilities=(0.5, 1.5, 1.0)), None),
        (replace(TREE, probabilities=(0.5, 0.25)), None),
        (DraftTree.chain([1] * (MAX_NODES + 1), [1.0] * (MAX_NODES + 1)), f"a draft of {MAX_NODES + 1} nodes"),
    ],
)
def test_check_refuses_what_is_no_tree(broken: DraftTree, message: str | None) -> None:
    TREE.check()
    with pytest.raises(AssertionError, match=message):
        broken.check()


@given(trees())
@settings(deadline=None)
def test_the_trunk_is_the_path_of_which_most_is_expected(tree: DraftTree) -> None:
    def expected(node: int) -> float:
        return sum(tree.path_probabilities[ancestor] for ancestor in ancestry(tree, node))

    trunk = tree.trunk()
    trunk.check()
    assert trunk.is_chain
    if not len(tree):
        assert not len(trunk)
        return
    assert trunk.tokens in paths(tree)
    best = max(expected(node) for node in range(len(tree)))
    assert sum(trunk.path_probabilities) == pytest.approx(best, abs=1e-12)
    assert set(trunk.sources) <= set(tree.sources)


def test_a_chain_is_its_own_trunk() -> None:
    chain = DraftTree.chain([1, 2, 3], [0.5, 0.0, 0.5])
    assert chain.trunk() is chain
