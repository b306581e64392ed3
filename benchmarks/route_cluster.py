"""A simulated cluster: routers that run the real policies and index, workers that follow a model, and one clock.

Routers do not talk. Each knows its own placements at once, and of the rest what workers report: their load at fixed
intervals, what their caches hold with a delay. Tokens are seen at the end of the step that made them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import assert_never

from benchmarks.route_shortlist import Shortlist
from benchmarks.route_traces import Arrival
from benchmarks.route_workers import Hardware, Job, Worker
from protos.messages import KVEvents, Load
from router.config import RoutingSection
from router.routing.accuracy import Accuracy, Totals
from router.routing.factory import make_cost, make_policy
from router.routing.index import Match, PrefixIndex
from router.routing.protocol import Ask, Candidate
from router.work import Work

_Search = Callable[[Ask, Mapping[str, Match], int], Sequence[Candidate]]


@dataclass(frozen=True, slots=True)
class Fleet:
    """The cluster's size, and how late its parts learn of each other."""

    num_workers: int = 8
    num_routers: int = 1
    report_s: float = 0.25  # between two reports of a worker's load
    event_s: float = 0.02  # from a change of a cache until routers know
    max_in_flight: int = 256  # requests of one router on one worker
    max_queued: int = 1024  # requests that wait at one router; more are refused


@dataclass(frozen=True, slots=True)
class Change:
    """Workers that leave, with all they hold, and as many new ones that join."""

    time_s: float
    num_workers: int


@dataclass(slots=True)
class Tally:
    """What happened. Mutated only by the cluster that it belongs to."""

    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_ended: int = 0
    num_refused: int = 0
    num_moved: int = 0  # requests whose worker left
    num_resyncs: int = 0
    end_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    busy: dict[str, float] = field(default_factory=dict)  # share of the time that a worker was there, by worker

    @property
    def imbalance(self) -> float:
        """How busy the busiest worker was, in terms of the mean; 1 is balanced."""
        return max(self.busy.values()) / (sum(self.busy.values()) / len(self.busy))


@dataclass(slots=True)
class _Owed:
    """What one worker still owes one router. Mutated only by that router."""

    load: Load = field(default_factory=Load)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_outputs: int = 0
    promises: dict[Job, tuple[int, int]] = field(default_factory=dict)  # prefill still owed, decode tokens reserved


class Clock:
    """Simulated time, and what is to happen when. Owned by the cluster."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Have something happen; of what is due at the same moment, the first that was asked for comes first."""
        heappush(self._agenda, (self.now_s + delay_s, next(self._order), act))

    def advance(self) -> None:
        """Let the next thing happen."""
        self.now_s, _, act = heappop(self._agenda)
        act()


