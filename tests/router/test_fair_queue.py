"""Who is served next: against a naive model, against the paper's own formulas, and the paper's bound."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.fair_queue import FairQueue

FLOWS = ("a", "b", "c")
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
PRIORITIES = (-1, 0, 5)
MAX_LAG = 24.0

flows = st.sampled_from(FLOWS)
priorities = st.sampled_from(PRIORITIES)
costs = st.integers(1, 64).map(lambda number: number / 4)  # exact in binary, as are the weights


@dataclass(eq=False)
class Item:
    """Something that waits; two are never the same."""

    flow: str
    cost: float
    priority: int = 0

    def push(self, queue: FairQueue[Item], weight: float | None = None) -> Item:
        weight = WEIGHTS[self.flow] if weight is None else weight
        queue.push(self, flow=self.flow, weight=weight, priority=self.priority, cost=self.cost)
        return self


def first(queue: FairQueue[Item]) -> Item:
    return next(iter(queue))


# The naive model


@dataclass
class NaiveClass:
    """One priority: a tag for each flow, for ever, and a plain list."""

    virtual_time: float = 0.0
    tags: dict[str, float] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)

    def copy(self) -> NaiveClass:
        return NaiveClass(self.virtual_time, dict(self.tags), list(self.items))

    def push(self, item: Item) -> None:
        if all(other.flow != item.flow for other in self.items):
            self.tags[item.flow] = max(self.tags.get(item.flow, 0.0), self.virtual_time)
        self.items.append(item)

    def serve(self, item: Item) -> None:
        tag = self.tags[item.flow]
        self.virtual_time = max(self.virtual_time, tag)
        self.tags[item.flow] = max(tag, self.virtual_time - MAX_LAG) + item.cost / WEIGHTS[item.flow]
        self.items.remove(item)

    def next(self) -> Item:
        return min(self.items, key=lambda item: self.tags[item.flow])  # the first pushed among equals

    def settle(self, flow: str, cost_change: float) -> None:
        waits = any(item.flow == flow for item in self.items)
        tag = self.tags.get(flow, 0.0)
        tag = tag if waits else max(tag, self.virtual_time)
        self.tags[flow] = max(tag + cost_change / WEIGHTS[flow], min(tag, self.virtual_time))

    def order(self) -> list[Item]:
        rest, order = self.copy(), []
        while rest.items:
            order.append(rest.next())
            rest.serve(order[-1])
        return order


class AgainstTheModel(RuleBasedStateMachine):
    """Random operations on both; the whole order is compared after each."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Item] = FairQueue(max_lag=MAX_LAG)
        self.model: dict[int, NaiveClass] = {}

    def waiting(self) -> list[Item]:
        return [item for priority in sorted(self.model, reverse=True) for item in self.model[priority].order()]

    def gone(self, item: Item) -> None:
        if not self.model[item.priority].items:
            del self.model[item.priority]

    @rule(flow=flows, priority=priorities, cost=costs)
    def push(self, flow: str, priority: int, cost: float) -> None:
        item = Item(flow, cost, priority).push(self.queue)
        self.model.setdefault(priority, NaiveClass()).push(item)

    @precondition(lambda self: self.model)
    @rule(place=st.integers(0, 5) | st.just(0))
    def serve(self, place: int) -> None:
        waiting = self.waiting()
        item = waiting[place % len(waiting)]
        self.queue.serve(item)
        self.model[item.priority].serve(item)
        self.gone(item)

    @precondition(lambda self: self.model)
    @rule(place=st.integers(0, 20))
    def remove(self, place: int) -> None:
        waiting = self.waiting()
        item = waiting[place % len(waiting)]
        self.queue.remove(item)
        self.model[item.priority].items.remove(item)
        self.gone(item)

    @rule(flow=flows, priority=priorities, cost_change=costs | costs.map(lambda cost: -cost))
    def settle(self, flow: str, priority: int, cost_change: float) -> None:
        self.queue.settle(flow, WEIGHTS[flow], cost_change, priority=priority)
        if priority in self.model:
            self.model[priority].settle(flow, cost_change)

    @invariant()
    def agree(self) -> None:
        self.queue.check()
        waiting = self.waiting()
        assert list(self.queue) == waiting
        assert len(self.queue) == len(waiting)
        for flow in FLOWS:
            assert self.queue.num_of(flow) == sum(item.flow == flow for item in waiting)

    @invariant()
    def agree_without_a_flow(self) -> None:
        order: list[Item] = []
        for priority in sorted(self.model, reverse=True):
            others = self.model[priority].copy()
            others.items = [item for item in others.items if item.flow != "a"]
            order += others.order()
        assert list(self.queue.in_order(without={"a"})) == order


