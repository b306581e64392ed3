"""Fusing trees: every path of every tree once, with all who proposed it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.speculative.trees import Path, paths, trees
from workers.speculative.fusion import fuse, graft
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree


def proposals(drafts: list[DraftTree], drafters: list[int]) -> dict[Path, list[tuple[float, int]]]:
    """By path, the probability that each drafter gave it."""
    found: dict[Path, list[tuple[float, int]]] = {}
    for draft, drafter in zip(drafts, drafters, strict=True):
        for path, probability in zip(paths(draft), draft.probabilities, strict=True):
            found.setdefault(path, []).append((probability, drafter))
    return found


@given(st.lists(trees(MAX_NODES // 4), min_size=1, max_size=4), st.permutations([0, 1, 2, 5]))
@settings(deadline=None)
def test_the_fused_tree_has_every_path_and_no_other(drafts: list[DraftTree], numbers: list[int]) -> None:
    drafters = numbers[: len(drafts)]
    fused, expected = fuse(drafts, drafters), proposals(drafts, drafters)
    fused.check()
    assert sorted(paths(fused)) == sorted(expected)
    for node, path in enumerate(paths(fused)):
        assert fused.probabilities[node] == max(probability for probability, _ in expected[path])
        assert fused.sources[node] == sum(1 << drafter for _, drafter in expected[path])


def test_the_drafters_of_a_lone_tree_are_named_too() -> None:
    [draft] = [DraftTree((5, 6, 7), (ROOT, 0, 0), (0.5, 0.25, 0.125), (1, 1, 1))]
    assert fuse([draft], [3]) == DraftTree(draft.tokens, draft.parents, draft.probabilities, (8, 8, 8))


def test_paths_that_part_later_are_one_until_then() -> None:
    fused = fuse([DraftTree.chain([1, 2, 3], [0.9, 0.8, 0.7]), DraftTree.chain([1, 2, 4], [0.5, 0.9, 0.6])], [0, 1])
    assert paths(fused) == [(1,), (1, 2), (1, 2, 3), (1, 2, 4)]
    assert fused.probabilities == (0.9, 0.9, 0.7, 0.6)
    assert fused.sources == (3, 3, 1, 2)


def test_a_tree_is_hung_under_the_node_that_it_goes_on_from() -> None:
    draft = DraftTree((1, 2, 3), (ROOT, 0, ROOT), (0.9, 0.8, 0.1), (1, 2, 4))
    more = DraftTree((5, 2, 6), (ROOT, ROOT, 1), (0.7, 0.95, 0.6), (8, 8, 8))
    grafted = graft(draft, more, 0)
    assert paths(grafted) == [(1,), (1, 2), (3,), (1, 5), (1, 2, 6)]
    assert grafted.probabilities == (0.9, 0.95, 0.1, 0.7, 0.6)
    assert grafted.sources == (1, 10, 4, 8, 8)
    assert paths(graft(draft, more)) == [(1,), (1, 2), (3,), (5,), (2,), (2, 6)]
    assert graft(draft, DraftTree(), 1) == draft
    assert graft(DraftTree(), more) == more


def test_siblings_that_are_said_twice_are_one() -> None:
    """What comes from elsewhere may be so."""
    twice = DraftTree((5, 5, 6), (ROOT, ROOT, 1), (0.2, 0.7, 0.6), (1, 1, 1))
    grafted = graft(DraftTree(), twice)
    grafted.check()
    assert paths(grafted) == [(5,), (5, 6)]
    assert grafted.probabilities == (0.7, 0.6)


@given(trees(MAX_NODES // 2), trees(MAX_NODES // 2), st.data())
@settings(deadline=None)
def test_a_grafted_tree_has_the_paths_of_both_and_no_other(
    draft: DraftTree, more: DraftTree, data: st.DataObject
) -> None:
    at = data.draw(st.integers(ROOT, len(draft) - 1))
    grafted, above = graft(draft, more, at), tuple(draft.path(at))
    grafted.check()
    said: dict[Path, list[tuple[float, int]]] = {}
    for tree, prefix in ((draft, ()), (more, above)):
        for node, path in enumerate(paths(tree)):
            said.setdefault((*prefix, *path), []).append((tree.probabilities[node], tree.sources[node]))
    assert sorted(paths(grafted)) == sorted(said)
    for node, path in enumerate(paths(grafted)):
        assert grafted.probabilities[node] == max(probability for probability, _ in said[path])
        assert grafted.sources[node] == said[path][0][1] | said[path][-1][1]
    assert paths(grafted)[: len(draft)] == paths(draft)
