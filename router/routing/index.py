"""Which worker has which blocks of a prompt, known or about to be.

Two layers: what workers say they store, and what requests that this router placed hold until they end. The second one
predicts the siblings of a burst before any event has arrived, and tells what is in use. A name stands for everything
up to its block, cache salt included (`protos.blocks`), so a prompt of another salt matches nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from protos.messages import KVEvents


class Match(NamedTuple):
    """How much of a chain one worker has, in blocks from the first one on."""

    known: int  # stored or held
    live: int  # held by requests that run


class _Holder:
    """One worker's part. Mutated only by PrefixIndex."""

    __slots__ = ("bit", "held", "in_step", "sequence", "slot", "stored", "worker_id")

    def __init__(self, worker_id: str, slot: int) -> None:
        self.worker_id = worker_id
        self.slot = slot
        self.bit = 1 << slot
        self.stored: set[int] = set()
        self.held: dict[int, int] = {}  # name: how many requests
        self.sequence = 0  # of the last message applied: a cache begins empty, with its first message to come
        self.in_step = True  # nothing is missing


class PrefixIndex:
    """Names of blocks, each with a bit mask of the workers that have it. Owned by one router; on its event loop only.

    At most `max_blocks` stored names are kept; then the least recently matched give way, ends of chains before their
    beginnings. Held names are bounded by the requests that hold them.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._stored: OrderedDict[int, int] = OrderedDict()  # name: workers; the least recently matched first
        self._live: dict[int, int] = {}  # name: workers
        self._holders: dict[str, _Holder] = {}
        self._by_slot: list[_Holder | None] = []
        self._free_slots: list[int] = []  # a heap, so that masks stay short

    @property
    def num_blocks(self) -> int:
        """Stored names."""
        return len(self._stored)

    def num_known(self, worker_id: str) -> int:
        """Names that a worker is known to store."""
        holder = self._holders.get(worker_id)
        return 0 if holder is None else len(holder.stored)

    def update(self, worker_id: str, events: KVEvents) -> bool:
        """Apply what a worker says. False at a gap: ask for a snapshot; until it comes, all else is ignored.

        Messages already applied are ignored. A snapshot always counts: sessions keep the order, so it is the newest
        word, even with a lower number from an engine that has begun anew.
        """
        holder = self._holder(worker_id)
        if events.snapshot:
            self._replace(holder, events.stored)
        elif not holder.in_step or events.sequence <= holder.sequence:
            return True
        elif events.sequence > holder.sequence + 1:
            holder.in_step = False
            return False
        else:
            self._remove(holder, events.removed)
            self._store(holder, events.stored)
        holder.sequence, holder.in_step = events.sequence, True
        return True

    def forget(self, worker_id: str) -> None:
        """A worker's session is lost: drop all that it had, stored and held."""
        holder = self._holders.pop(worker_id, None)
        if holder is None:
            return
        self._remove(holder, list(holder.stored))
        for name in holder.held:
            _clear(self._live, name, holder.bit)
        self._by_slot[holder.slot] = None
        heappush(self._free_slots, holder.slot)

    def hold(self, worker_id: str, hashes: Sequence[int]) -> None:
        """A request with these blocks was placed on the worker."""
        holder, live = self._holder(worker_id), self._live
        held, bit = holder.held, holder.bit
        for name in hashes:
            num_holds = held.get(name, 0)
            held[name] = num_holds + 1
            if not num_holds:
                live[name] = live.get(name, 0) | bit

    def drop(self, worker_id: str, hashes: Sequence[int]) -> None:
        """Such a request has ended. What `forget` already took is ignored."""
        holder = self._holders.get(worker_id)
        if holder is None:
            return
        held = holder.held
        for name in hashes:
            num_holds = held.get(name, 0)
            if num_holds > 1:
                held[name] = num_holds - 1
            elif num_holds:
                del held[name]
                _clear(self._live, name, holder.bit)
        self._touch(hashes)  # by now its own end is stored as well, later than the beginning was

    def match(self, hashes: Sequence[int]) -> Mapping[str, Match]:
        """How much of a prompt's chain each worker has; workers that have nothing of it are left out."""
        known = self._depths(hashes, self._stored, self._live)
        if not known:
            return {}
        self._touch(hashes[: max(known.values())])
        live = self._depths(hashes, {}, self._live)
        return {holder.worker_id: Match(depth, live.get(holder, 0)) for holder, depth in known.items()}

    def stored(self, hashes: Sequence[int]) -> Mapping[str, int]:
        """How many blocks of a prompt's chain each worker has told that it has; those that have none are left out."""
        return {holder.worker_id: depth for holder, depth in self._depths(hashes, self._stored, {}).items()}

    def longest_stored(self, hashes: Sequence[int]) -> int:
        """Of those, the most."""
        return max(self._depths(hashes, self._stored, {}).values(), default=0)

    def check(self) -> None:
        """Masks say what the workers' own sets say, no name is without a worker, and the bound holds."""
        assert len(self._stored) <= self._max_blocks
        assert dict(self._stored) == self._masks((holder.bit, holder.stored) for holder in self._holders.values())
        assert self._live == self._masks((holder.bit, holder.held) for holder in self._holders.values())
        slots = [holder.slot for holder in self._holders.values()]
        assert sorted(slots + self._free_slots) == list(range(len(self._by_slot)))
        for holder in self._holders.values():
            assert self._by_slot[holder.slot] is holder
            assert holder.bit == 1 << holder.slot
            assert all(num_holds > 0 for num_holds in holder.held.values())

    def _masks(self, parts: Iterable[tuple[int, Iterable[int]]]) -> dict[int, int]:
        masks: dict[int, int] = {}
        for bit, names in parts:
            for name in names:
                masks[name] = masks.get(name, 0) | bit
        return masks

    def _holder(self, worker_id: str) -> _Holder:
        """The worker's part, made when it is first heard of."""
        holder = self._holders.get(worker_id)
        if holder is None:
            slot = heappop(self._free_slots) if self._free_slots else len(self._by_slot)
            holder = self._holders[worker_id] = _Holder(worker_id, slot)
            if slot == len(self._by_slot):
                self._by_slot.append(holder)
            else:
                self._by_slot[slot] = holder
        return holder

    def _replace(self, holder: _Holder, names: Sequence[int]) -> None:
        """Most of a snapshot is known already: only the differences are touched."""
        self._remove(holder, list(holder.stored.difference(names)))
        self._store(holder, [name for name in names if name not in holder.stored])

    def _store(self, holder: _Holder, names: Sequence[int]) -> None:
        """A message lists a chain from its beginning, so the last one becomes the first to give way."""
        stored, bit, add = self._stored, holder.bit, holder.stored.add
        for name in reversed(names):
            stored[name] = stored.get(name, 0) | bit
            stored.move_to_end(name)
            add(name)
        while len(stored) > self._max_blocks:
            name, mask = stored.popitem(last=False)
            for other in self._in(mask):
                other.stored.discard(name)

    def _remove(self, holder: _Holder, names: Iterable[int]) -> None:
        for name in names:
            if name in holder.stored:
                holder.stored.discard(name)
                _clear(self._stored, name, holder.bit)

    def _touch(self, hashes: Sequence[int]) -> None:
        stored, move = self._stored, self._stored.move_to_end
        for name in reversed(hashes):
            if name in stored:
                move(name)

    def _depths(self, hashes: Sequence[int], one: Mapping[int, int], other: Mapping[int, int]) -> dict[_Holder, int]:
        """How far down the chain each worker has every block, in either layer."""
        depths: dict[_Holder, int] = {}
        having = -1  # all workers, before the first block
        for depth, name in enumerate(hashes):
            now = having & (one.get(name, 0) | other.get(name, 0))
            if now != having:
                if depth:
                    depths.update(dict.fromkeys(self._in(having & ~now), depth))
                if not now:
                    return depths
                having = now
        if hashes:
            depths.update(dict.fromkeys(self._in(having), len(hashes)))
        return depths

    def _in(self, mask: int) -> Iterator[_Holder]:
        """The workers of a mask."""
        while mask:
            holder = self._by_slot[(mask & -mask).bit_length() - 1]
            assert holder is not None
            yield holder
            mask &= mask - 1


def _clear(masks: dict[int, int], name: int, bit: int) -> None:
    """Take a worker out of a name's mask; a name without workers goes."""
    rest = masks[name] & ~bit
    if rest:
        masks[name] = rest
    else:
        del masks[name]
