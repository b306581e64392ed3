"""The prefix tree against the obvious answer, and its invariants under random use."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.kv.cache import KVCache, PageTable

PAGE = 4


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Leading tokens two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def fill(cache: KVCache, tokens: list[int], salt: str = "") -> PageTable:
    """Run a sequence through the cache as the scheduler would, and leave it running."""
    table = PageTable(salt)
    cache.match(table, tokens, num_computed=0, limit=len(tokens) - 1)
    assert cache.reserve(table, len(tokens))
    cache.publish(table, tokens, len(tokens), pending=True)
    cache.commit()
    cache.publish(table, tokens, len(tokens), pending=False)
    return table


def cached(cache: KVCache, tokens: list[int], salt: str = "") -> int:
    """Whole-page tokens found for a new sequence with these tokens."""
    table = PageTable(salt)
    found = cache.match(table, tokens, num_computed=0, limit=len(tokens))
    cache.release(table)
    return found


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_match_finds_the_longest_common_run_of_whole_pages(prompts: list[list[int]]) -> None:
    cache = KVCache(num_pages=512, page_size=PAGE)
    for count, prompt in enumerate(prompts):
        best = max((common(prompt, earlier) for earlier in prompts[:count]), default=0)
        assert cache.measure("", prompt, limit=len(prompt)) == best // PAGE * PAGE
        assert cached(cache, prompt) == best // PAGE * PAGE
        cache.release(fill(cache, prompt))
        cache.check([])


def test_measuring_changes_nothing() -> None:
    cache = KVCache(num_pages=8, page_size=PAGE)
    cache.release(fill(cache, [1] * 8))
    cache.release(fill(cache, [2] * 8))
    assert cache.measure("", [1] * 6, limit=6) == 4
    assert cache.measure("", [1] * 6, limit=3) == 0
    assert cache.measure("other", [1] * 6, limit=6) == 0
    [first, _] = cache._tree.root("").children.values()
    assert len(first.pages) == 2
    table = PageTable("")
    assert cache.reserve(table, 5 * PAGE)
    assert (cached(cache, [1] * 8), cached(cache, [2] * 8)) == (PAGE, 2 * PAGE)  # the older lost its end all the same


def test_a_shared_path_names_what_others_hold_too() -> None:
    cache = KVCache(num_pages=16, page_size=PAGE)
    alone = fill(cache, [1] * 12)
    assert cache.shared_path(alone) == ()
    twin = fill(cache, [1] * 8 + [2] * 5)
    [(node, end)] = cache.shared_path(twin)
    assert end == 2
    assert cache.shared_path(alone) == ((node, 2),)
    third = fill(cache, [1] * 4 + [3] * 5)
    [top] = cache.shared_path(third)
    assert (
        cache.shared_path(alone) == cache.shared_path(twin) == (top, (node, 2))
    )  # cut in two, one part still named so
    assert top[1] == 1
    cache.release(twin)
    cache.release(third)
    assert cache.shared_path(alone) == ()


def test_the_version_stays_while_sequences_only_grow() -> None:
    cache = KVCache(num_pages=64, page_size=PAGE)
    rows = [[1] * 8 + [number] for number in range(2, 5)]
    tables = [fill(cache, tokens) for tokens in rows]
    paths, version = [cache.shared_path(table) for table in tables], cache.version
    for step in range(6 * PAGE):
        for tokens, table in zip(rows, tables, strict=True):
            tokens.append(step)
            assert cache.reserve(table, len(tokens))
            cache.publish(table, tokens, len(tokens), pending=True)
        cache.commit()
    assert cache.num_available < 64 - 3 * 6
    assert (cache.version, [cache.shared_path(table) for table in tables]) == (version, paths)


def test_the_version_grows_when_a_sequence_joins_or_leaves_others() -> None:
    cache = KVCache(num_pages=16, page_size=PAGE)
    versions = [cache.version]
    fill(cache, [1] * 9)
    other = fill(cache, [1] * 9)
    versions.append(cache.version)
    fill(cache, [1] * 5 + [2] * 4)
    versions.append(cache.version)
    cache.release(other)
    versions.append(cache.version)
    assert sorted(set(versions)) == versions


def test_the_version_grows_when_a_shared_node_is_cut_in_two() -> None:
    cache = KVCache(num_pages=16, page_size=PAGE)
    first, _ = fill(cache, [1] * 13), fill(cache, [1] * 13)
    short = fill(cache, [1] * 7)
    version, path = cache.version, cache.shared_path(first)
    assert cache.reserve(short, 8)
    cache.publish(short, [1] * 8, 8, pending=True)  # finds the second of two pages' node; stays on its own page for now
    assert [end for _, end in path] == [1, 3]
    assert [end for _, end in cache.shared_path(first)] == [1, 2, 3]
    assert cache.version > version


def test_salts_never_share() -> None:
    cache = KVCache(num_pages=64, page_size=PAGE)
    cache.release(fill(cache, list(range(16)), salt="a"))
    assert cached(cache, list(range(16)), salt="a") == 16
    assert cached(cache, list(range(16)), salt="b") == 0


def test_least_recently_used_leaf_goes_first() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE)
    old, new = [1] * 8, [2] * 8
    cache.release(fill(cache, old))
    cache.release(fill(cache, new))
    assert cached(cache, old) == 8  # now the newer use
    table = PageTable("")
    assert cache.reserve(table, PAGE)
    assert (cached(cache, old), cached(cache, new)) == (8, PAGE)
    cache.check([table])


def test_locked_pages_are_never_evicted() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE)
    running = fill(cache, [1] * 12)
    other = PageTable("")
    assert not cache.reserve(other, 8)
    assert cache.reserve(other, 4)
    cache.check([running, other])


def test_same_step_sharing_and_rollback() -> None:
    cache = KVCache(num_pages=8, page_size=PAGE)
    tokens = list(range(9))
    first, second = PageTable(""), PageTable("")
    assert cache.match(first, tokens, num_computed=0, limit=8) == 0
    assert cache.reserve(first, 9)
    cache.publish(first, tokens, 9, pending=True)
    assert cache.match(second, tokens, num_computed=0, limit=8) == 8
    assert second.pages == first.pages[:2]
    for table in (first, second):
        cache.release(table)
    cache.rollback()
    assert cache.num_free == 8
    cache.check([])
    assert cached(cache, tokens) == 0


def test_tail_of_a_page_is_copied_on_write() -> None:
    cache = KVCache(num_pages=8, page_size=PAGE)
    first = fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    second = PageTable("")
    tokens = [1, 2, 3, 4, 5, 6, 9, 9]
    assert cache.match(second, tokens, num_computed=0, limit=7) == 4
    gained, copy = cache.match_tail(second, tokens, limit=7)
    assert gained == 2
    assert copy is not None
    assert copy.source == first.pages[1]
    assert copy.target == second.pages[1] != first.pages[1]
    cache.check([first, second])


def test_pages_that_are_not_computed_yet_are_not_copied() -> None:
    cache = KVCache(num_pages=8, page_size=PAGE)
    first, second = PageTable(""), PageTable("")
    cache.match(first, [1, 2, 3, 4, 5], num_computed=0, limit=4)
    assert cache.reserve(first, 5)
    cache.publish(first, [1, 2, 3, 4, 5], 5, pending=True)
    cache.match(second, [1, 2, 3, 9, 9], num_computed=0, limit=4)
    assert cache.match_tail(second, [1, 2, 3, 9, 9], limit=4) == (0, None)


class CacheMachine(RuleBasedStateMachine):
    """Sequences that grow, share, end and are evicted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(num_pages=12, page_size=PAGE)
        self.live: list[tuple[list[int], PageTable, int]] = []
        self.paths: dict[PageTable, tuple[tuple[int, int], ...]] = {}
        self.version = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from(["", "x"]))
    def admit(self, tokens: list[int], salt: str) -> None:
        table = PageTable(salt)
        computed = self.cache.match(table, tokens, num_computed=0, limit=len(tokens) - 1)
        tail, _ = self.cache.match_tail(table, tokens, limit=len(tokens) - 1)
        assert computed + tail < len(tokens)
        if self.cache.reserve(table, len(tokens)):
            self.cache.publish(table, tokens, len(tokens), pending=True)
            self.live.append((tokens, table, len(tokens)))
        else:
            self.cache.release(table)

    @rule(pick=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, pick: int, token: int) -> None:
        if self.live:
            tokens, table, _ = self.live[pick % len(self.live)]
            if self.cache.reserve(table, len(tokens) + 1):
                tokens.append(token)
                self.cache.publish(table, tokens, len(tokens), pending=True)

    @rule()
    def commit(self) -> None:
        self.cache.commit()
        for tokens, table, _ in self.live:
            self.cache.publish(table, tokens, len(tokens), pending=False)

    @rule(pick=st.integers(0, 99))
    def end(self, pick: int) -> None:
        if self.live:
            self.cache.commit()
            _, table, _ = self.live.pop(pick % len(self.live))
            self.cache.release(table)

    @rule()
    def fail(self) -> None:
        for _, table, _ in self.live:
            self.cache.release(table)
        self.live.clear()
        self.cache.rollback()

    @invariant()
    def holds(self) -> None:
        self.cache.check(table for _, table, _ in self.live)
        for tokens, table, _ in self.live:
            assert len(table.pages) >= self.cache.pages_for(len(tokens))

    @invariant()
    def shared_paths_say_who_holds_what(self) -> None:
        tables = [table for _, table, _ in self.live]
        for table in tables:
            ends = [end for _, end in self.cache.shared_path(table)]
            others = [shared_pages(table, other) for other in tables if other is not table]
            assert max(ends, default=0) == max(others, default=0)
            assert sorted(set(ends)) == ends
            for other, num_pages in zip([t for t in tables if t is not table], others, strict=True):
                both = set(self.cache.shared_path(table)) & set(self.cache.shared_path(other))
                assert max((end for _, end in both), default=0) == num_pages

    @invariant()
    def shared_paths_change_with_the_version_only(self) -> None:
        before, version = self.paths, self.version
        self.paths = {table: self.cache.shared_path(table) for _, table, _ in self.live}
        self.version = self.cache.version
        if version == self.version:
            assert all(self.paths[table] == path for table, path in before.items() if table in self.paths)


def shared_pages(left: PageTable, right: PageTable) -> int:
    """Leading pages that the tree holds for both."""
    return common(left.pages[: left.num_shared], right.pages[: right.num_shared])


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("num_requests", [2000])
def test_eviction_bookkeeping_stays_bounded(num_requests: int) -> None:
    cache = KVCache(num_pages=64, page_size=PAGE)
    for count in range(num_requests):
        cache.release(fill(cache, [count % 7] * 9))
    assert len(cache._tree._evictable) < 1024 + 2 * 64 + 2
