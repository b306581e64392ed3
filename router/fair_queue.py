"""Who is served next: start-time fair queueing of token-work over tenants, within strict priorities.

Stands between admission and the policy: what waits is offered in this order. From Goyal, Vin and Cheng, "Start-time
Fair Queueing" (SIGCOMM 1996). Each flow has a tag, the work it was given divided by its weight. An item starts at its
flow's tag and moves it by cost / weight; the smallest tag is served (eq. 4 and 5). Virtual time is the start of what
was served last. A flow that begins to wait starts there: it gets its share from now on, and nothing for the past.

Of two flows that wait all the time, the work served divided by the weight differs by at most the largest cost of each
divided by its weight (theorem 1), however fast or slow the fleet is.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

MAX_LAG = 65536.0  # token-work for each unit of weight

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items that wait, by priority and flow. Mutated only by its owner, on the event loop; items go by identity.

    Items need not be served in order: what fits nowhere is passed by. A flow passed by keeps its tag while virtual time
    goes on with the others', so it stays in front and catches up later; but by no more than `max_lag` token-work for
    each unit of its weight, lest a flow that was held back for an hour be served alone for the next one.
    """

    def __init__(self, *, max_lag: float = MAX_LAG) -> None:
        self._max_lag = max_lag
        self._classes: dict[int, _Class[T]] = {}  # only those in which something waits
        self._ranks: list[int] = []  # the classes' priorities, negated, ascending
        self._entries: dict[int, _Entry[T]] = {}  # by the item's identity
        self._num_of: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._version = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Every item, in the order in which they would be served now."""
        return self.in_order()

    def in_order(self, *, without: Collection[str] = ()) -> Iterator[T]:
        """The order of service if these flows had nothing. Costs little for each item looked at; a change ends it."""
        version = self._version
        for rank in self._ranks:
            for entry in self._classes[-rank].in_order(without):
                yield entry.item
                assert version == self._version, "the queue changed during a look at it; begin a new one"

    def push(self, item: T, *, flow: str, weight: float, priority: int, cost: float) -> None:
        """Add an item behind those of its flow and priority. `cost` is its token-work, as well as it is known."""
        assert id(item) not in self._entries, "pushed twice"
        assert cost > 0, cost
        assert weight > 0, weight
        entry = _Entry(item, flow, priority, number=next(self._numbers), step=cost / weight)
        if priority not in self._classes:
            self._classes[priority] = _Class(self._max_lag)
            insort(self._ranks, -priority)
        self._classes[priority].push(entry)
        self._entries[id(item)] = entry
        self._num_of[flow] += 1
        self._version += 1

    def remove(self, item: T) -> None:
        """Take an item out that is not served; it costs its flow nothing."""
        entry = self._entries[id(item)]
        self._classes[entry.priority].remove(entry)
        self._forget(entry)

    def serve(self, item: T) -> None:
        """Take an item out and charge its flow; virtual time moves on to the flow's tag, never back."""
        entry = self._entries[id(item)]
        self._classes[entry.priority].serve(entry)
        self._forget(entry)

    def settle(self, flow: str, weight: float, cost_change: float, *, priority: int) -> None:
        """The work of an item that was served was more than its cost by `cost_change`, or less if that is negative.

        A flow's tag goes down to virtual time at most. If nothing waits at the priority now, nothing is to be shared
        there and nothing changes.
        """
        if priority in self._classes:
            self._classes[priority].settle(flow, cost_change / weight, next(self._numbers))
            self._version += 1

    def num_of(self, flow: str) -> int:
        """Items of a flow, over all priorities."""
        return self._num_of[flow]

    def check(self) -> None:
        """Classes, entries and counts agree; what waits is where its tag says."""
        assert self._ranks == sorted(-priority for priority in self._classes)
        of_classes = [entry for of_class in self._classes.values() for entry in of_class.entries()]
        assert sorted(map(id, of_classes)) == sorted(map(id, self._entries.values()))
        assert Counter(entry.flow for entry in of_classes) == self._num_of
        for of_class in self._classes.values():
            of_class.check()

    def _forget(self, entry: _Entry[T]) -> None:
        """A priority at which nothing waits is dropped with its tags: its busy period is over."""
        del self._entries[id(entry.item)]
        self._num_of[entry.flow] -= 1
        if not self._num_of[entry.flow]:
            del self._num_of[entry.flow]
        if not self._classes[entry.priority].order:
            del self._classes[entry.priority]
            del self._ranks[bisect_left(self._ranks, -entry.priority)]
        self._version += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Entry(Generic[T]):
    item: T
    flow: str
    priority: int
    number: int  # in order of arrival
    step: float  # cost / weight: how far serving it moves its flow's tag


@dataclass(slots=True, eq=False)
class _Flow(Generic[T]):
    """One flow at one priority. Mutated only by its _Class."""

    name: str
    tag: float  # where its next item starts
    number: int  # of its first entry, or of its last one if it has none; breaks ties
    entries: OrderedDict[int, _Entry[T]] = field(default_factory=OrderedDict)  # by number: first come, first served