class SimulatedRouter:
    """One router: real index, accuracy, policy; its queue is first come first served. Mutated only by the cluster."""

    def __init__(self, number: int, routing: RoutingSection, block_size: int, fleet: Fleet, clock: Clock) -> None:
        self.number = number
        self.index = PrefixIndex(routing.max_index_blocks)
        self.accuracy = Accuracy(clock=lambda: clock.now_s)
        self.queue: deque[Job] = deque()
        self.reasons: Counter[str] = Counter()
        self._policy = make_policy(routing)
        self._shortlist = Shortlist(make_cost(routing))
        self._candidates = _search(self._shortlist, routing)
        self._block_size = block_size
        self._max_in_flight = fleet.max_in_flight
        self._owed: dict[str, _Owed] = {}
        self._stale: dict[str, None] = {}  # workers whose candidate is to be made anew

    def place(self, job: Job) -> str | None:
        """Choose a worker and reserve its work there; None if no worker has room."""
        self._refresh()
        arrival = job.arrival
        tokens_left = arrival.max_tokens - job.done_tokens
        ask = Ask(arrival.num_tokens, tokens_left, 1, arrival.hashes[0] if arrival.hashes else arrival.num_tokens)
        matches = self.index.match(arrival.hashes)
        decision = self._policy.pick(ask, self._candidates(ask, matches, self._block_size))
        if decision is None:
            return None
        self.reasons[decision.reason] += 1
        self.index.hold(decision.worker_id, arrival.hashes)
        self._reserve(job, decision.worker_id, ask.num_tokens - decision.cached_tokens, tokens_left)
        return decision.worker_id

    def joined(self, worker_id: str) -> None:
        """A worker is there, idle as far as is known."""
        self._owed[worker_id] = _Owed()
        self._stale[worker_id] = None

    def left(self, worker_id: str) -> None:
        """A worker is gone."""
        del self._owed[worker_id]
        self._stale.pop(worker_id, None)
        self._shortlist.remove(worker_id)
        self.index.forget(worker_id)
        self.accuracy.forget(worker_id)

    def reported(self, worker_id: str, load: Load) -> None:
        """A worker told its load."""
        self._owed[worker_id].load = load
        self._stale[worker_id] = None

    def heard(self, worker_id: str, events: KVEvents) -> bool:
        """A worker told what changed in its cache; False if it must tell all."""
        if events.snapshot:
            self.accuracy.refreshed(worker_id)
        return self.index.update(worker_id, events)

    def begun(self, worker_id: str, job: Job) -> bool:
        """A first token arrived; True if the worker must tell all that it has cached."""
        owed = self._owed[worker_id]
        prefill_tokens, decode_tokens = owed.promises[job]
        owed.prefill_tokens -= prefill_tokens
        owed.decode_tokens -= 1
        owed.promises[job] = (0, decode_tokens)
        self._stale[worker_id] = None
        predicted_tokens = job.arrival.num_tokens - prefill_tokens
        return self.accuracy.observe(worker_id, predicted_tokens, job.cached_tokens, self._block_size)

    def grown(self, worker_id: str, num_rows: int) -> None:
        """Outputs of this router grew by a token each."""
        self._owed[worker_id].decode_tokens -= num_rows
        self._stale[worker_id] = None

    def ended(self, worker_id: str, job: Job) -> None:
        """A request has all its tokens."""
        owed = self._owed[worker_id]
        _, decode_tokens = owed.promises.pop(job)
        owed.decode_tokens -= decode_tokens - job.rest_tokens
        owed.num_outputs -= 1
        self.index.drop(worker_id, job.arrival.hashes)
        self._stale[worker_id] = None

    def check(self) -> None:
        """Nothing is owed beyond what is promised."""
        self._refresh()
        self._shortlist.check()
        self.index.check()
        for owed in self._owed.values():
            assert owed.num_outputs == len(owed.promises)
            assert owed.prefill_tokens == sum(prefill for prefill, _ in owed.promises.values())
            assert owed.decode_tokens >= 0
            assert owed.promises or owed.decode_tokens == 0

    def _reserve(self, job: Job, worker_id: str, prefill_tokens: int, decode_tokens: int) -> None:
        owed = self._owed[worker_id]
        owed.promises[job] = (prefill_tokens, decode_tokens)
        owed.prefill_tokens += prefill_tokens
        owed.decode_tokens += decode_tokens
        owed.num_outputs += 1
        self._stale[worker_id] = None

    def _refresh(self) -> None:
        for worker_id in self._stale:
            owed = self._owed[worker_id]
            if owed.num_outputs < self._max_in_flight:
                reserved = Work(owed.prefill_tokens, owed.decode_tokens, owed.num_outputs)
                self._shortlist.put(Candidate(worker_id, owed.load, reserved))
            else:
                self._shortlist.remove(worker_id)
        self._stale.clear()


def _search(shortlist: Shortlist, routing: RoutingSection) -> _Search:
    """How candidates are found: all of them, or as few as lead to the same decision."""
    match routing.policy:
        case "prefix":
            return shortlist.find
        case "least_loaded":
            return shortlist.find_blind
        case "round_robin" | "random" | "consistent_hash":
            return shortlist.every
        case _:
            assert_never(routing.policy)


