"""Prefixes beyond requests: those that leave an engine, those that come in, and those that stay.

Stands beside the steps: everything here happens between two of them, on the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import numpy as np

from protos.messages import Pin, Request, Sampling
from workers.engine.protocol import Adoption
from workers.kv.block import BlockFormat, HeldBlock
from workers.kv.cache import KVCache, PageTable
from workers.model.scores import Model, PageMapper

log = logging.getLogger(__name__)

_MAPPED_ALIGNMENT: Final = 64  # bytes; as NativeDecoder.map_pages wants it


@dataclass(slots=True)
class _Pinned:
    """A prefix that is pinned. Mutated only by Prefixes."""

    num_pages: int
    request_id: str  # of what computes it
    pin_ids: set[str] = field(default_factory=set)
    table: PageTable | None = None  # None: it is being computed


_Prefix = tuple[str, tuple[int, ...]]  # salt, tokens of whole pages


class Prefixes:
    """Mapped blocks and pins of one engine. Mutated only by TorchEngine, between steps."""

    def __init__(
        self, cache: KVCache, model: Model, block_format: BlockFormat | None, *, max_pinned_pages: int
    ) -> None:
        """Without a format, nothing leaves and nothing comes in."""
        self._cache = cache
        self._model = model
        self._format = block_format
        self._max_pinned = max_pinned_pages
        self._blocks: dict[int, HeldBlock] = {}  # mapped, by first page
        self._pinned: dict[_Prefix, _Pinned] = {}
        self._prefix_of: dict[str, _Prefix] = {}  # by pin
        self._computing: dict[str, _Prefix] = {}  # by request
        self._numbers = count()

    @property
    def num_pinned_pages(self) -> int:
        """Of all pins, also of those that are being computed."""
        return sum(pinned.num_pages for pinned in self._pinned.values())

    @property
    def tables(self) -> Iterator[PageTable]:
        """Those of pins."""
        return (pinned.table for pinned in self._pinned.values() if pinned.table is not None)

    def export(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> bool:
        """See Engine.export_prefix."""
        if self._format is None:
            return False
        table = self._cache.hold(salt, list(token_ids))
        try:
            has_all = len(table.pages) * self._cache.page_size == len(token_ids) > 0
            if has_all:
                self._model.export_pages(table.pages, payload)
            return has_all
        finally:
            self._cache.release(table)

    def adopt(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> Adoption:
        """See Engine.adopt_prefix."""
        tokens, num_pages = list(token_ids), block.label.num_pages
        assert num_pages * self._cache.page_size == len(tokens), "a block of another prefix"
        has_all = self._cache.measure(salt, tokens, limit=len(tokens)) == len(tokens)
        if self._format is None or has_all:
            block.close()
            return Adoption(len(tokens) if has_all else 0, "unused")
        mapper = self._model.page_mapper
        if mapper is not None and _is_aligned(block.payload) and self._map(mapper, salt, tokens, block):
            return Adoption(len(tokens), "mapped")
        is_copied = self._copy_in(salt, tokens, block)
        self.settle()
        block.close()
        return Adoption(len(tokens), "copied") if is_copied else Adoption(0, "unused")

    def settle(self) -> None:
        """Unmap the blocks of which nothing is in use any more. No step is planned."""
        mapper = self._model.page_mapper
        if mapper is None:
            return
        for first in self._cache.take_idle_blocks():
            mapper.unmap_pages(first)
            self._blocks.pop(first).close()

    def _map(self, mapper: PageMapper, salt: str, tokens: list[int], block: HeldBlock) -> bool:
        num_pages = block.label.num_pages
        has_room = self._cache.make_foreign_room(num_pages)
        self.settle()
        first = mapper.map_pages(block.payload, num_pages) if has_room else None
        if first is None:
            return False
        self._blocks[first] = block
        self._cache.adopt(salt, tokens, first, num_pages)
        return True

    def _copy_in(self, salt: str, tokens: list[int], block: HeldBlock) -> bool:
        """Into own pages, such as can be had without taking any from a sequence."""
        table = PageTable(salt)
        if not self._cache.reserve(table, len(tokens)):
            return False
        try:
            self._model.import_pages(block.payload, table.pages)
            self._cache.publish(table, tokens, len(tokens), pending=False)
        finally:
            self._cache.release(table)
        return True

    # Pins

    def pin(self, pin: Pin, *, largest_need: int) -> Request | None:
        """Take a pin: what has to be computed for it, if anything; its end is told by `keep` or `lose`.

        `largest_need`: pages that a live output may come to hold; they are left to it.
        """
        num_pages = len(pin.token_ids) // self._cache.page_size
        prefix = pin.cache_salt, pin.token_ids[: num_pages * self._cache.page_size]
        if pin.pin_id in self._prefix_of or num_pages == 0:
            return None
        if prefix not in self._pinned:
            if not self._has_room(num_pages, largest_need):
                return None
            self._pinned[prefix] = _Pinned(num_pages, f"pin/{next(self._numbers)}")
        pinned = self._pinned[prefix]
        pinned.pin_ids.add(pin.pin_id)
        self._prefix_of[pin.pin_id] = prefix
        return self._start(prefix, pinned) if len(pinned.pin_ids) == 1 else None

    @property
    def is_computing(self) -> bool:
        """Whether any prefix is being computed to be pinned."""
        return bool(self._computing)

    def computes(self, request_id: str) -> bool:
        """Whether this is what `pin` returned, and has not ended."""
        return request_id in self._computing

    def keep(self, request_id: str) -> None:
        """The prefix has been computed in the last step: it stays from now on."""
        salt, tokens = prefix = self._computing.pop(request_id)
        self._pinned[prefix].table = self._cache.hold(salt, list(tokens))

    def lose(self, request_id: str) -> None:
        """The prefix could not be computed: its pins end."""
        for pin_id in list(self._pinned[self._computing[request_id]].pin_ids):
            self.unpin(pin_id)

    def unpin(self, pin_id: str) -> str | None:
        """End a pin; returns what need not be computed any more."""
        prefix = self._prefix_of.pop(pin_id, None)
        if prefix is None:
            return None
        pinned = self._pinned[prefix]
        pinned.pin_ids.remove(pin_id)
        if pinned.pin_ids:
            return None
        del self._pinned[prefix]
        if pinned.table is not None:
            self._cache.release(pinned.table)
        return pinned.request_id if self._computing.pop(pinned.request_id, None) else None

    def unpin_for(self, num_pages: int) -> list[str]:
        """End all pins if a request of so many pages has no room beside them; what need not be computed any more."""
        if not self._pinned or num_pages + self.num_pinned_pages <= self._cache.num_pages:
            return []
        log.warning("pins of %d pages end: a request needs %d", self.num_pinned_pages, num_pages)
        return [request_id for pin_id in list(self._prefix_of) if (request_id := self.unpin(pin_id))]

    def _has_room(self, num_pages: int, largest_need: int) -> bool:
        num_pinned = self.num_pinned_pages + num_pages
        if num_pinned <= self._max_pinned and num_pinned + largest_need <= self._cache.num_pages:
            return True
        log.warning(
            "a prefix of %d pages is not pinned: with it they would be %d, %d may be, and a request needs %d of %d; "
            "raise engine.kv.max_pinned or num_pages",
            *(num_pages, num_pinned, self._max_pinned, largest_need, self._cache.num_pages),
        )
        return False

    def _start(self, prefix: _Prefix, pinned: _Pinned) -> Request | None:
        salt, tokens = prefix
        self._computing[pinned.request_id] = prefix
        if self._cache.measure(salt, list(tokens), limit=len(tokens)) == len(tokens):
            self.keep(pinned.request_id)
            return None
        return Request(pinned.request_id, tokens, Sampling(seed=0, max_tokens=0, temperature=0.0), cache_salt=salt)


def _is_aligned(payload: memoryview) -> bool:
    address: int = np.frombuffer(payload, dtype=np.uint8).ctypes.data
    return address % _MAPPED_ALIGNMENT == 0
