"""The prefix tree against the obvious answer, and its invariants under random use."""

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protos.blocks import block_hashes
from tests.workers.kv.mirror import Mirror
from workers.kv.cache import KVCache, PageTable
from workers.kv.events import EventFeed
from workers.kv.radix import Node

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


def names(cache: KVCache) -> list[int]:
    """What the blocks of the tree must be called: each path's tokens, named as a router names a prompt."""
    found: list[int] = []

    def visit(node: Node, before: list[int]) -> None:
        tokens = [*before, *array("i", node.key)]
        num_before = len(before) // PAGE
        found.extend(block_hashes(node.salt, tokens, PAGE)[num_before:])
        for child in node.children.values():
            visit(child, tokens)

    for root in cache._tree._roots.values():
        visit(root, [])
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


def test_salts_never_share_a_name() -> None:
    cache = KVCache(num_pages=64, page_size=PAGE)
    for salt in ("a", "b", ""):
        cache.release(fill(cache, list(range(16)), salt=salt))
    assert len(set(cache.blocks())) == 3 * 16 // PAGE
    assert set(cache.blocks()) == {name for salt in ("a", "b", "") for name in block_hashes(salt, range(16), PAGE)}


def test_a_block_is_told_when_its_step_is_planned() -> None:
    cache, tokens = KVCache(num_pages=8, page_size=PAGE), list(range(9))
    table = PageTable("")
    assert cache.reserve(table, 9)
    cache.publish(table, tokens, 9, pending=True)
    assert cache.take_changes() == (tuple(block_hashes("", tokens, PAGE)), ())
    cache.commit()
    cache.publish(table, tokens, 9, pending=False)
    assert cache.take_changes() == ((), ())


def test_the_blocks_of_a_step_that_failed_are_taken_back() -> None:
    cache, tokens = KVCache(num_pages=8, page_size=PAGE), list(range(9))
    for is_told in (True, False):
        table = PageTable("")
        assert cache.reserve(table, 9)
        cache.publish(table, tokens, 9, pending=True)
        told = cache.take_changes().stored if is_told else ()
        cache.release(table)
        cache.rollback()
        changes = cache.take_changes()
        assert (changes.stored, set(changes.removed)) == ((), set(told))
        assert cache.blocks() == []


def test_evicted_blocks_are_told() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE)
    cache.release(fill(cache, [1] * 8))
    cache.release(fill(cache, [2] * 8))
    cache.take_changes()
    assert cache.reserve(PageTable(""), PAGE)
    assert cache.take_changes() == ((), (block_hashes("", [1] * 8, PAGE)[1],))


def test_a_cache_that_shares_nothing_tells_nothing() -> None:
    cache = KVCache(num_pages=8, page_size=PAGE, prefix_cache=False)
    cache.release(fill(cache, [1] * 16))
    assert (cache.take_changes(), cache.blocks()) == (((), ()), [])


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


