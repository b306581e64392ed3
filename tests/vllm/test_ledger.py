"""Which of vLLM's blocks prefixes hold: never more than they should, and never one that something else may get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from workers.engine.vllm.handover import Handover, Outcome
from workers.engine.vllm.ledger import Ledger
from workers.engine.vllm.wish import Wish

PAGE = 32
NUM_BLOCKS = 13  # twelve may be used
PREFIXES = range(4)
SIZES = range(1, 6)


def hashes(prefix: int, num_pages: int) -> list[BlockHash]:
    return [BlockHash(f"{prefix}/{page}".encode()) for page in range(num_pages)]


class Cache:
    """A block pool as vLLM's scheduler uses it."""

    def __init__(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS, enable_caching=True, hash_block_size=PAGE)
        self.ledger = Ledger(self.pool, PAGE)

    def cached(self, prefix: int, num_pages: int) -> list[int]:
        """Blocks of the prefix's longest beginning that is cached."""
        blocks = []
        for name in hashes(prefix, num_pages):
            found = self.pool.get_cached_block(name, [0])
            if found is None:
                break
            blocks += [block.block_id for block in found]
        return blocks

    def start(self, prefix: int, num_pages: int) -> list[int] | None:
        """Blocks for a request of a prefix and one token more, like vLLM's; None if there is no room."""
        known = [self.pool.blocks[block_id] for block_id in self.cached(prefix, num_pages)]
        num_idle = sum(block.ref_cnt == 0 for block in known)
        if num_pages + 1 - len(known) > self.pool.get_num_free_blocks() - num_idle:
            return None
        self.pool.touch(known)
        blocks = known + self.pool.get_new_blocks(num_pages + 1 - len(known))
        request = SimpleNamespace(block_hashes=hashes(prefix, num_pages))
        self.pool.cache_full_blocks(request, blocks, len(known), num_pages, PAGE, 0)  # type: ignore[arg-type]
        return [block.block_id for block in blocks]

    def free(self, block_ids: list[int]) -> None:
        self.pool.free_blocks(self.pool.blocks[block_id] for block_id in reversed(block_ids))


@contextmanager
def handover() -> Iterator[Handover]:
    with Handover(4096) as one:
        yield one


def test_an_export_holds_its_blocks_until_the_step_is_over() -> None:
    cache = Cache()
    blocks = cache.start(0, 3)
    assert blocks is not None
    cache.free(blocks)
    with handover() as one:
        cache.ledger.begin("a", Wish("export", 3, one.ticket), hashes(0, 3))
        assert cache.pool.get_num_free_blocks() == NUM_BLOCKS - 1 - 3
        [copy] = cache.ledger.take()
        assert (copy.kind, copy.first_page, copy.block_ids) == ("export", 0, tuple(blocks[:3]))
        assert cache.pool.get_num_free_blocks() == NUM_BLOCKS - 1 - 3
        assert cache.ledger.take() == ()
        assert cache.pool.get_num_free_blocks() == NUM_BLOCKS - 1
        assert one.outcome is Outcome.OPEN


def test_what_is_not_cached_is_told_at_once() -> None:
    cache = Cache()
    assert cache.start(0, 2) is not None
    with handover() as one:
        cache.ledger.begin("a", Wish("export", 3, one.ticket), hashes(0, 3))
        assert one.outcome is Outcome.ABSENT
        assert cache.ledger.take() == ()


def test_an_import_brings_what_is_not_cached() -> None:
    cache = Cache()
    with handover() as one:
        cache.ledger.begin("a", Wish("import", 4, one.ticket), hashes(0, 4))
        assert cache.ledger.num_importable_tokens("a", PAGE) == 3 * PAGE
        cache.ledger.place("a", [7, 8, 9, 10, 11], 3 * PAGE)
        [copy] = cache.ledger.take()
        assert (copy.kind, copy.first_page, copy.block_ids) == ("import", 1, (8, 9, 10))
        assert one.outcome is Outcome.OPEN
        assert cache.ledger.num_importable_tokens("a", 4 * PAGE) == 0
        assert one.outcome is Outcome.PRESENT
        assert cache.ledger.num_importable_tokens("other", PAGE) == 0


