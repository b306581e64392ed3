"""The KV cache: page tables of sequences over one pool of pages and one prefix tree.

Every page is free, held by one sequence, or held by the tree. A sequence's table is cut in two: pages [0, num_shared)
are the tree's and locked by the sequence, the rest are the sequence's own. Pages move from a sequence to the tree when
the step that fills them is planned, so that whoever is planned later in the same step finds them.

The tree also holds foreign pages, those of mapped blocks. Sequences share them like others; they are no memory of the
pool, and none of the numbers below counts them unless it says so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from protos.blocks import TOKEN_BYTES
from workers.kv.foreign import ForeignPages
from workers.kv.journal import Changes, Journal
from workers.kv.pages import PagePool
from workers.kv.radix import Node, RadixTree, token_bytes


@dataclass(slots=True, eq=False)
class PageTable:
    """Where the keys and values of one sequence are. Mutated only by KVCache.

    `pages` are C ints, so that a kernel can read them in place while a step computes; later its address may change.
    """

    salt: str
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_shared: int = 0  # leading pages that the tree holds
    node: Node | None = None  # the deepest node locked


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy a page before the step computes: the first tokens of `target` were found in `source`."""

    source: int
    target: int


class KVCache:
    """Pages for sequences, shared where their tokens agree. Mutated only by Scheduler."""

    def __init__(
        self, *, num_pages: int, page_size: int, prefix_cache: bool = True, max_foreign_pages: int = 0
    ) -> None:
        """`max_foreign_pages`: of all blocks that are mapped at a time."""
        self.page_size = page_size
        self._max_foreign = max_foreign_pages
        self._pool = PagePool(num_pages)
        self._foreign = ForeignPages()
        self._journal = Journal()  # written by the tree
        self._tree = RadixTree(page_size, self._journal)
        self._prefix_cache = prefix_cache
        self._num_emptied = 0
        self._pending: set[int] = set()  # in the tree, but computed only by the step being planned

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Pages that only the tree holds: given up as soon as they are needed."""
        return self._tree.num_unlocked_pages

    @property
    def num_foreign(self) -> int:
        """Foreign pages that the tree holds."""
        return self._tree.num_foreign_pages

    @property
    def num_available(self) -> int:
        return self.num_free + self.num_cached

    @property
    def version(self) -> int:
        """Grows whenever a table is emptied, or what tables share may have changed.

        A page that only its own table holds changes nothing.
        """
        return self._tree.version + self._num_emptied

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def shared_path(self, table: PageTable) -> tuple[tuple[int, int], ...]:
        """What at least one other table holds too, from the root down: (number of the node, page where it ends).

        Two tables share the pages before that end if both name the node. As long as `version` stays, so does this.
        """
        path: list[tuple[int, int]] = []
        node, end = table.node, table.num_shared
        while node is not None and end > 0:
            if node.num_locks > 1:
                path.append((node.number, end))
            end -= len(node.pages)
            node = node.parent
        return tuple(reversed(path))

    def measure(self, salt: str, token_ids: list[int], *, limit: int) -> int:
        """How many of `token_ids[:limit]` a new table would find in whole pages. Changes nothing."""
        if not self._prefix_cache:
            return 0
        return self._tree.measure(salt, token_bytes(token_ids, 0, self._whole_pages(limit))) * self.page_size

    def match(self, table: PageTable, token_ids: list[int], *, num_computed: int, limit: int) -> int:
        """Extend a table by what the tree knows of `token_ids[num_computed:limit]`; returns the tokens gained.

        Works only where the sequence has nothing of its own after its shared pages; otherwise gains nothing.
        """
        if not self._prefix_cache or num_computed != table.num_shared * self.page_size:
            return 0
        if len(table.pages) != table.num_shared or limit - num_computed < self.page_size:
            return 0
        start = table.node or self._tree.root(table.salt)
        found = self._tree.match(start, token_bytes(token_ids, num_computed, self._whole_pages(limit)))
        self._tree.lock(found.node, until=table.node)
        table.node = found.node
        table.pages.extend(found.pages)
        table.num_shared += len(found.pages)
        return len(found.pages) * self.page_size

    def match_tail(self, table: PageTable, token_ids: list[int], *, limit: int) -> tuple[int, PageCopy | None]:
        """After `match`: copy the part of one more page that agrees. Returns the tokens gained and the copy to make."""
        start = table.num_shared * self.page_size
        if table.node is None or len(table.pages) != table.num_shared or self.num_free == 0:
            return 0, None
        found = self._tree.match(table.node, token_bytes(token_ids, start, min(limit, start + self.page_size - 1)))
        if found.tail_page is None or found.tail_page in self._pending:
            return 0, None
        [target] = self._pool.take(1)
        table.pages.append(target)
        return found.tail_tokens, PageCopy(found.tail_page, target)

    def reserve(self, table: PageTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in all; False, and nothing changed, if memory does not allow it."""
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        if missing > self.num_free:
            self._give(self._tree.evict(missing - self.num_free))
        table.pages.extend(self._pool.take(missing))
        return True

    def publish(self, table: PageTable, token_ids: list[int], num_tokens: int, *, pending: bool) -> int:
        """Hand the whole pages of the first `num_tokens` tokens to the tree; returns how many were there already.

        `pending`: the step being planned computes them. A page whose tokens the tree has already stays the sequence's
        own while pending (it is about to be written) and is given up for the tree's copy otherwise.
        """
        last, num_adopted = num_tokens // self.page_size, 0
        while self._prefix_cache and table.num_shared < last:
            start = table.num_shared
            key = token_bytes(token_ids, start * self.page_size, last * self.page_size)
            if table.node is None:
                table.node = self._tree.root(table.salt)
                self._tree.lock(table.node)
            found = self._tree.match(table.node, key) if table.node.children else None
            if found is None or not found.pages:
                fresh = table.pages[start:last].tolist()
                table.node = self._tree.insert(table.node, key, fresh)
                table.num_shared = last
                self._pending.update(fresh if pending else ())
            elif pending:
                break
            else:
                self._replace(table, found.node, found.pages)
                num_adopted += len(found.pages)
        return num_adopted

    def hold(self, salt: str, token_ids: list[int]) -> PageTable:
        """A table of the whole pages that the tree has of a prompt's beginning: they stay until it is released."""
        table = PageTable(salt)
        self.match(table, token_ids, num_computed=0, limit=len(token_ids))
        return table

    def release(self, table: PageTable) -> None:
        """Forget a sequence: its own pages become free, the shared ones stay in the tree until needed."""
        self._num_emptied += len(table.pages) > 0
        self._pool.give(table.pages[table.num_shared :])
        if table.node is not None:
            self._tree.unlock(table.node)
        table.pages, table.num_shared, table.node = array("i"), 0, None

    def make_foreign_room(self, num_pages: int) -> bool:
        """Give foreign pages up until a block of so many may be mapped; False if there will be no room for it."""
        if num_pages > self._max_foreign:
            return False
        while self._foreign.num_mapped + num_pages > self._max_foreign:
            lost = self._tree.evict_foreign()
            if not lost:
                return False
            self._give(lost)
        return True

    def adopt(self, salt: str, token_ids: list[int], first_page: int, num_pages: int) -> int:
        """Take over the pages of a block that has been mapped: those of `token_ids` that the tree lacks.

        Returns how many. The others stay unused; a block of which nothing is used is idle at once. Not while a plan is
        out.
        """
        assert not self._pending, "adopted between plan and commit"
        key = token_bytes(token_ids, 0, num_pages * self.page_size)
        num_found = self._tree.measure(salt, key)
        taken = range(first_page + num_found, first_page + num_pages)
        if taken:
            above = self._tree.match(self._tree.root(salt), key)
            self._tree.insert_foreign(above.node, key[num_found * self.page_size * TOKEN_BYTES :], list(taken))
        self._foreign.add(first_page, num_pages, taken)
        return len(taken)

    def take_idle_blocks(self) -> list[int]:
        """The first pages of mapped blocks that nobody holds any more, each named once. Not while a plan is out."""
        return self._foreign.take_idle()

    def commit(self) -> None:
        """The planned step has been computed."""
        self._pending.clear()

    def rollback(self) -> None:
        """The planned step failed: forget the pages it should have filled. Its sequences have been released."""
        self._give(self._tree.drop(self._pending))
        self._pending.clear()

    def take_changes(self) -> Changes:
        """The names of blocks (`protos.blocks`) that the tree has gained and lost since they were last taken.

        A block is there from the planning of the step that fills it; if that step fails it has never been there.
        """
        return self._journal.take()

    def blocks(self) -> list[int]:
        """The name of every block the tree holds now, each after that of the block before it."""
        return list(self._tree.hashes())

    def check(self, tables: Iterable[PageTable]) -> None:
        """Nothing leaks: free + own + tree = all, and locks are exactly those of `tables`."""
        tables = list(tables)
        self._tree.check()
        in_tree, own = set(self._tree.pages()), range(self.num_pages)
        self._pool.check(
            [*(p for p in self._tree.pages() if p in own), *(p for t in tables for p in t.pages[t.num_shared :])]
        )
        self._foreign.check(page for page in self._tree.pages() if page not in own)
        locked: set[int] = set()
        for table in tables:
            assert in_tree.issuperset(table.pages[: table.num_shared])
            locked.update(table.pages[: table.num_shared])
        assert self._tree.num_pages - self._tree.num_unlocked_pages == len(locked.intersection(own))

    def _give(self, pages: Iterable[int]) -> None:
        """These pages have left the tree."""
        left = list(pages)
        self._pool.give(page for page in left if page < self.num_pages)
        self._foreign.give(page for page in left if page >= self.num_pages)

    def _whole_pages(self, num_tokens: int) -> int:
        return num_tokens // self.page_size * self.page_size

    def _replace(self, table: PageTable, node: Node, pages: tuple[int, ...]) -> None:
        """Use the tree's pages in place of equal ones of our own."""
        start, stop = table.num_shared, table.num_shared + len(pages)
        self._pool.give(table.pages[start:stop])
        table.pages[start:stop] = array("i", pages)
        self._tree.lock(node, until=table.node)
        table.node, table.num_shared = node, stop
