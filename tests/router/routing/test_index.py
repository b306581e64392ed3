"""The prefix index against a model that only keeps sets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.blocks import block_hashes
from protos.messages import KVEvents
from router.routing.index import Match, PrefixIndex

PLENTY = 1000
WORKERS = ["a", "b", "c"]

names = st.integers(1, 12)
name_lists = st.lists(names, max_size=8, unique=True).map(tuple)
workers = st.sampled_from(WORKERS)
chains = st.lists(names, max_size=8, unique=True)
events = st.builds(KVEvents, st.integers(0, 6), name_lists, name_lists, st.booleans())
operations = st.one_of(
    st.tuples(st.just("update"), workers, events),
    st.tuples(st.just("next"), workers, st.builds(KVEvents, st.just(0), name_lists, name_lists)),
    st.tuples(st.just("hold"), workers, chains),
    st.tuples(st.just("drop"), workers, chains),
    st.tuples(st.just("forget"), workers, st.none()),
)


class Model:
    """What an index without a bound should say."""

    def __init__(self) -> None:
        self.stored: dict[str, set[int]] = defaultdict(set)
        self.held: dict[str, Counter[int]] = defaultdict(Counter)
        self.sequence: Counter[str] = Counter()
        self.lost: set[str] = set()

    def update(self, worker: str, events: KVEvents) -> bool:
        if events.snapshot:
            self.stored[worker] = set(events.stored)
            self.lost.discard(worker)
        elif worker in self.lost or events.sequence <= self.sequence[worker]:
            return True
        elif events.sequence != self.sequence[worker] + 1:
            self.lost.add(worker)
            return False
        else:
            self.stored[worker] = (self.stored[worker] - set(events.removed)) | set(events.stored)
        self.sequence[worker] = events.sequence
        return True

    def drop(self, worker: str, chain: Iterable[int]) -> None:
        for name in chain:
            if self.held[worker][name] > 0:
                self.held[worker][name] -= 1

    def forget(self, worker: str) -> None:
        self.stored.pop(worker, None)
        self.held.pop(worker, None)
        self.sequence.pop(worker, None)
        self.lost.discard(worker)

    def match(self, chain: Sequence[int]) -> dict[str, Match]:
        found = {}
        for worker in WORKERS:
            live = {name for name, number in self.held[worker].items() if number}
            known = _depth(chain, self.stored[worker] | live)
            if known:
                found[worker] = Match(known, _depth(chain, live))
        return found


def _depth(chain: Sequence[int], having: set[int]) -> int:
    return next((depth for depth, name in enumerate(chain) if name not in having), len(chain))


def _apply(index: PrefixIndex, model: Model, operation: tuple[str, str, object]) -> None:
    kind, worker, argument = operation
    match kind, argument:
        case "update", KVEvents():
            assert index.update(worker, argument) == model.update(worker, argument)
        case "next", KVEvents():
            following = argument._replace(sequence=model.sequence[worker] + 1)
            assert index.update(worker, following) == model.update(worker, following)
        case "hold", list():
            index.hold(worker, argument)
            model.held[worker].update(argument)
        case "drop", list():
            index.drop(worker, argument)
            model.drop(worker, argument)
        case "forget", None:
            index.forget(worker)
            model.forget(worker)


@settings(deadline=None)
@given(st.lists(st.tuples(operations, chains), max_size=30))
def test_it_says_what_the_sets_say(history: list[tuple[tuple[str, str, object], list[int]]]) -> None:
    index, model = PrefixIndex(PLENTY), Model()
    for operation, chain in history:
        _apply(index, model, operation)
        index.check()
        assert dict(index.match(chain)) == model.match(chain)
        assert index.num_blocks == len(set().union(*model.stored.values()))
        assert all(index.num_known(worker) == len(model.stored[worker]) for worker in WORKERS)


@settings(deadline=None)
@given(st.integers(1, 6), st.lists(st.tuples(operations, chains), max_size=30))
def test_the_bound_holds_and_what_it_knows_is_true(
    bound: int, history: list[tuple[tuple[str, str, object], list[int]]]
) -> None:
    index, model = PrefixIndex(bound), Model()
    for operation, chain in history:
        _apply(index, model, operation)
        index.check()
        assert index.num_blocks <= bound
        truth = model.match(chain)
        for worker, match in index.match(chain).items():
            assert match.known <= truth[worker].known
            assert match.live == truth[worker].live


def test_the_least_recently_matched_gives_way_and_tails_before_roots() -> None:
    index = PrefixIndex(6)
    index.update("a", KVEvents(1, (1, 2, 3)))
    index.update("a", KVEvents(2, (11, 12, 13)))
    index.match([1, 2, 3])
    index.update("a", KVEvents(3, (21,)))
    assert index.match([11, 12, 13])["a"].known == 2
    index.match([1, 2, 3])
    index.update("a", KVEvents(4, (31, 32)))
    assert index.match([1, 2, 3])["a"].known == 3
    index.check()


def test_a_prompt_that_ran_here_gives_way_from_its_end() -> None:
    index = PrefixIndex(5)
    index.update("a", KVEvents(1, (1, 2)))
    index.match([1, 2, 3, 4])
    index.hold("a", [1, 2, 3, 4])
    index.update("a", KVEvents(2, (3, 4)))
    index.drop("a", [1, 2, 3, 4])
    index.update("a", KVEvents(3, (11, 12, 13)))
    assert index.match([1, 2, 3, 4])["a"].known == 2


def test_a_burst_is_predicted_before_any_event() -> None:
    index = PrefixIndex(PLENTY)
    index.hold("a", [1, 2, 3])
    assert index.match([1, 2, 9]) == {"a": Match(2, 2)}
    index.hold("a", [1, 2, 9])
    index.drop("a", [1, 2, 3])
    assert index.match([1, 2, 3]) == {"a": Match(2, 2)}
    index.drop("a", [1, 2, 9])
    assert index.match([1, 2, 3]) == {}


def test_after_lost_events_only_a_snapshot_counts() -> None:
    index = PrefixIndex(PLENTY)
    assert index.update("a", KVEvents(1, (1, 2)))
    assert not index.update("a", KVEvents(3, (5,), (2,)))
    assert index.update("a", KVEvents(4, (6,))), "it is asked once"
    assert index.match([1, 2])["a"].known == 2
    assert index.match([6]) == {}
    assert index.update("a", KVEvents(4, (1, 6), snapshot=True))
    assert index.match([1, 2])["a"].known == 1
    assert index.update("a", KVEvents(5, (2,)))
    assert index.match([1, 2])["a"].known == 2
    index.check()


def test_an_engine_that_begins_anew_is_believed() -> None:
    index = PrefixIndex(PLENTY)
    index.update("a", KVEvents(90, (1, 2, 3), snapshot=True))
    assert index.update("a", KVEvents(0, (), snapshot=True))
    assert index.match([1, 2, 3]) == {}
    assert index.update("a", KVEvents(1, (1,)))
    assert index.match([1, 2, 3])["a"].known == 1


def test_a_session_that_joins_in_the_middle_needs_a_snapshot() -> None:
    index = PrefixIndex(PLENTY)
    assert not index.update("a", KVEvents(17, (1,)))
    assert index.num_known("a") == 0


@pytest.mark.parametrize("salts", [("", "tenant"), ("one", "another")])
def test_another_salt_matches_nothing(salts: tuple[str, str]) -> None:
    index, tokens = PrefixIndex(PLENTY), list(range(64))
    mine, theirs = (block_hashes(salt, tokens, 16) for salt in salts)
    index.update("a", KVEvents(1, tuple(mine)))
    index.hold("a", mine)
    assert index.match(mine)["a"] == Match(4, 4)
    assert index.match(theirs) == {}


def test_memory_stays_bounded_while_workers_and_prompts_come_and_go() -> None:
    index = PrefixIndex(100)
    for number in range(500):
        worker, chain = f"w{number}", list(range(number * 10 + 1, number * 10 + 11))
        index.update(worker, KVEvents(1, tuple(chain)))
        index.hold(worker, chain)
        if number >= 5:
            index.forget(f"w{number - 5}")
        index.check()
        assert index.num_blocks <= 100
    assert max(index._stored.values()) < 1 << 7, "slots of workers that left are used again"
    for number in range(495, 500):
        index.forget(f"w{number}")
    assert index.num_blocks == 0
    assert not index._live