def test_an_import_that_is_gone_brings_nothing() -> None:
    cache = Cache()
    with handover() as one:
        cache.ledger.begin("a", Wish("import", 4, one.ticket), hashes(0, 4))
    assert cache.ledger.num_importable_tokens("a", 0) == 0


class Pins(RuleBasedStateMachine):
    """Requests, pins and exports in any order, in a pool that has room for few."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.numbers = 0
        self.running: dict[str, tuple[list[int], str | None]] = {}  # blocks and pin, by request
        self.wanted: dict[str, tuple[int, int]] = {}  # prefix and pages, by pin
        self.pinned: dict[str, list[int]] = {}
        self.exports: list[tuple[Handover, int, int]] = []

    @rule(prefix=st.sampled_from(PREFIXES), num_pages=st.sampled_from(SIZES), pins=st.booleans())
    def start(self, prefix: int, num_pages: int, pins: bool) -> None:
        self.numbers += 1
        request_id, pin = f"r{self.numbers}", f"p{self.numbers}" if pins else None
        blocks = self.cache.start(prefix, num_pages)
        if blocks is None:
            return
        if pin is not None:
            self.cache.ledger.begin(request_id, Wish("pin", num_pages, pins=(pin,)), hashes(prefix, num_pages))
            self.wanted[pin] = prefix, num_pages
        self.running[request_id] = blocks, pin

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_whole=st.booleans())
    def end(self, data: st.DataObject, is_whole: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        blocks, pin = self.running.pop(request_id)
        self.cache.ledger.end(request_id, blocks, is_whole=is_whole)
        self.cache.free(blocks)
        if pin in self.wanted:
            assert pin is not None
            num_pages = self.wanted[pin][1]
            if is_whole:
                self.pinned[pin] = blocks[:num_pages]
            else:
                del self.wanted[pin]

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pins = data.draw(st.lists(st.sampled_from([*self.wanted, "unknown"]), min_size=1))
        self.cache.ledger.begin("u", Wish("unpin", pins=tuple(pins)), [])
        self.cache.ledger.end("u", [], is_whole=True)
        for pin in pins:
            self.wanted.pop(pin, None)
            self.pinned.pop(pin, None)

    @rule(prefix=st.sampled_from(PREFIXES), num_pages=st.sampled_from(SIZES))
    def export(self, prefix: int, num_pages: int) -> None:
        with Handover(4096) as one:
            has_all = len(self.cache.cached(prefix, num_pages)) == num_pages
            self.cache.ledger.begin("e", Wish("export", num_pages, one.ticket), hashes(prefix, num_pages))
            self.cache.ledger.end("e", [], is_whole=False)
            assert (one.outcome is Outcome.ABSENT) == (not has_all)

    @rule()
    def step(self) -> None:
        for copy in self.cache.ledger.take():
            assert len(set(copy.block_ids)) == len(copy.block_ids)

    @invariant()
    def pins_are_cached(self) -> None:
        for pin, blocks in self.pinned.items():
            assert len(self.cache.cached(*self.wanted[pin])) == len(blocks)
            assert all(self.cache.pool.blocks[block_id].ref_cnt > 0 for block_id in blocks)

    def teardown(self) -> None:
        self.cache.ledger.begin("u", Wish("unpin", pins=tuple(self.wanted)), [])
        for request_id, (blocks, _) in self.running.items():
            self.cache.ledger.end(request_id, blocks, is_whole=True)
            self.cache.free(blocks)
        self.step()
        self.step()
        assert self.cache.pool.get_num_free_blocks() == NUM_BLOCKS - 1


TestPins = Pins.TestCase
