"""Fusing trees: every path of every tree once, with all who proposed it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.speculative.trees import Path, paths, trees
from workers.speculative.fusion import fuse
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