TestAgainstTheModel = AgainstTheModel.TestCase


# The paper


@given(steps=st.lists(st.tuples(flows, costs) | st.none(), max_size=80))
def test_service_in_order_is_that_of_the_paper(steps: list[tuple[str, float] | None]) -> None:
    """Equations 4 and 5: S = max(v at arrival, F of the flow's last), F = S + cost / weight; v is S in service."""
    queue: FairQueue[Item] = FairQueue()
    virtual_time, finishes = 0.0, dict.fromkeys(FLOWS, 0.0)
    starts: dict[Item, float] = {}  # in order of arrival
    for step in steps:
        if step is not None:
            item = Item(*step).push(queue)
            starts[item] = max(virtual_time, finishes[item.flow])
            finishes[item.flow] = starts[item] + item.cost / WEIGHTS[item.flow]
        elif starts:
            # Among equal starts the paper leaves the choice open.
            item = first(queue)
            assert starts[item] == min(starts.values())
            queue.serve(item)
            virtual_time = starts.pop(item)
            if not starts:  # the busy period is over
                virtual_time, finishes = 0.0, dict.fromkeys(FLOWS, 0.0)


weights = st.floats(0.1, 10)
cost_lists = st.lists(st.integers(1, 5000).map(float), min_size=1, max_size=30)


@given(weights_of=st.tuples(weights, weights), costs_of=st.tuples(cost_lists, cost_lists), seed=st.integers(0, 999))
def test_flows_that_always_wait_differ_by_no_more_than_the_bound(
    weights_of: tuple[float, float], costs_of: tuple[list[float], list[float]], seed: int
) -> None:
    """Theorem 1, over every span of time, with other flows that come and go."""
    queue: FairQueue[Item] = FairQueue()
    chance = random.Random(seed)
    weight = dict(zip("xy", weights_of, strict=True))
    for flow, flow_costs in zip("xy", costs_of, strict=True):
        for cost in [*flow_costs, max(flow_costs)]:
            Item(flow, cost).push(queue, weight[flow])
    served, differences = dict.fromkeys("xy", 0.0), [0.0]
    while queue.num_of("x") and queue.num_of("y"):
        if chance.random() < 0.3:
            Item(f"other {chance.randrange(4)}", chance.uniform(1, 5000)).push(queue, chance.uniform(0.1, 10))
        item = first(queue)
        queue.serve(item)
        queue.check()
        if item.flow in served and queue.num_of(item.flow):  # it waits before and after
            served[item.flow] += item.cost / weight[item.flow]
            differences.append(served["x"] - served["y"])
    bound = sum(max(flow_costs) / weight[flow] for flow, flow_costs in zip("xy", costs_of, strict=True))
    assert max(differences) - min(differences) <= bound * (1 + 1e-9)


@given(num_flows=st.integers(1, 20), num_served=st.integers(0, 200), seed=st.integers(0, 999))
def test_a_newcomer_waits_for_one_item_of_each_other_flow_at_most(num_flows: int, num_served: int, seed: int) -> None:
    queue: FairQueue[Item] = FairQueue()
    chance = random.Random(seed)
    weight = {str(number): chance.uniform(0.1, 10) for number in range(num_flows)}
    for flow in weight:
        for _ in range(20):
            Item(flow, chance.uniform(1, 1000)).push(queue, weight[flow])
    for _ in range(num_served):
        item = first(queue)
        queue.serve(item)
        Item(item.flow, chance.uniform(1, 1000)).push(queue, weight[item.flow])
    newcomer = Item("newcomer", 10**6).push(queue, 0.1)
    assert newcomer in islice(queue, num_flows + 1)


# By hand


def test_weights_are_shares() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(100):
        Item("a", 10).push(queue)
        Item("b", 10).push(queue)
    served = [item.flow for item in islice(queue, 30)]
    assert served.count("b") == 20
    assert served.count("a") == 10


def test_costs_count_not_items() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(100):
        Item("a", 100).push(queue, 1)
        Item("b", 10).push(queue, 1)
    served = [item.flow for item in islice(queue, 44)]
    assert served.count("a") == 4


def test_higher_priorities_come_first_and_cost_nothing_below() -> None:
    queue: FairQueue[Item] = FairQueue()
    low = [Item("a", 8).push(queue), Item("c", 8).push(queue)]
    high = [Item("a", 1000, priority=5).push(queue) for _ in range(3)]
    assert list(queue) == [*high, *low]
    for item in high:
        queue.serve(item)
    assert list(queue) == low


