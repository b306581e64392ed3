"""A drafter's tree of one sequence: grown where it is most probably right, walked down as the target's tokens come."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.speculative.pool.ends import chain
from tests.workers.speculative.trees import Path, paths, trees
from workers.speculative.pool.drafted import LEAST_AHEAD, PATIENCE, ROUNDS_AHEAD, Drafted
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree


def begun(*tokens: int, max_nodes: int = 20) -> Drafted:
    return Drafted(("1", 7), "salt", list(tokens) or [1, 2, 3], 2, max_nodes=max_nodes)


def asked(drafted: Drafted) -> list[int] | None:
    """The tokens that the next draft assumes; None if none is wanted."""
    context = drafted.next()
    if context is None:
        return None
    assert (context.key, context.salt, context.num_prompt) == (drafted.key, "salt", 2)
    known = len(context.tokens) - context.num_guessed
    assert list(context.tokens[:known]) == drafted.tokens
    return list(context.tokens[known:])


def test_the_likely_continuation_comes_first_and_then_the_runners_up() -> None:
    drafted = begun()
    assert drafted.is_wanting
    assert asked(drafted) == []
    fork = DraftTree((4, 5, 6), (ROOT, 0, ROOT), (0.6, 0.9, 0.3), (1, 1, 1))
    assert drafted.grow(fork) == ([], fork)
    assert not drafted.is_wanting
    assert asked(drafted) == [4, 5]  # 0.54, against 0.3
    assert drafted.grow(chain(7)) == ([4, 5], chain(7))
    assert asked(drafted) == [6]  # 0.3, against 0.27
    drafted.grow(chain(8, probability=0.2))
    assert asked(drafted) == [4, 5, 7]
    drafted.grow(DraftTree())  # nothing is known there
    assert asked(drafted) is None  # 0.06 is left


def test_walking_down_keeps_what_is_left() -> None:
    drafted = begun()
    drafted.next()
    drafted.grow(DraftTree((4, 5, 6, 7), (ROOT, 0, 0, 1), (0.9, 0.5, 0.4, 0.9), (1,) * 4))
    assert drafted.follow(3, [4])
    assert drafted.tokens == [1, 2, 3, 4]
    assert not drafted.is_wanting
    assert asked(drafted) == [5, 7]
    assert drafted.follow(4, [6])
    assert drafted.is_wanting  # a leaf: nothing has been drafted after it
    assert asked(drafted) == []
    assert drafted.tokens == [1, 2, 3, 4, 6]


def test_an_unforeseen_token_begins_anew() -> None:
    drafted = begun()
    drafted.next()
    drafted.grow(chain(4, 5, 6))
    assert drafted.follow(3, [4, 9])
    assert drafted.is_wanting
    assert asked(drafted) == []
    assert drafted.grow(chain(5)) == ([], chain(5))


def test_what_is_not_new_is_not_told_again() -> None:
    drafted = begun()
    drafted.next()
    drafted.grow(DraftTree())
    assert asked(drafted) is None
    assert drafted.follow(3, [4])
    drafted.next()
    assert drafted.grow(chain(5, 6))[1] == chain(5, 6)
    drafted._at = drafted._root  # as if it had been asked again
    both = DraftTree((5, 6, 7, 8), (ROOT, 0, 0, ROOT), (0.5,) * 4, (1,) * 4)
    assert paths(drafted.grow(both)[1]) == [(5,), (5, 7), (8,)]


def test_gaps_are_refused_and_overlaps_are_not() -> None:
    drafted = begun()
    assert not drafted.follow(4, [9])
    assert drafted.tokens == [1, 2, 3]
    assert drafted.follow(1, [2, 3])
    assert drafted.follow(0, [1])
    assert drafted.follow(3, [])
    assert drafted.tokens == [1, 2, 3]
    assert drafted.follow(2, [3, 4])
    assert drafted.tokens == [1, 2, 3, 4]


def test_a_tree_is_bounded() -> None:
    for max_nodes in (1, 4, 63):
        drafted = begun(max_nodes=max_nodes)
        num_nodes = 0
        while asked(drafted) is not None:
            assert num_nodes < min(ROUNDS_AHEAD * max_nodes, MAX_NODES)
            _, new = drafted.grow(chain(5, 6, 7, 8, probability=1.0))
            num_nodes += len(new)
        assert num_nodes >= min(ROUNDS_AHEAD * max_nodes, MAX_NODES)
        drafted.follow(3, [5])
        assert (asked(drafted) is not None) == (num_nodes - 1 < min(ROUNDS_AHEAD * max_nodes, MAX_NODES))


def test_who_wants_no_nodes_gets_none() -> None:
    assert asked(begun(max_nodes=0)) is None


def test_improbable_places_are_left_alone() -> None:
    drafted = begun()
    drafted.next()
    drafted.grow(chain(4, 5, probability=0.3))
    assert LEAST_AHEAD > 0.3 * 0.3
    assert asked(drafted) is None


def test_a_long_prompt_gets_several_tries() -> None:
    drafted = begun(*range(2 * PATIENCE + 5))
    for _ in range(2):
        assert asked(drafted) == []
        assert drafted.grow(DraftTree()) == ([], DraftTree())
        assert drafted.is_wanting
    assert asked(drafted) == []
    drafted.grow(DraftTree())
    assert asked(drafted) is None
    assert not drafted.is_wanting
    drafted.follow(2 * PATIENCE + 5, [7])
    assert drafted.is_wanting
    assert asked(drafted) == []


class Naive:
    """The same by paths alone."""

    def __init__(self, max_nodes: int) -> None:
        self.known: dict[Path, float] = {}  # by path, the probability of its last token
        self.grown: set[Path] = set()
        self._limit = min(ROUNDS_AHEAD * max_nodes, MAX_NODES)

    def path_probability(self, path: Path) -> float:
        product = 1.0
        for length in range(1, len(path) + 1):
            product *= self.known[path[:length]]
        return product

    def open(self) -> Mapping[Path, float]:
        """Places that may be asked for."""
        if len(self.known) >= self._limit:
            return {}
        inner = {path[:-1] for path in self.known}
        leaves = {path: self.path_probability(path) for path in [(), *self.known] if path not in inner | self.grown}
        best = max(leaves.values(), default=0.0)
        return {path: value for path, value in leaves.items() if value == best and best >= LEAST_AHEAD}

    def grow(self, at: Path, draft: DraftTree) -> set[Path]:
        """What is new."""
        self.grown.add(at)
        new = {(*at, *path): p for path, p in zip(paths(draft), draft.probabilities, strict=True)}
        added = {path: p for path, p in new.items() if path not in self.known}
        self.known |= added
        return set(added)

    def follow(self, token_id: int) -> None:
        self.grown = {path[1:] for path in self.grown if path[:1] == (token_id,)}
        self.known = {path[1:]: p for path, p in self.known.items() if len(path) > 1 and path[0] == token_id}


@given(st.integers(1, 30), st.lists(st.one_of(trees(12), st.integers(0, 5)), max_size=25))
@settings(deadline=None)
def test_it_grows_and_walks_as_paths_do(max_nodes: int, events: list[DraftTree | int]) -> None:
    drafted, naive = begun(max_nodes=max_nodes), Naive(max_nodes)
    for event in events:
        if isinstance(event, int):
            assert drafted.follow(len(drafted.tokens), [event])
            naive.follow(event)
        else:
            at, allowed = asked(drafted), naive.open()
            assert (at is None) == (not allowed)
            if at is None:
                continue
            assert tuple(at) in allowed
            assumed, told = drafted.grow(event)
            assert assumed == at
            told.check()
            new = naive.grow(tuple(at), event)
            assert new <= {(*at, *path) for path in paths(told)} <= set(naive.known)
            assert bool(len(told)) == bool(new)
        assert drafted._root.size() == len(naive.known)
        assert drafted.is_wanting == (not naive.known and () not in naive.grown)
