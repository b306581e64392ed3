"""The prefix tree: which pages hold the keys and values of which tokens.

A compressed radix tree over whole pages of token ids, one root per cache salt. Tokens are compared as the bytes of
their int32 ids, a page or a run of pages at a time, so a match costs a few memcmp calls and not a Python loop.
Every page has a name (protos/blocks.py), by which others can know of it; the tree notes the names that come and go.

Pages may be foreign: those of a block that another worker has made. They stand in nodes of their own and do not count
as memory of the store.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from protos.blocks import TOKEN_BYTES, chain_hashes, root_hash
from workers.kv.journal import Journal

STALE_ENTRIES: Final = 1024  # out-of-date entries the eviction heap may carry before it is cleaned
MAX_TAIL_CANDIDATES: Final = 8  # children looked at for a partly shared page


def token_bytes(token_ids: list[int], start: int, stop: int) -> bytes:
    """The tokens [start, stop) as the tree compares them."""
    return array("i", token_ids[start:stop]).tobytes()


@dataclass(slots=True, eq=False)
class Node:
    """A run of pages that every path below shares. Mutated only by RadixTree."""

    salt: str
    parent: Node | None
    number: int  # no other node of the tree ever has the same
    key: bytes = b""  # the run's tokens, page by page
    pages: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)  # the pages' names, in the same order
    children: dict[bytes, Node] = field(default_factory=dict)  # by the bytes of their first page
    num_locks: int = 0  # sequences that hold this node or one below it
    last_used: int = 0
    is_foreign: bool = False  # its pages are


@dataclass(frozen=True, slots=True)
class Match:
    """How far a sequence's tokens are in the tree, at and below a node."""

    node: Node
    pages: tuple[int, ...]  # whole pages, in order
    tail_page: int | None = None  # a page whose first `tail_tokens` tokens match too
    tail_tokens: int = 0


