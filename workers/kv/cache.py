"""The KV cache: page tables of sequences over one pool of pages and one prefix tree.

Every page is free, held by one sequence, or held by the tree. A sequence's table is cut in two: pages [0, num_shared)
are the tree's and locked by the sequence, the rest are the sequence's own. Pages move from a sequence to the tree when
the step that fills them is planned, so that whoever is planned later in the same step finds them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

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

    def __init__(self, *, num_pages: int, page_size: int, prefix_cache: bool = True) -> None:
        self.page_size = page_size
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(page_size)
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
            self._pool.give(self._tree.evict(missing - self.num_free))
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
                self._adopt(table, found.node, found.pages)
                num_adopted += len(found.pages)
        return num_adopted

    def release(self, table: PageTable) -> None:
        """Forget a sequence: its own pages become free, the shared ones stay in the tree until needed."""
        self._num_emptied += len(table.pages) > 0
        self._pool.give(table.pages[table.num_shared :])
        if table.node is not None:
            self._tree.unlock(table.node)
        table.pages, table.num_shared, table.node = array("i"), 0, None

    def commit(self) -> None:
        """The planned step has been computed."""
        self._pending.clear()

    def rollback(self) -> None:
        """The planned step failed: forget the pages it should have filled. Its sequences have been released."""
        self._pool.give(self._tree.drop(self._pending))
        self._pending.clear()

    def check(self, tables: Iterable[PageTable]) -> None:
        """Nothing leaks: free + own + tree = all, and locks are exactly those of `tables`."""
        tables = list(tables)
        self._tree.check()
        self._pool.check([*self._tree.pages(), *(p for t in tables for p in t.pages[t.num_shared :])])
        in_tree = set(self._tree.pages())
        locked: set[int] = set()
        for table in tables:
            assert in_tree.issuperset(table.pages[: table.num_shared])
            locked.update(table.pages[: table.num_shared])
        assert self._tree.num_pages - self._tree.num_unlocked_pages == len(locked)

    def _whole_pages(self, num_tokens: int) -> int:
        return num_tokens // self.page_size * self.page_size

    def _adopt(self, table: PageTable, node: Node, pages: tuple[int, ...]) -> None:
        """Use the tree's pages in place of equal ones of our own."""
        start, stop = table.num_shared, table.num_shared + len(pages)
        self._pool.give(table.pages[start:stop])
        table.pages[start:stop] = array("i", pages)
        self._tree.lock(node, until=table.node)
        table.node, table.num_shared = node, stop
