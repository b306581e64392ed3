"""The planner: what it covers, what it saves beside every possible choice, and when it plans again."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.attention.cost import DEFAULT_COST, FittedCost
from workers.attention.planner import (
    MAX_BOUNDS,
    MAX_GROWTH,
    Branch,
    CostModel,
    Grouping,
    Path,
    Planner,
    PlannerStats,
    Share,
    SharingMode,
    predict,
)

PAGE_SIZE = 16
SHARING: tuple[SharingMode, ...] = ("planned", "root", "all")
MODES: tuple[SharingMode, ...] = ("never", *SHARING)


@dataclass(frozen=True)
class Formula:
    """A cost model from two functions."""

    segment_s: Callable[[int, int], float]
    merge_s: Callable[[int], float]

    def segment(self, num_rows: int, num_keys: int) -> float:
        return self.segment_s(num_rows, num_keys)

    def merge(self, num_rows: int) -> float:
        return self.merge_s(num_rows)


FREE_START = Formula(lambda m, keys: keys * (4.0 + m), lambda m: 0.0)  # any sharing pays

# Concave in rows, straight in keys: what the planner promises to solve.
CONCAVE: dict[str, CostModel] = {
    "measured": DEFAULT_COST,
    "free start": FREE_START,
    "nothing to gain": Formula(lambda m, keys: keys * 0.1 * m, lambda m: 0.0),
    "dear start": Formula(lambda m, keys: 4000.0 + keys * (12.0 + m), lambda m: 20.0 * m),
    "dear merge": Formula(lambda m, keys: 50.0 + keys * (12.0 + m), lambda m: 300.0 * m),
    "root of rows": Formula(lambda m, keys: 200.0 + keys * m**0.5, lambda m: 10.0 * m),
    "bent": FittedCost(800.0, (1, 4, 8, 32), (10.0, 30.0, 50.0, 100.0), 60.0),
}
# Steps and a roof in rows, as machines have them; and lengths in blocks of four pages, far from straight.
JAGGED: dict[str, CostModel] = {
    "rows in tiles of 4": Formula(lambda m, keys: 500.0 + keys * 10.0 * -(-m // 4), lambda m: 40.0 * m),
    "roof at 6 rows": Formula(lambda m, keys: 300.0 + keys * max(12.0, 2.0 * m), lambda m: 40.0 * m),
    "keys in blocks of 64": Formula(lambda m, keys: 300.0 + -(-keys // 64) * 64 * (12.0 + m), lambda m: 40.0 * m),
}


def branch(path: Path, *, num_rows: int = 1, tail: int = 0) -> Branch:
    """A branch whose rows follow its path at once, or after `tail` keys of its own."""
    return Branch(num_rows, (path[-1][1] if path else 0) * PAGE_SIZE + tail + num_rows, path)


def levels(*sizes: tuple[int, int], tail: int = 0) -> list[Branch]:
    """A regular tree from (nodes in the level, keys of each); the last level's nodes are one branch each."""
    num_branches = sizes[-1][0]
    branches = []
    for index in range(num_branches):
        path, end = list[tuple[int, int]](), 0
        for level, (num_nodes, num_keys) in enumerate(sizes):
            end += num_keys // PAGE_SIZE
            path.append((level * 10_000 + index * num_nodes // num_branches, end))
        branches.append(branch(tuple(path), tail=tail))
    return branches


def random_branches(generator: random.Random, count: int) -> list[Branch]:
    """Branches down a random tree: nodes of few or many pages, rows before and after their ends, some of no tree."""
    ends: dict[int, int] = {}
    branches = []
    for _ in range(count):
        path, node, end = list[tuple[int, int]](), 0, 0
        for _ in range(generator.randint(0, 4)):
            node = node * 4 + generator.randint(1, 3)
            end += ends.setdefault(node, generator.choice([1, 1, 2, 4, 8, 40]))
            path.append((node, end))
        num_rows = generator.choice([1, 1, 1, 2, 5])
        num_before = max(0, end * PAGE_SIZE + generator.choice([0, 3, 40, 300, -1, -30]))
        branches.append(Branch(num_rows, num_before + num_rows, tuple(path)))
    return branches


def labels(branch: Branch) -> list[tuple[int, int]]:
    """What each page before a branch's first row holds, as far as others may have it too: (node, page)."""
    held = []
    start = 0
    for node, end in branch.path:
        held += [(node, page) for page in range(start, end)]
        start = end
    return held[: (branch.num_keys - branch.num_rows) // PAGE_SIZE]


def shares_of(grouping: Grouping, index: int) -> list[Share]:
    """The shares of one branch, outer before inner."""
    place = grouping.order.index(index)
    return [share for share in grouping.shares if share.first <= place < share.first + share.count]


def check(grouping: Grouping, branches: Sequence[Branch]) -> None:
    """Every key of every branch is covered exactly once, and only by those who have it."""
    assert sorted(grouping.order) == list(range(len(branches)))
    assert len(grouping.own_start) == len(branches)
    for index in range(len(branches)):
        stops = [0, *(share.stop_page for share in shares_of(grouping, index))]
        assert [share.start_page for share in shares_of(grouping, index)] == stops[:-1]
        assert grouping.own_start[index] == stops[-1]
        assert grouping.own_start[index] * PAGE_SIZE <= branches[index].num_keys - branches[index].num_rows
    for share in grouping.shares:
        assert share.count >= 2
        assert 0 <= share.start_page < share.stop_page
        members = grouping.order[share.first : share.first + share.count]
        held = [labels(branches[index])[share.start_page : share.stop_page] for index in members]
        assert len(held[0]) == share.stop_page - share.start_page
        assert all(pages == held[0] for pages in held)
    for outer, inner in combinations(grouping.shares, 2):
        is_nested = outer.first <= inner.first and inner.first + inner.count <= outer.first + outer.count
        is_apart = inner.first >= outer.first + outer.count or outer.first >= inner.first + inner.count
        assert is_apart or (is_nested and inner.count < outer.count)  # equal ones would have been one


def least_seconds(branches: Sequence[Branch], cost: CostModel) -> float:
    """The cheapest of all choices: at every place where branches part, every subset of them is cut."""
    held = [labels(branch) for branch in branches]

    @cache
    def least(members: tuple[int, ...], start: int) -> float:
        if len(members) == 1:
            return cost.segment(branches[members[0]].num_rows, branches[members[0]].num_keys - start * PAGE_SIZE)
        page = agreement([held[index] for index in members])
        children = list(parts(members, page))
        return min(choices(children, start, page))

    def parts(members: tuple[int, ...], page: int) -> Iterator[tuple[int, ...]]:
        runs: dict[tuple[int, int], list[int]] = {}
        for index in members:
            if len(held[index]) == page:
                yield (index,)
            else:
                runs.setdefault(held[index][page], []).append(index)
        yield from map(tuple, runs.values())

    def choices(children: list[tuple[int, ...]], start: int, page: int) -> Iterator[float]:
        for size in range(len(children) + 1 if page > start else 1):
            for cut in combinations(children, size):
                rows = sum(branches[index].num_rows for child in cut for index in child)
                shared = cost.segment(rows, (page - start) * PAGE_SIZE) + cost.merge(rows) if cut else 0.0
                yield shared + sum(least(child, page if child in cut else start) for child in children)

    return least(tuple(range(len(branches))), 0)


def agreement(runs: Sequence[Sequence[object]]) -> int:
    """How many leading items all runs have in common."""
    return next((i for i, items in enumerate(zip(*runs, strict=False)) if len(set(items)) > 1), min(map(len, runs)))


def seconds(branches: Sequence[Branch], cost: CostModel, mode: SharingMode = "planned") -> float:
    grouping = Planner(cost, PAGE_SIZE, mode=mode).group(branches)
    check(grouping, branches)
    return predict(grouping, branches, cost, PAGE_SIZE).total_s


def excess(cost: CostModel, *, num_tries: int = 60) -> list[float]:
    """By how much the plans of random tries cost more than the best choice, in parts of it; three seeds."""
    generators = [random.Random(seed) for seed in range(3)]
    tries = [random_branches(chance, chance.randint(2, 9)) for chance in generators for _ in range(num_tries)]
    return [seconds(branches, cost) / least_seconds(branches, cost) - 1 for branches in tries]


@pytest.mark.parametrize("name", CONCAVE)
def test_no_choice_is_cheaper_where_costs_are_concave(name: str) -> None:
    assert max(excess(CONCAVE[name])) < 1e-9


@pytest.mark.parametrize(
    ("name", "least_equal", "most_over"),
    [("rows in tiles of 4", 0.95, 0.01), ("roof at 6 rows", 0.95, 0.01), ("keys in blocks of 64", 0.6, 0.1)],
)
def test_plans_are_near_the_best_where_costs_are_jagged(name: str, least_equal: float, most_over: float) -> None:
    over = excess(JAGGED[name])
    assert sum(part < 1e-9 for part in over) >= least_equal * len(over)
    assert max(over) < most_over
    assert sum(over) < 0.01 * len(over)


def test_the_tries_that_are_searched_want_all_kinds_of_plans() -> None:
    """Some share nothing, some share in one level, some in several; some carry a branch past a share."""
    generator = random.Random(7)
    depths = set()
    for _ in range(60):
        branches = random_branches(generator, generator.randint(2, 9))
        grouping = Planner(CONCAVE["bent"], PAGE_SIZE).group(branches)
        depths.add(max(len(shares_of(grouping, index)) for index in range(len(branches))))
    assert depths >= {0, 1, 2}


@pytest.mark.parametrize("mode", SHARING)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), name=st.sampled_from(sorted(CONCAVE | JAGGED)))
@settings(max_examples=60, deadline=None)
def test_every_key_is_covered_exactly_once(mode: SharingMode, seed: int, count: int, name: str) -> None:
    branches = random_branches(random.Random(seed), count)
    check(Planner((CONCAVE | JAGGED)[name], PAGE_SIZE, mode=mode).group(branches), branches)


def test_a_tree_of_two_levels_is_planned_in_two_levels() -> None:
    branches = levels((1, 1024), (4, 512), (32, 64), tail=10)
    grouping = Planner(DEFAULT_COST, PAGE_SIZE).group(branches)
    check(grouping, branches)
    assert grouping.shares[0] == Share(0, 32, 0, 64)
    assert sorted(grouping.shares[1:], key=lambda share: share.first) == [Share(i * 8, 8, 64, 96) for i in range(4)]
    assert set(grouping.own_start) == {96}


def test_a_page_is_not_worth_a_segment_that_is_dear_to_start() -> None:
    branches = [branch(((1, 1), (2, 9))), branch(((1, 1), (3, 9)))]
    assert Planner(CONCAVE["dear start"], PAGE_SIZE).group(branches) == Grouping((0, 1), (), (0, 0))
    assert Planner(FREE_START, PAGE_SIZE).group(branches).shares == (Share(0, 2, 0, 1),)


def test_a_branch_with_many_rows_shares_less_readily() -> None:
    """For 64 rows the arithmetic counts, not the reading, so a merge of each would cost more than it saves."""
    branches = [branch(((1, 4),), num_rows=num_rows, tail=50) for num_rows in (64, 1, 1, 1, 1, 1, 1, 1, 1)]
    cost = Formula(lambda m, keys: 20.0 + keys * (10.0 + m), lambda m: 40.0 * m)
    grouping = Planner(cost, PAGE_SIZE).group(branches)
    check(grouping, branches)
    assert grouping.shares == (Share(0, 8, 0, 4),)
    assert grouping.own_start[0] == 0


def test_among_subtrees_too_those_that_gain_most_per_row_share() -> None:
    cost = Formula(lambda m, keys: 20.0 + keys * (10.0 + m), lambda m: 40.0 * m)
    branches = [
        *(branch(((1, 4), (2, 6)), num_rows=64, tail=50) for _ in range(2)),
        *(branch(((1, 4), (3 + i % 3, 6)), tail=50) for i in range(6)),
        branch(((1, 4),), num_rows=2, tail=50),
    ]
    grouping = Planner(cost, PAGE_SIZE).group(branches)
    check(grouping, branches)
    assert grouping.shares[0] == Share(0, 7, 0, 4)
    assert set(grouping.order[:7]) == set(range(2, 9))
    assert seconds(branches, cost) == pytest.approx(least_seconds(branches, cost), rel=1e-9)


def test_several_trees_are_planned_side_by_side() -> None:
    branches = [branch(((i % 3, 0), (10 + i % 3, 64 + i % 3), (100 + i, 80 + i))) for i in range(12)]
    grouping = Planner(DEFAULT_COST, PAGE_SIZE).group(branches)
    check(grouping, branches)
    assert sorted(share.stop_page for share in grouping.shares) == [64, 65, 66]
    assert all(share.count == 4 and share.start_page == 0 for share in grouping.shares)


def test_a_sequence_that_starts_inside_a_shared_node_shares_what_comes_before_its_rows() -> None:
    whole = [branch(((1, 40),), tail=5) for _ in range(8)]
    again = Branch(1, 40 * PAGE_SIZE, ((1, 40),))  # computes the node's last key once more
    grouping = Planner(FREE_START, PAGE_SIZE).group([*whole, again])
    check(grouping, [*whole, again])
    assert grouping.own_start == (*[40] * 8, 39)
    assert grouping.shares == (Share(0, 9, 0, 39), Share(grouping.shares[1].first, 8, 39, 40))


def test_a_sequence_that_computes_the_shared_pages_in_this_step_shares_none() -> None:
    branches = [Branch(64, 64, ((1, 4),)), branch(((1, 4),)), branch(((1, 4),))]
    grouping = Planner(FREE_START, PAGE_SIZE).group(branches)
    check(grouping, branches)
    assert grouping.own_start == (0, 4, 4)


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_share_is_left_alone(mode: SharingMode) -> None:
    lone = branch(((1, 100), (2, 200)))
    for branches in ([], [lone], [branch(()), branch(())], [lone, branch(()), branch(((3, 100),))]):
        grouping = Planner(FREE_START, PAGE_SIZE, mode=mode).group(branches)
        assert grouping == Grouping(tuple(range(len(branches))), (), (0,) * len(branches))


def test_modes_share_nothing_the_first_prefix_or_everything() -> None:
    branches = [
        *(branch(((1, 2), (2, 4), (3 + i % 2, 5), (10 + i, 9))) for i in range(4)),
        *(branch(((50, 1), (51 + i, 3))) for i in range(2)),
    ]
    shares = {mode: set(_planned(branches, mode).shares) for mode in ("never", "root", "all")}
    assert not shares["never"]
    assert shares["root"] == {Share(0, 4, 0, 4), Share(4, 2, 0, 1)}
    assert shares["all"] == shares["root"] | {Share(0, 2, 4, 5), Share(2, 2, 4, 5)}


def _planned(branches: Sequence[Branch], mode: SharingMode) -> Grouping:
    grouping = Planner(CONCAVE["dear start"], PAGE_SIZE, mode=mode).group(branches)
    check(grouping, branches)
    return grouping


def test_a_plan_costs_no_more_than_any_mode() -> None:
    generator = random.Random(3)
    for _ in range(30):
        branches = random_branches(generator, 24)
        planned = seconds(branches, DEFAULT_COST)
        assert all(planned <= seconds(branches, DEFAULT_COST, mode) + 1e-12 for mode in MODES)


@pytest.mark.parametrize(("depth", "over"), [(MAX_BOUNDS - 1, 1e-9), (2 * MAX_BOUNDS, 0.05)])
def test_tries_too_deep_for_all_bounds_are_planned_nearly_as_well(depth: int, over: float) -> None:
    branches = caterpillar(depth)
    assert seconds(branches, DEFAULT_COST) <= least_seconds(branches, DEFAULT_COST) * (1 + over)


def test_a_tree_deeper_than_python_recurses_is_planned() -> None:
    branches = caterpillar(sys.getrecursionlimit() + 100)
    cost = {
        mode: predict(Planner(DEFAULT_COST, PAGE_SIZE, mode=mode).group(branches), branches, DEFAULT_COST, PAGE_SIZE)
        for mode in MODES
    }
    assert min(cost, key=lambda mode: cost[mode].total_s) == "planned"


def caterpillar(depth: int) -> list[Branch]:
    """A chain of nodes of a page each; at the end of each a branch leaves."""
    chain = [(node, node + 1) for node in range(depth)]
    return [branch(tuple(chain[:stop]), tail=20) for stop in range(1, depth + 1)]


def test_a_prediction_adds_up_segments_and_merges() -> None:
    branches = [branch(((1, 2),), num_rows=3, tail=8), branch(((1, 2),), num_rows=2, tail=4)]
    grouping = Grouping((1, 0), (Share(0, 2, 0, 2),), (2, 2))
    prediction = predict(grouping, branches, Formula(lambda m, keys: m * 1000.0 + keys, lambda m: m / 8), PAGE_SIZE)
    assert prediction.segment_s == (5000 + 32) + (3000 + 11) + (2000 + 6)
    assert prediction.merge_s == prediction.total_s - prediction.segment_s == 5 / 8


def grown(branches: Sequence[Branch], num_keys: int) -> list[Branch]:
    return [replace(branch, num_keys=branch.num_keys + num_keys) for branch in branches]


def test_decoding_on_reuses_the_plan() -> None:
    branches = levels((1, 1024), (8, 64), tail=10)
    planner = Planner(DEFAULT_COST, PAGE_SIZE)
    first = planner.group(branches)
    for step in range(20):
        own = grown(branches, step)
        if step > 6:  # a page of its own is published, in a new node or at the end of the last one
            own[0] = replace(own[0], path=(*own[0].path, (777, own[0].path[-1][1] + 1)))
            own[1] = replace(own[1], path=(own[1].path[0], (own[1].path[1][0], own[1].path[1][1] + 1)))
        assert planner.group(own) is first
        check(first, own)
    assert planner.stats == PlannerStats(num_plans=1, num_reuses=20)


@pytest.mark.parametrize(
    "change",
    [
        lambda branches: branches[:-1],
        lambda branches: [*branches, branches[0]],
        lambda branches: branches[::-1],
        lambda branches: [replace(branches[0], num_rows=2), *branches[1:]],
        lambda branches: [replace(branches[0], path=branches[0].path[:1]), *branches[1:]],
        lambda branches: [replace(branches[0], path=((99, 64), branches[0].path[1])), *branches[1:]],
        lambda branches: grown(branches, -1),
        lambda branches: grown(branches, MAX_GROWTH + 1),
    ],
    ids=["left", "joined", "reordered", "rows", "path shortened", "node split", "rolled back", "grown"],
)
def test_what_may_change_the_choice_is_planned_again(change: Callable[[list[Branch]], list[Branch]]) -> None:
    branches = levels((1, 1024), (8, 64), tail=10)
    planner = Planner(DEFAULT_COST, PAGE_SIZE)
    planner.group(branches)
    changed = change(branches)
    check(planner.group(changed), changed)
    assert planner.stats == PlannerStats(num_plans=2, num_reuses=0)


def test_sequences_that_went_on_alike_share_what_they_came_to_have_in_common() -> None:
    """Equal prompts decoded greedily publish equal pages: they are seen once enough of them are there."""
    branches = [branch(((1, 64),), tail=1) for _ in range(8)]
    planner = Planner(DEFAULT_COST, PAGE_SIZE)
    stops = []
    for step in range(MAX_GROWTH):
        own = [replace(branch, path=((1, 64), (2, 64 + step // PAGE_SIZE))) for branch in grown(branches, step)]
        grouping = planner.group(own)
        check(grouping, own)
        stops.append(grouping.shares[0].stop_page)
    assert all(old <= new for old, new in pairwise(stops))
    assert stops[0] == 64
    assert stops[-1] > 64
    assert planner.stats.num_plans == 2