# Tag and number come first: numbers differ, so nothing behind them is ever compared.
_Place: TypeAlias = tuple[float, int, _Flow[T]]
_Head: TypeAlias = tuple[float, int, _Entry[T], Iterator[_Entry[T]]]


class _Class(Generic[T]):
    """The flows of one priority. Mutated only by FairQueue.

    A flow is in `order` if it has entries; else in `_idle`, until virtual time has reached its tag: then it is
    forgotten, for it would begin anew at virtual time anyway.
    """

    def __init__(self, max_lag: float) -> None:
        self._max_lag = max_lag
        self._virtual_time = 0.0
        self._flows: dict[str, _Flow[T]] = {}
        self.order: list[_Place[T]] = []  # ascending
        self._idle: list[_Place[T]] = []  # ascending

    def push(self, entry: _Entry[T]) -> None:
        flow = self._flows.get(entry.flow)
        if flow is None:
            flow = _Flow(entry.flow, self._virtual_time, entry.number)
        elif flow.entries:
            flow.entries[entry.number] = entry  # behind others: the flow keeps its place
            return
        else:
            self._take(flow)
        flow.entries[entry.number] = entry
        self._put(flow)

    def remove(self, entry: _Entry[T]) -> None:
        flow = self._take(self._flows[entry.flow])
        del flow.entries[entry.number]
        self._put(flow)

    def serve(self, entry: _Entry[T]) -> None:
        flow = self._take(self._flows[entry.flow])
        del flow.entries[entry.number]
        self._virtual_time = max(self._virtual_time, flow.tag)
        flow.tag = self._after(self._virtual_time, flow.tag, entry)
        self._put(flow)
        self._forget_reached()

    def settle(self, name: str, step: float, number: int) -> None:
        """A flow that was forgotten is at virtual time. `number` is new."""
        flow = self._flows.get(name)
        flow = _Flow(name, self._virtual_time, number) if flow is None else self._take(flow)
        flow.tag = max(flow.tag + step, min(flow.tag, self._virtual_time))
        self._put(flow)

    def in_order(self, without: Collection[str]) -> Iterator[_Entry[T]]:
        """Serves on paper: each flow in its place, and again where its next entry would start.

        `met` holds only flows that came already, so a look at the first few costs the same however many wait.
        """
        heads = (self._head(place) for place in self.order if place[2].name not in without)
        head, met, virtual_time = next(heads, None), list[_Head[T]](), self._virtual_time
        while head is not None or met:
            if head is not None and (not met or head < met[0]):
                heapq.heappush(met, head)
                head = next(heads, None)
            tag, _, entry, rest = heapq.heappop(met)
            yield entry
            virtual_time = max(virtual_time, tag)
            if (following := next(rest, None)) is not None:
                heapq.heappush(met, (self._after(virtual_time, tag, entry), following.number, following, rest))

    def entries(self) -> Iterator[_Entry[T]]:
        return (entry for flow in self._flows.values() for entry in flow.entries.values())

    def check(self) -> None:
        assert self.order, "nothing waits"
        for places in (self.order, self._idle):
            assert [place[:2] for place in places] == sorted(place[:2] for place in places)
            assert all(place == (flow.tag, flow.number, flow) for place in places for flow in [place[2]])
        assert all(flow.entries and flow.number == next(iter(flow.entries)) for _, _, flow in self.order)
        assert all(not flow.entries and flow.tag > self._virtual_time for _, _, flow in self._idle)
        assert sorted(self._flows) == sorted(flow.name for places in (self.order, self._idle) for _, _, flow in places)

    def _after(self, virtual_time: float, tag: float, entry: _Entry[T]) -> float:
        """Where the flow's next item starts once this one, which starts at `tag`, is served."""
        return max(tag, virtual_time - self._max_lag) + entry.step

    def _head(self, place: _Place[T]) -> _Head[T]:
        tag, number, flow = place
        rest = iter(flow.entries.values())
        return tag, number, next(rest), rest

    def _take(self, flow: _Flow[T]) -> _Flow[T]:
        """Out of its list, so that it may change."""
        places = self.order if flow.entries else self._idle
        del places[bisect_left(places, (flow.tag, flow.number, flow))]
        del self._flows[flow.name]
        return flow

    def _put(self, flow: _Flow[T]) -> None:
        if flow.entries:
            flow.number = next(iter(flow.entries))
            insort(self.order, (flow.tag, flow.number, flow))
        elif flow.tag > self._virtual_time:
            insort(self._idle, (flow.tag, flow.number, flow))
        else:
            return
        self._flows[flow.name] = flow

    def _forget_reached(self) -> None:
        num_reached = bisect_right(self._idle, self._virtual_time, key=lambda place: place[0])
        for _, _, flow in self._idle[:num_reached]:
            del self._flows[flow.name]
        del self._idle[:num_reached]
