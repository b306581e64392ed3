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
        assert cached(cache, prompt) == best // PAGE * PAGE
        cache.release(fill(cache, prompt))
        cache.check([])


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


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("num_requests", [2000])
def test_eviction_bookkeeping_stays_bounded(num_requests: int) -> None:
    cache = KVCache(num_pages=64, page_size=PAGE)
    for count in range(num_requests):
        cache.release(fill(cache, [count % 7] * 9))
    assert len(cache._tree._evictable) < 1024 + 2 * 64 + 2