class Cluster:
    """Routers and workers, from the first arrival to the last token. Owner of all that is simulated."""

    def __init__(self, fleet: Fleet, hardware: Hardware, routing: RoutingSection) -> None:
        self.tally = Tally()
        self._fleet = fleet
        self._hardware = hardware
        self._clock = clock = Clock()
        self._routers = [
            SimulatedRouter(number, routing, hardware.block_size, fleet, clock) for number in range(fleet.num_routers)
        ]
        self._workers: dict[str, Worker] = {}
        self._since_s: dict[str, float] = {}
        self._num_joined = 0
        self._num_open = 0  # requests that have not ended, those that will arrive included

    @property
    def predictions(self) -> Totals:
        """What all routers predicted, and what came of it."""
        return Totals(*map(sum, zip(*(router.accuracy.totals for router in self._routers), strict=True)))

    def run(self, trace: Sequence[Arrival], changes: Iterable[Change] = ()) -> Tally:
        """Play a trace to its end; once."""
        for number in range(self._fleet.num_workers):
            self._join(first_report_s=self._fleet.report_s * (number + 1) / self._fleet.num_workers)
        for change in changes:
            self._clock.after(change.time_s, partial(self._change, change))
        self._num_open = len(trace)
        self._expect(iter(trace), 0)
        while self._num_open:
            self._clock.advance()
        for worker in self._workers.values():
            self._count_busy(worker)
        self.tally.end_s = self._clock.now_s
        for router in self._routers:
            self.tally.reasons.update(router.reasons)
        return self.tally

    def check(self) -> None:
        """The invariants of all parts."""
        for router in self._routers:
            router.check()
        for worker in self._workers.values():
            worker.cache.check()

    # Requests

    def _expect(self, arrivals: Iterator[Arrival], number: int) -> None:
        arrival = next(arrivals, None)
        if arrival is not None:
            self._clock.after(arrival.time_s - self._clock.now_s, lambda: self._next(arrival, arrivals, number))

    def _next(self, arrival: Arrival, arrivals: Iterator[Arrival], number: int) -> None:
        self._expect(arrivals, number + 1)
        self._arrive(arrival, number)

    def _arrive(self, arrival: Arrival, number: int) -> None:
        router = self._routers[number % len(self._routers)]
        if len(router.queue) >= self._fleet.max_queued:
            self.tally.num_refused += 1
            self._num_open -= 1
            return
        router.queue.append(Job(arrival, router.number))
        self._dispatch(router)

    def _dispatch(self, router: SimulatedRouter) -> None:
        while router.queue and (worker_id := router.place(router.queue[0])) is not None:
            self._send(router.queue.popleft(), self._workers[worker_id])

    def _send(self, job: Job, worker: Worker) -> None:
        worker.submit(job)
        self._wake(worker)

    # Workers

    def _join(self, first_report_s: float) -> None:
        worker = Worker(f"worker-{self._num_joined}", self._hardware)
        self._num_joined += 1
        self._workers[worker.worker_id] = worker
        self._since_s[worker.worker_id] = self._clock.now_s
        for router in self._routers:
            router.joined(worker.worker_id)
        self._clock.after(first_report_s, lambda: self._report(worker))

    def _change(self, change: Change) -> None:
        """The oldest workers leave; what they held goes to the front of its router's queue."""
        leaving = list(self._workers.values())[: change.num_workers]
        for worker in leaving:
            self._leave(worker)
        for _ in leaving:
            self._join(first_report_s=self._fleet.report_s)
        for router in self._routers:
            self._dispatch(router)

    def _leave(self, worker: Worker) -> None:
        del self._workers[worker.worker_id]
        self._count_busy(worker)
        for router in self._routers:
            router.left(worker.worker_id)
        for job in reversed(worker.lose()):
            self.tally.num_moved += 1
            self._routers[job.router].queue.appendleft(job)

    def _count_busy(self, worker: Worker) -> None:
        present_s = self._clock.now_s - self._since_s[worker.worker_id]
        if present_s > 0:
            self.tally.busy[worker.worker_id] = worker.busy_s / present_s

    def _is_there(self, worker: Worker) -> bool:
        return worker.worker_id in self._workers

    def _wake(self, worker: Worker) -> None:
        """Begin a step once everything of this moment has arrived."""
        if not worker.is_stepping:
            worker.is_stepping = True
            self._clock.after(0, lambda: self._begin(worker))

    def _begin(self, worker: Worker) -> None:
        if self._is_there(worker):
            self._clock.after(worker.begin(), lambda: self._commit(worker))

    def _commit(self, worker: Worker) -> None:
        if not self._is_there(worker):
            return
        outcome = worker.commit()
        for number, num_rows in outcome.num_rows.items():
            self._routers[number].grown(worker.worker_id, num_rows)
        for job in outcome.begun:
            self._job_begun(worker, job)
        for job in outcome.ended:
            self._job_ended(worker, job)
        self._tell(worker)
        if worker.jobs:
            self._wake(worker)
        for number in dict.fromkeys(job.router for job in outcome.ended):
            self._dispatch(self._routers[number])

    def _job_begun(self, worker: Worker, job: Job) -> None:
        self.tally.prompt_tokens += job.arrival.num_tokens
        self.tally.cached_tokens += job.cached_tokens
        if not job.has_begun:
            job.has_begun = True
            self.tally.ttft_s.append(self._clock.now_s - job.arrival.time_s)
        router = self._routers[job.router]
        if router.begun(worker.worker_id, job):
            self._resync(worker, router)

    def _job_ended(self, worker: Worker, job: Job) -> None:
        self._routers[job.router].ended(worker.worker_id, job)
        self.tally.num_ended += 1
        self.tally.output_tokens += job.arrival.output_tokens
        self._num_open -= 1

    def _report(self, worker: Worker) -> None:
        if self._is_there(worker):
            for router in self._routers:
                router.reported(worker.worker_id, worker.load)
            self._clock.after(self._fleet.report_s, lambda: self._report(worker))

    def _tell(self, worker: Worker) -> None:
        events = worker.events()
        if events is not None:
            for router in self._routers:
                self._deliver(worker, router, events)

    def _resync(self, worker: Worker, router: SimulatedRouter) -> None:
        self.tally.num_resyncs += 1
        self._deliver(worker, router, worker.snapshot())

    def _deliver(self, worker: Worker, router: SimulatedRouter, events: KVEvents) -> None:
        """Some time later; what a worker sends to a router stays in order."""

        def arrive() -> None:
            if self._is_there(worker) and not router.heard(worker.worker_id, events):
                self._resync(worker, router)

        self._clock.after(self._fleet.event_s, arrive)