class RadixTree:
    """Pages by the tokens they hold. Mutated only by KVCache.

    `version` grows whenever a node gains or loses a holder beside others, and whenever a node is cut in two.
    `num_pages` and `num_unlocked_pages` are the store's own, `num_foreign_pages` the others.
    """

    def __init__(self, page_size: int, journal: Journal) -> None:
        self.page_size = page_size
        self._journal = journal
        self.num_pages = 0
        self.num_unlocked_pages = 0
        self.num_foreign_pages = 0
        self.version = 0
        self._numbers = count()
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._evictable: list[tuple[int, int, Node]] = []  # heap by last use; entries may be out of date

    def root(self, salt: str) -> Node:
        """Where the paths of one salt begin."""
        if salt not in self._roots:
            self._roots[salt] = Node(salt, None, next(self._numbers))
        return self._roots[salt]

    def measure(self, salt: str, key: bytes) -> int:
        """How many whole pages of `key` the tree has. Changes nothing: neither structure nor order of eviction."""
        node, offset = self._roots.get(salt), 0
        while node and (child := node.children.get(key[offset : offset + self._page_bytes])):
            common = self._common_pages(child.key, key, offset)
            offset += common * self._page_bytes
            node = child if common == len(child.pages) else None
        return offset // self._page_bytes

    def match(self, start: Node, key: bytes) -> Match:
        """The longest run of whole pages of `key` below `start`; the tree is split where the run ends."""
        node, offset, pages = start, 0, list[int]()
        while child := node.children.get(key[offset : offset + self._page_bytes]):
            common = self._common_pages(child.key, key, offset)
            if common < len(child.pages):
                child = self._split(child, common)
            pages += child.pages
            offset += common * self._page_bytes
            node = child
        tail_page, tail_tokens = self._tail(node, key[offset : offset + self._page_bytes])
        return Match(node, tuple(pages), tail_page, tail_tokens)

    def insert(self, node: Node, key: bytes, pages: list[int]) -> Node:
        """Add pages below a node its caller has locked; the caller's lock moves to the node returned.

        No child of `node` may begin with the first page of `key`: match first.
        """
        assert key[: self._page_bytes] not in node.children
        hashes = chain_hashes(self._last_hash(node), key, self.page_size)
        if node.parent is not None and not node.children and node.num_locks == 1 and not node.is_foreign:
            node.key += key
            node.pages += pages
            node.hashes += hashes
            added = node
        else:
            number = next(self._numbers)
            added = Node(node.salt, node, number, key, list(pages), hashes, num_locks=1, last_used=self._tick())
            node.children[key[: self._page_bytes]] = added
        self.num_pages += len(pages)
        self._journal.store(hashes)
        return added

    def insert_foreign(self, node: Node, key: bytes, pages: list[int]) -> None:
        """Add foreign pages below a node, as one that nobody holds.

        No child of `node` may begin with the first page of `key`: match first.
        """
        first_page = key[: self._page_bytes]
        assert first_page not in node.children
        hashes = chain_hashes(self._last_hash(node), key, self.page_size)
        number, tick = next(self._numbers), self._tick()
        node.children[first_page] = Node(
            node.salt, node, number, key, list(pages), hashes, last_used=tick, is_foreign=True
        )
        self.num_foreign_pages += len(pages)
        self._journal.store(hashes)

    def lock(self, node: Node, until: Node | None = None) -> None:
        """Protect a node and its ancestors from eviction, up to but not including `until`."""
        tick = self._tick()
        while node is not until and node is not None:
            if node.num_locks == 0:
                self.num_unlocked_pages -= _num_own(node)
            elif node.pages:
                self.version += 1
            node.num_locks += 1
            node.last_used = tick
            node = node.parent  # type: ignore[assignment]

    def unlock(self, node: Node) -> None:
        """Undo one lock of a node and its ancestors."""
        tick = self._tick()
        current: Node | None = node
        while current is not None:
            assert current.num_locks > 0
            current.num_locks -= 1
            current.last_used = tick
            if current.num_locks == 0:
                self.num_unlocked_pages += _num_own(current)
                self._offer(current)
            elif current.pages:
                self.version += 1
            current = current.parent

    def evict(self, count: int) -> list[int]:
        """Give up at least `count` own pages if so many are unlocked, those of leaves used least recently first.

        Foreign pages free no memory of the store: they go only where own ones stand above them, and are not counted.
        """
        target, freed = self.num_pages - count, list[int]()
        while self.num_pages > target:
            if not self._evictable:
                lost = self.evict_foreign()
                if not lost:
                    break
                freed += lost
                continue
            last_used, _, node = heapq.heappop(self._evictable)
            if last_used != node.last_used or not self._is_evictable(node):
                continue
            cut = max(0, len(node.pages) - (self.num_pages - target))
            freed += node.pages[cut:]
            self._truncate(node, cut)
        return freed

    def evict_foreign(self) -> list[int]:
        """Give up the least recently used foreign node that is unlocked, with all below it; empty if there is none."""
        unlocked = [node for node in self._nodes() if node.is_foreign and node.num_locks == 0]
        unlocked.reverse()  # of those used last at the same time, the deepest
        return self._remove_subtree(min(unlocked, key=lambda node: node.last_used)) if unlocked else []

    def drop(self, unwanted: set[int]) -> list[int]:
        """Remove these pages and everything below them, none of it locked. Returns the pages removed."""
        removed: list[int] = []
        for node in [node for node in self._nodes() if not unwanted.isdisjoint(node.pages)]:
            if node.parent is None:
                continue  # went with an ancestor
            keep = next(index for index, page in enumerate(node.pages) if page in unwanted)
            for below in list(node.children.values()):
                removed += self._remove_subtree(below)
            removed += node.pages[keep:]
            self._truncate(node, keep)
        return removed

    def pages(self) -> Iterator[int]:
        """Every page the tree holds."""
        for node in self._nodes():
            yield from node.pages

    def hashes(self) -> Iterator[int]:
        """The name of every page the tree holds, each after that of the page before it."""
        for node in self._nodes():
            yield from node.hashes

    def check(self) -> None:
        """The invariants of structure, locks and counts."""
        num_pages = num_unlocked = num_foreign = 0
        for node in self._nodes():
            num_pages += _num_own(node)
            num_foreign += len(node.pages) - _num_own(node)
            num_unlocked += _num_own(node) if node.num_locks == 0 else 0
            assert len(node.key) == len(node.pages) * self._page_bytes
            assert node.parent is None or node.hashes == chain_hashes(
                self._last_hash(node.parent), node.key, self.page_size
            )
            assert node.num_locks >= sum(child.num_locks for child in node.children.values())
            assert node.parent is None or node.pages, "an empty node below a root"
            for first_page, child in node.children.items():
                assert child.parent is node
                assert child.key[: self._page_bytes] == first_page
                assert child.salt == node.salt
        assert (num_pages, num_unlocked) == (self.num_pages, self.num_unlocked_pages)
        assert num_foreign == self.num_foreign_pages

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def _last_hash(self, node: Node) -> int:
        """The name that those of the pages below begin with."""
        return node.hashes[-1] if node.hashes else root_hash(node.salt, self.page_size)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _common_pages(self, run: bytes, key: bytes, offset: int) -> int:
        if key.startswith(run, offset):
            return len(run) // self._page_bytes
        common, size = 0, self._page_bytes
        limit = min(len(run), len(key) - offset) // size
        while common < limit and run[common * size : (common + 1) * size] == key[offset + common * size :][:size]:
            common += 1
        return common

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut a node in two; returns the upper part, which keeps the first `num_pages` pages."""
        cut = num_pages * self._page_bytes
        assert node.parent is not None
        self.version += 1
        upper = Node(
            salt=node.salt,
            parent=node.parent,
            number=next(self._numbers),
            key=node.key[:cut],
            pages=node.pages[:num_pages],
            hashes=node.hashes[:num_pages],
            num_locks=node.num_locks,
            last_used=node.last_used,
            is_foreign=node.is_foreign,
        )
        node.parent.children[upper.key[: self._page_bytes]] = upper
        node.key, node.pages, node.hashes = node.key[cut:], node.pages[num_pages:], node.hashes[num_pages:]
        node.parent = upper
        upper.children[node.key[: self._page_bytes]] = node
        return upper

    def _tail(self, node: Node, rest: bytes) -> tuple[int | None, int]:
        """The page below `node` whose first tokens agree longest with `rest`, and how many do."""
        best_page, best_tokens = None, 0
        for index, (first_page, child) in enumerate(node.children.items()):
            if index == MAX_TAIL_CANDIDATES:
                break
            num_tokens = _common_tokens(first_page, rest)
            if num_tokens > best_tokens:
                best_page, best_tokens = child.pages[0], num_tokens
        return best_page, best_tokens

    def _is_evictable(self, node: Node) -> bool:
        attached = node.parent is not None and node.parent.children.get(node.key[: self._page_bytes]) is node
        return attached and node.num_locks == 0 and not node.children

    def _offer(self, node: Node) -> None:
        if node.parent is None:
            self._forget_empty_root(node)
        elif not node.children and not node.is_foreign:
            heapq.heappush(self._evictable, (node.last_used, id(node), node))
            if len(self._evictable) > STALE_ENTRIES + 2 * self.num_pages:
                self._drop_stale_entries()

    def _drop_stale_entries(self) -> None:
        self._evictable = [e for e in self._evictable if e[0] == e[2].last_used and self._is_evictable(e[2])]
        heapq.heapify(self._evictable)

    def _truncate(self, node: Node, num_pages: int) -> None:
        removed = len(node.pages) - num_pages
        if node.is_foreign:
            self.num_foreign_pages -= removed
        else:
            self.num_pages -= removed
            self.num_unlocked_pages -= removed
        self._journal.remove(node.hashes[num_pages:])
        if num_pages:
            del node.pages[num_pages:], node.hashes[num_pages:]
            node.key = node.key[: num_pages * self._page_bytes]
            self._offer(node)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._page_bytes]]
        node.parent = None
        if parent.num_locks == 0:
            self._offer(parent)

    def _remove_subtree(self, node: Node) -> list[int]:
        pages: list[int] = []
        for child in list(node.children.values()):
            pages += self._remove_subtree(child)
        assert node.num_locks == 0
        pages += node.pages
        self._truncate(node, 0)
        return pages

    def _forget_empty_root(self, root: Node) -> None:
        if not root.children and root.num_locks == 0 and self._roots.get(root.salt) is root:
            del self._roots[root.salt]


def _num_own(node: Node) -> int:
    """Pages of a node that are memory of the store."""
    return 0 if node.is_foreign else len(node.pages)


def _common_tokens(left: bytes, right: bytes) -> int:
    """How many leading tokens two byte strings share."""
    limit = min(len(left), len(right)) // TOKEN_BYTES
    for index in range(limit):
        span = slice(index * TOKEN_BYTES, (index + 1) * TOKEN_BYTES)
        if left[span] != right[span]:
            return index
    return limit
