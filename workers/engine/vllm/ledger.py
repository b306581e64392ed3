"""The blocks of vLLM's cache that prefixes need: beside its scheduler, which alone knows them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from workers.engine.vllm.handover import BadHandover, Outcome, Ticket
from workers.engine.vllm.wish import Wish

log = logging.getLogger(__name__)

_GROUP: Final = (0,)  # of caches: there is one


@dataclass(frozen=True, slots=True)
class Copy:
    """Blocks to be copied in one step, into a handover or out of it."""

    kind: Literal["export", "import"]
    ticket: Ticket
    first_page: int  # of the payload
    block_ids: tuple[int, ...]


class Ledger:
    """Which blocks are pinned, held or to be copied. Mutated only by the connector beside vLLM's scheduler."""

    def __init__(self, pool: BlockPool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._wishes: dict[str, Wish] = {}  # by request
        self._pinned: dict[str, list[KVCacheBlock]] = {}  # by pin; empty: it is being computed
        self._held: list[KVCacheBlock] = []  # of exports that the next step does
        self._given: list[KVCacheBlock] = []  # of those that the last one did
        self._copies: list[Copy] = []  # of the next step

    def begin(self, request_id: str, wish: Wish, hashes: Sequence[BlockHash]) -> None:
        """A request has come; `hashes` are of its prompt's blocks."""
        self._wishes[request_id] = wish
        match wish.kind:
            case "export":
                self._export(wish, hashes)
            case "pin":
                self._pinned.setdefault(wish.pins[0], [])
            case "unpin":
                for pin in wish.pins:
                    self._free(self._pinned.pop(pin, []))

    def end(self, request_id: str, block_ids: Sequence[int], *, is_whole: bool) -> None:
        """The request has ended and still holds these blocks; `is_whole`: it was computed to its end."""
        wish = self._wishes.pop(request_id, None)
        if wish is None or wish.kind != "pin" or self._pinned.get(wish.pins[0]) != []:
            return
        blocks = [self._pool.blocks[block_id] for block_id in block_ids[: wish.num_pages]]
        if is_whole and len(blocks) == wish.num_pages:
            self._pool.touch(blocks)
            self._pinned[wish.pins[0]] = blocks
        else:
            del self._pinned[wish.pins[0]]

    def num_importable_tokens(self, request_id: str, num_cached: int) -> int:
        """How many tokens more than those that are cached the request brings with it."""
        wish = self._wishes.get(request_id)
        if wish is None or wish.kind != "import":
            return 0
        assert wish.ticket is not None
        num_new = wish.num_pages * self._page_size - num_cached
        if num_new <= 0:
            _note(wish.ticket, Outcome.PRESENT)
        return max(num_new, 0) if _exists(wish.ticket) else 0

    def place(self, request_id: str, block_ids: Sequence[int], num_tokens: int) -> None:
        """The request has these blocks; so many tokens of its prefix are to be copied in."""
        wish = self._wishes[request_id]
        assert wish.ticket is not None
        first = wish.num_pages - num_tokens // self._page_size
        self._copies.append(Copy("import", wish.ticket, first, tuple(block_ids[first : wish.num_pages])))

    def take(self) -> tuple[Copy, ...]:
        """What the step that has been planned copies. The one before it is over."""
        self._free(self._given)
        copies = tuple(self._copies)
        self._given, self._held = self._held, []
        self._copies.clear()
        return copies

    def _export(self, wish: Wish, hashes: Sequence[BlockHash]) -> None:
        assert wish.ticket is not None
        blocks = self._cached(hashes[: wish.num_pages])
        if len(blocks) < wish.num_pages:
            _note(wish.ticket, Outcome.ABSENT)
            return
        self._pool.touch(blocks)
        self._held += blocks
        self._copies.append(Copy("export", wish.ticket, 0, tuple([block.block_id for block in blocks])))

    def _cached(self, hashes: Sequence[BlockHash]) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = []
        for block_hash in hashes:
            found = self._pool.get_cached_block(block_hash, list(_GROUP))
            if found is None:
                break
            blocks += found
        return blocks

    def _free(self, blocks: Sequence[KVCacheBlock]) -> None:
        """The end of a prefix is reused before its begin."""
        self._pool.free_blocks(reversed(blocks))


def _exists(ticket: Ticket) -> bool:
    try:
        ticket.open()
    except BadHandover as error:
        log.warning("a prefix is not imported: %s", error)
        return False
    return True


def _note(ticket: Ticket, outcome: Outcome) -> None:
    try:
        ticket.open().outcome = outcome
    except BadHandover as error:
        log.info("nobody waits for a prefix any more: %s", error)