def test_a_flow_that_was_away_gets_nothing_for_the_past() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(50):
        Item("a", 10).push(queue, 1)
    for _ in range(30):
        queue.serve(first(queue))
    for _ in range(50):
        Item("b", 10).push(queue, 1)
    served = [item.flow for item in islice(queue, 20)]
    assert abs(served.count("a") - served.count("b")) <= 1


def test_a_flow_that_was_passed_by_catches_up() -> None:
    queue: FairQueue[Item] = FairQueue()
    large = [Item("large", 10).push(queue, 1) for _ in range(20)]
    small = [Item("small", 10).push(queue, 1) for _ in range(20)]
    for item in small[:6]:
        queue.serve(item)
    assert list(islice(queue, 7)) == [*large[:6], large[6]]


def test_virtual_time_does_not_go_back_for_a_flow_that_catches_up() -> None:
    queue: FairQueue[Item] = FairQueue()
    large = [Item("large", 10).push(queue, 1) for _ in range(20)]
    small = [Item("small", 10).push(queue, 1) for _ in range(20)]
    for item in [*small[:6], large[0]]:
        queue.serve(item)
    newcomer = Item("newcomer", 10).push(queue, 1)
    assert list(islice(queue, 6)) == [*large[1:6], newcomer]


def test_a_flow_that_was_passed_by_catches_up_only_so_far() -> None:
    queue: FairQueue[Item] = FairQueue(max_lag=30)
    for _ in range(200):
        Item("held", 10).push(queue, 1)
    for _ in range(200):
        Item("other", 10).push(queue, 1)
    for item in list(islice(queue.in_order(without={"held"}), 100)):
        queue.serve(item)
    served = [item.flow for item in islice(queue, 20)]
    assert served[:4] == ["held"] * 4
    assert served.count("held") <= 13


def test_settling_gives_back_what_was_not_used() -> None:
    queue: FairQueue[Item] = FairQueue()
    asked = [Item("a", 100).push(queue, 1) for _ in range(3)]
    others = [Item("b", 10).push(queue, 1) for _ in range(12)]
    queue.serve(asked[0])
    assert list(islice(queue, 10)) == others[:10]
    queue.settle("a", 1.0, -80, priority=0)
    assert list(islice(queue, 3)) == [*others[:2], asked[1]]


def test_settling_charges_what_was_used_beyond_the_cost() -> None:
    queue: FairQueue[Item] = FairQueue()
    asked = [Item("a", 10).push(queue, 1) for _ in range(2)]
    others = [Item("b", 10).push(queue, 1) for _ in range(12)]
    queue.serve(asked[0])
    queue.settle("a", 1.0, 40, priority=0)
    assert list(islice(queue, 6)) == [*others[:5], asked[1]]


def test_settling_does_not_reach_behind_virtual_time() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(10):
        Item("a", 10).push(queue, 1)
        Item("b", 10).push(queue, 1)
    for _ in range(10):
        queue.serve(first(queue))
    queue.settle("a", 1.0, -(10**9), priority=0)
    served = [item.flow for item in islice(queue, 4)]
    assert served.count("b") >= 1


def test_a_short_look_at_a_long_queue_touches_little_of_it() -> None:
    class Counted(float):
        """A cost that counts how often a tag was made with it."""

        num_used = 0

        def __truediv__(self, other: float) -> Counted:
            return Counted(float(self) / other)

        def __radd__(self, other: float) -> float:
            Counted.num_used += 1
            return other + float(self)

    queue: FairQueue[Item] = FairQueue()
    for number in range(10_000):
        Item(str(number % 5000), Counted(1 + number % 7)).push(queue, 1)
    Counted.num_used = 0
    assert len(list(islice(queue, 32))) == 32
    assert 0 < Counted.num_used <= 32


def test_flows_and_priorities_that_are_gone_are_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(3):
        Item("stays", 1).push(queue, 1)
    for number in range(1000):
        Item("stays", 1).push(queue, 1)
        Item(f"passes {number}", 1, priority=0).push(queue, 1)
        queue.serve(first(queue))
        queue.serve(first(queue))
        assert len(queue._classes[0]._flows) <= 4
    while len(queue):
        queue.serve(first(queue))
    assert not queue._classes
    assert not queue._num_of
    queue.settle("stays", 1.0, 5, priority=0)
    queue.check()
    assert not queue._classes


def test_a_look_ends_with_the_next_change() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(3):
        Item("a", 1).push(queue)
    look = iter(queue)
    queue.serve(next(look))
    with pytest.raises(AssertionError, match="changed during a look"):
        next(look)


def test_an_item_waits_once() -> None:
    queue: FairQueue[Item] = FairQueue()
    item = Item("a", 1).push(queue)
    with pytest.raises(AssertionError, match="twice"):
        item.push(queue)
    queue.remove(item)
    item.push(queue)
    assert list(queue) == [item]