class Mapped:
    """Blocks that are mapped, as an engine would keep them: numbers above the store's own."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.blocks: dict[int, int] = {}  # number of pages, by first page
        self.next = cache.num_pages

    def adopt(self, tokens: list[int], salt: str = "") -> int | None:
        """What the cache took of a block of these tokens; None if there is no room."""
        num_pages = len(tokens) // PAGE
        if not self.cache.make_foreign_room(num_pages):
            return None
        self.settle()
        first, self.next = self.next, self.next + num_pages
        self.blocks[first] = num_pages
        num_taken = self.cache.adopt(salt, tokens[: num_pages * PAGE], first, num_pages)
        self.settle()
        return num_taken

    def settle(self) -> None:
        for first in self.cache.take_idle_blocks():
            del self.blocks[first]  # each is named once

    def check(self) -> None:
        """Every foreign page is of a block that is mapped, and every block has one in the tree."""
        foreign = [page for page in self.cache._tree.pages() if page >= self.cache.num_pages]
        mapped = {page: first for first, count in self.blocks.items() for page in range(first, first + count)}
        assert {mapped[page] for page in foreign} == self.blocks.keys()
        assert len(foreign) == self.cache.num_foreign


def test_foreign_pages_are_found_and_are_no_memory() -> None:
    cache, tokens = KVCache(num_pages=4, page_size=PAGE, max_foreign_pages=8), list(range(20))
    mapped = Mapped(cache)
    assert mapped.adopt(tokens) == 5
    assert (cache.num_free, cache.num_cached, cache.num_available, cache.num_foreign) == (4, 0, 4, 5)
    assert set(cache.take_changes().stored) == set(block_hashes("", tokens, PAGE))
    assert cached(cache, tokens, salt="x") == 0
    table = fill(cache, [*tokens, 7, 8, 9, 10, 11])
    assert table.pages[:5].tolist() == [4, 5, 6, 7, 8]
    assert (cache.num_free, cache.num_available) == (2, 2)
    cache.check([table])
    cache.release(table)
    assert cache.num_available == 4
    cache.check([])


def test_of_a_block_only_what_is_missing_is_taken() -> None:
    cache, tokens = KVCache(num_pages=8, page_size=PAGE, max_foreign_pages=16), list(range(20))
    mapped = Mapped(cache)
    cache.release(fill(cache, tokens[:9]))
    assert mapped.adopt(tokens) == 3
    assert mapped.adopt(tokens) == 0
    assert mapped.adopt(tokens[:12]) == 0
    assert [*mapped.blocks.values()] == [5]
    mapped.check()


def test_own_pages_never_join_a_foreign_node() -> None:
    cache = KVCache(num_pages=8, page_size=PAGE, max_foreign_pages=16)
    mapped, tokens = Mapped(cache), list(range(8))
    mapped.adopt(tokens)
    table = fill(cache, [*tokens, 1])
    assert cache.reserve(table, 17)
    cache.publish(table, [*tokens, *range(9)], 17, pending=False)
    cache.check([table])
    [foreign] = cache._tree.root("").children.values()
    assert (foreign.is_foreign, len(foreign.pages)) == (True, 2)
    [own] = foreign.children.values()
    assert (own.is_foreign, len(own.pages)) == (False, 2)


def test_own_pages_above_foreign_ones_can_be_had() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE, max_foreign_pages=16)
    mapped, tokens = Mapped(cache), list(range(24))
    cache.release(fill(cache, tokens[:13]))
    assert mapped.adopt(tokens) == 3
    assert cache.num_available == 4
    table = PageTable("")
    assert cache.reserve(table, 4 * PAGE)
    cache.check([table])
    mapped.settle()
    assert (mapped.blocks, cache.num_foreign) == ({}, 0)


def test_own_pages_go_before_foreign_ones() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE, max_foreign_pages=16)
    mapped = Mapped(cache)
    mapped.adopt([1] * 8)
    cache.release(fill(cache, [2] * 8))
    assert cache.reserve(PageTable(""), 4 * PAGE)
    assert (cached(cache, [1] * 8), cached(cache, [2] * 8)) == (8, 0)


def test_foreign_pages_are_bounded_and_the_oldest_go() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE, max_foreign_pages=6)
    mapped = Mapped(cache)
    for number in range(3):
        mapped.adopt([number] * 8)
    assert cached(cache, [0] * 8) == 8
    assert mapped.adopt([3] * 8) == 2
    assert [cached(cache, [number] * 8) for number in range(4)] == [8, 0, 8, 8]
    assert mapped.adopt([4] * 28) is None
    table = fill(cache, [*[0] * 8, 1])
    assert mapped.adopt([5] * 20) is None
    assert mapped.adopt([5] * 16) == 4
    assert [*mapped.blocks.values()] == [2, 4]
    cache.check([table])


def test_a_tail_is_copied_from_a_foreign_page() -> None:
    cache = KVCache(num_pages=4, page_size=PAGE, max_foreign_pages=6)
    Mapped(cache).adopt([1, 2, 3, 4, 5, 6, 7, 8])
    table, tokens = PageTable(""), [1, 2, 3, 4, 5, 6, 9, 9]
    assert cache.match(table, tokens, num_computed=0, limit=7) == 4
    gained, copy = cache.match_tail(table, tokens, limit=7)
    assert (gained, copy and copy.source) == (2, 5)


class CacheMachine(RuleBasedStateMachine):
    """Sequences that grow, share, end and are evicted in any order, beside blocks that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(num_pages=12, page_size=PAGE, max_foreign_pages=10)
        self.mapped = Mapped(self.cache)
        self.pinned: list[PageTable] = []
        self.live: list[tuple[list[int], PageTable, int]] = []
        self.paths: dict[PageTable, tuple[tuple[int, int], ...]] = {}
        self.version = 0
        self.told: set[int] = set()
        self.feed = EventFeed()  # of a session that hears only now and then
        self.heard = Mirror()

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

    @rule(tokens=st.lists(st.integers(0, 1), min_size=PAGE, max_size=24), salt=st.sampled_from(["", "x"]))
    def adopt(self, tokens: list[int], salt: str) -> None:
        self.commit()
        known = self.cache.measure(salt, tokens, limit=len(tokens))
        if self.mapped.adopt(tokens, salt) is not None:
            found = self.cache.measure(salt, tokens, limit=len(tokens))
            assert found == len(tokens) // PAGE * PAGE >= known

    @rule(tokens=st.lists(st.integers(0, 1), min_size=PAGE, max_size=20), salt=st.sampled_from(["", "x"]))
    def pin(self, tokens: list[int], salt: str) -> None:
        self.commit()
        self.pinned.append(self.cache.hold(salt, tokens))

    @rule(pick=st.integers(0, 99))
    def unpin(self, pick: int) -> None:
        if self.pinned:
            self.commit()
            self.cache.release(self.pinned.pop(pick % len(self.pinned)))

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
        self.mapped.settle()

    @rule()
    def ask_for_all(self) -> None:
        self.feed.needs_snapshot = True

    @rule()
    def hear(self) -> None:
        if self.feed.needs_snapshot:
            self.feed.restart(self.cache.blocks())
        events = self.feed.take(0.0, at_once=True)
        if events is not None:
            self.heard.receive(events)
        assert self.heard.blocks == set(self.cache.blocks())
        assert self.feed.take(0.0, at_once=True) is None

    @invariant()
    def changes_tell_the_names_of_all_blocks(self) -> None:
        stored, removed = changes = self.cache.take_changes()
        assert self.told.isdisjoint(stored)
        assert self.told.issuperset(removed)
        self.told = (self.told - set(removed)) | set(stored)
        assert self.told == set(self.cache.blocks())
        assert sorted(self.cache.blocks()) == sorted(names(self.cache))
        self.feed.add(changes, 0.0)
        assert len(self.feed._journal) <= len(self.heard.blocks) + len(self.told) <= 2 * (self.cache.num_pages + 10)

    @invariant()
    def holds(self) -> None:
        self.cache.check([*(table for _, table, _ in self.live), *self.pinned])
        self.mapped.settle()
        self.mapped.check()
        assert sum(self.mapped.blocks.values()) <= 10
        for tokens, table, _ in self.live:
            assert len(table.pages) >= self.cache.pages_for(len(tokens))

    @invariant()
    def shared_paths_say_who_holds_what(self) -> None:
        tables = [*(table for _, table, _ in self.live), *self.pinned]
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
        tables = [*(table for _, table, _ in self.live), *self.pinned]
        self.paths = {table: self.cache.shared_path(table) for table in tables}
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
