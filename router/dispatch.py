"""Which waiting group goes to which worker, and when: the meeting of the fair queue, the policy and the workers' room.

Admission puts groups in; from here they go to a session. A worker takes a little more than it can run at once and no
more: what waits, waits here, where the next tenant's request can still overtake a flood and go wherever its prefix is.
A group whose best worker is full waits for it, but no longer than computing the prefix anew elsewhere would take (delay
scheduling: Zaharia et al., EuroSys 2010).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import filterfalse, islice

from protos.messages import PrefixSource
from router.config import DispatchSection
from router.fair_queue import FairQueue
from router.fleet import Fleet
from router.forecast import Forecast
from router.group import Entry
from router.metrics import RouterMetrics
from router.routing.protocol import Ask, Candidate, Decision, Estimate, Policy
from router.session import Session
from router.stream import Stream
from router.tenants import Tenant, Tenants
from router.work import Work

LOOK_AHEAD = 16  # waiting groups that are tried before it is said that nothing fits
RECOVERY = ""  # the flow of what lost its worker
SUSPECTS = "?"  # of those, the flow of what may have been the cause
RECOVERY_PRIORITY = 1 << 31  # above any that a request may have: its client has waited already


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a group would go where it would."""

    reason: str
    candidates: tuple[tuple[Estimate, bool], ...]  # best first, and whether each would take it now


class Dispatcher:
    """Waiting groups and their placement. Owned by Admission; touched on the event loop only.

    It has no task of its own: `run` acts when a group or a worker's room has come, and on timers of the event loop, so
    a decision and its reservation are atomic.
    """

    def __init__(
        self,
        config: DispatchSection,
        fleet: Fleet,
        policy: Policy,
        *,
        tenants: Tenants,
        forecast: Forecast,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._policy = policy
        self._tenants = tenants
        self._forecast = forecast
        self._metrics = metrics
        self._queue: FairQueue[Entry] = FairQueue()
        self._num_waiting = 0
        self._waiting = Work()
        self._waiting_of: Counter[str] = Counter()  # requests by tenant
        self._running: Counter[str] = Counter()  # outputs by tenant
        self._known_tenants: dict[str, Tenant] = {}  # those that have anything here
        self._suspects: dict[str, Entry] = {}  # by the worker that has one
        self._unproven: dict[Entry, None] = {}  # placed, and nothing has come from the worker
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None  # when a group will have waited long enough for its best worker
        self._drained_at: float | None = None  # when work last left the queue, or began to wait; None: it is empty
        self._is_running = False

    @property
    def num_waiting(self) -> int:
        """Requests that have no worker."""
        return self._num_waiting

    @property
    def waiting_work(self) -> Work:
        """What those have to compute if nothing of it is cached."""
        return self._waiting

    @property
    def running(self) -> Mapping[str, int]:
        """Outputs that workers make, by tenant."""
        return self._running

    @property
    def waiting(self) -> Mapping[str, int]:
        """Requests that have no worker, by tenant."""
        return self._waiting_of

    def __iter__(self) -> Iterator[Entry]:
        """Waiting groups in the order in which they would be served now."""
        return iter(self._queue)

    def add(self, entry: Entry) -> None:
        """Let a group wait for its turn, and place it at once if that has come."""
        tenant, cost = entry.group.tenant, float(max(entry.charged_tokens, 1))
        if entry.was_placed:
            flow = SUSPECTS if entry.is_suspect else RECOVERY
            self._queue.push(entry, flow=flow, weight=1.0, priority=RECOVERY_PRIORITY, cost=cost)
        else:
            self._queue.push(entry, flow=tenant.name, weight=tenant.weight, priority=entry.group.priority, cost=cost)
        self._known_tenants[tenant.name] = tenant
        entry.is_waiting = True
        self._count(entry, 1)
        self.run()
        if self._drained_at is None and len(self._queue):
            self._drained_at = self._loop.time()

    def remove(self, entry: Entry) -> None:
        """A waiting group waits no more."""
        self._queue.remove(entry)
        self._drained_at = self._drained_at if len(self._queue) else None
        entry.is_waiting = False
        self._count(entry, -1)
        self._forget_idle(entry.group.tenant)

    def leave(self, entry: Entry, *, is_lost: bool = False) -> None:
        """A placed group has no worker any more: it has ended, or lost it. What it held there is free."""
        session = entry.session
        assert session is not None
        entry.session = None
        self._running[entry.group.tenant.name] -= entry.ask.num_outputs
        self._unproven.pop(entry, None)
        if self._suspects.get(session.worker_id) is entry:
            del self._suspects[session.worker_id]
        if not is_lost and self._fleet.session(session.worker_id) is session:  # else the index has forgotten it
            self._fleet.index.drop(session.worker_id, entry.block_hashes)

    def settle(self, entry: Entry) -> None:
        """A group has ended: what it was charged and did not need is its tenant's again."""
        group, tenant = entry.group, entry.group.tenant
        for num_tokens, seconds in (stream.decoded for stream in group.streams):
            if num_tokens:
                self._forecast.observe_decode(num_tokens, seconds)
        unused = entry.group.used_tokens - entry.charged_tokens
        self._queue.settle(tenant.name, weight=tenant.weight, priority=group.priority, cost_change=unused)
        self._forget_idle(tenant)

    def _forget_idle(self, tenant: Tenant) -> None:
        if not self._running[tenant.name] and not self._waiting_of[tenant.name]:
            for counts in (self._running, self._waiting_of, self._known_tenants):
                counts.pop(tenant.name, None)

    def run(self) -> None:
        """Place what fits. Nothing is placed out of its turn but for want of room or of a good worker."""
        if self._is_running:  # a placement tells a session, which tells us
            return
        self._is_running = True
        try:
            self._confirm()
            while len(self._queue) and self._place_one():
                pass
            self._fleet.tell_queued(self._waiting.prefill_tokens + self._waiting.decode_tokens)
        finally:
            self._is_running = False

    def explain(self, ask: Ask, block_hashes: Sequence[int]) -> Explanation:
        """Where a group would go if every worker had room, and what it would cost there. Places nothing."""
        sessions = self._ready(set())
        candidates = self._candidates(ask, block_hashes, sessions.values())
        estimates = self._policy.explain(ask, candidates)
        decision = copy(self._policy).pick(ask, candidates)  # nobody loses a turn
        return Explanation(
            "" if decision is None else decision.reason,
            tuple((estimate, self._is_open(sessions[estimate.worker_id])) for estimate in estimates),
        )

    def close(self) -> None:
        """Cancel the timer."""
        if self._retry is not None:
            self._retry.cancel()

    def check(self) -> None:
        """The counts are those of what waits."""
        self._queue.check()
        entries = list(self._queue)
        assert all(entry.is_waiting and entry.session is None for entry in entries)
        assert self._num_waiting == sum(entry.num_requests for entry in entries)
        assert self._waiting.prefill_tokens == sum(entry.ask.num_tokens for entry in entries)

    # Choosing

    def _place_one(self) -> bool:
        """Place the first group that can be; False if none of the next ones can."""
        waiting = self._queue.in_order(without=self._held_back())
        capped: set[str] = set()  # tenants whose next group is too large for what they may run: those behind it wait
        for entry in islice(filterfalse(self._still_waits, waiting), LOOK_AHEAD):
            tenant = entry.group.tenant
            if not entry.was_placed and (tenant.name in capped or not self._may_run(tenant, entry.ask.num_outputs)):
                capped.add(tenant.name)
                continue
            session = self._choose(entry)
            if session is not None:
                self._place(entry, session)
                return True
        return False

    def _held_back(self) -> set[str]:
        """Flows of which nothing can be placed now: they must not take up the look ahead."""
        sessions = self._fleet.sessions
        is_open, has_spare = any(map(self._is_open, sessions)), any(map(self._has_spare, sessions))
        flows = {
            name
            for name, tenant in self._known_tenants.items()
            if not (is_open or (has_spare and self._is_behind(tenant))) or not self._may_run(tenant, 1)
        }
        able = [session for session in sessions if session.may_hold(1)]
        if all(session.worker_id in self._suspects for session in able):
            flows.add(SUSPECTS)
        return flows if able else {*flows, RECOVERY}

    def _is_behind(self, tenant: Tenant) -> bool:
        """Whether a tenant has less than its share of what runs, and others have the rest."""
        weight = sum(known.weight for known in self._known_tenants.values())
        is_alone = len(self._known_tenants) == 1
        return not is_alone and self._running[tenant.name] * weight < self._running.total() * tenant.weight

    def _may_run(self, tenant: Tenant, num_outputs: int) -> bool:
        """Whether a tenant may have more outputs now. None takes the last slots from those who come later."""
        num_running = self._running[tenant.name]
        if tenant.max_running is not None and num_running and num_running + num_outputs > tenant.max_running:
            return False
        if not self._tenants.has_many or not num_running:
            return True
        slots = self._fleet.num_slots * (1 - self._config.tenant_headroom)
        return slots == 0 or num_running + num_outputs <= max(slots, 1)

    def _choose(self, entry: Entry) -> Session | None:
        """The worker for a group, and the decision in it; None if it is better off waiting."""
        ready = self._ready(entry.unwilling)
        candidates = self._candidates(entry.ask, entry.block_hashes, ready.values())
        best = self._policy.pick(entry.ask, candidates)
        if best is None:
            return None
        if not self._fits(ready[best.worker_id], entry):
            fitting = [candidate for candidate in candidates if self._fits(ready[candidate.worker_id], entry)]
            second = self._policy.pick(entry.ask, fitting)
            if second is None or self._waits_for(entry, ready[best.worker_id], best, second):
                return None
            best = second
        entry.decision = best
        return ready[best.worker_id]

    def has_others(self, unwilling: Collection[str]) -> bool:
        """Whether there are workers beside these that may get work."""
        return any(s.state == "ready" and s.worker_id not in unwilling for s in self._fleet.sessions)

    def _ready(self, unwilling: set[str]) -> dict[str, Session]:
        """Workers that may get work; those that would not have a group only if there are no others."""
        ready = {session.worker_id: session for session in self._fleet.sessions if session.state == "ready"}
        return {name: session for name, session in ready.items() if name not in unwilling} or ready

    def _candidates(self, ask: Ask, block_hashes: Sequence[int], sessions: Collection[Session]) -> list[Candidate]:
        """What the policy may know of each worker."""
        matches = self._fleet.index.match(block_hashes) if block_hashes else {}
        size, most = self._fleet.page_size, max(ask.num_tokens - 1, 0)  # the last token is always computed
        longest = min(self._fleet.index.longest_stored(block_hashes) * size, most) if matches else 0
        found = []
        for session in sessions:
            match = matches.get(session.worker_id)
            known, live = (0, 0) if match is None else (min(match.known * size, most), min(match.live * size, most))
            fetchable = self._fetchable(session, longest - known)
            found.append(Candidate(session.worker_id, session.load, session.reservations.total, known, live, fetchable))
        return found

    def _fetchable(self, session: Session, num_tokens: int) -> int:
        """Of the tokens that another worker has more of, how many this one would take from there."""
        limits = session.limits
        is_able = limits is not None and limits.fetches_prefixes and num_tokens >= self._config.min_source_tokens
        return num_tokens if is_able else 0

    def _is_open(self, session: Session) -> bool:
        """Whether the worker takes anything at all now: it runs little more than fits, and its prompts are few."""
        return self._has_room(session, self._config.prefill_window_steps)

    def _has_spare(self, session: Session) -> bool:
        """Whether it takes a prompt of a tenant that has had less than its share: others must not make it wait."""
        return self._has_room(session, 2 * self._config.prefill_window_steps)

    def _has_room(self, session: Session, window_steps: float) -> bool:
        if not session.may_hold(1):
            return False
        limits = session.limits
        assert limits is not None, "a ready worker has greeted"
        window = window_steps * limits.step_tokens
        has_slot = not limits.max_running or session.num_outputs < self._slots(limits.max_running)
        return has_slot and (not window or session.reservations.total.prefill_tokens < window)

    def _fits(self, session: Session, entry: Entry) -> bool:
        """Whether the worker takes this group now."""
        if not session.may_hold(len(entry.group.open_streams)):
            return False
        if entry.is_suspect and self._suspects.get(session.worker_id, entry) is not entry:
            return False
        if entry.was_placed:
            return True
        # A worker with a free slot takes a group whole, however large: it would starve behind smaller ones.
        return self._is_open(session) or (self._is_behind(entry.group.tenant) and self._has_spare(session))

    def _slots(self, max_running: int) -> int:
        """Outputs that a worker is given: some more than it runs, so that it need not wait for the next one."""
        return max_running + max(1, round(max_running * self._config.ahead))

    def _waits_for(self, entry: Entry, full: Session, best: Decision, second: Decision) -> bool:
        """Whether a group should wait for a full worker rather than compute elsewhere what that one has."""
        gained = best.cached_tokens - second.cached_tokens - second.fetchable_tokens
        if best.reason != "affinity" or gained <= 0 or entry.was_placed:
            return False
        now = self._loop.time()
        entry.waits_since = now if entry.waits_since is None else entry.waits_since
        patience_s = min(self._forecast.prefill_s(gained) or 0.0, self._config.max_affinity_wait_s)
        entry.waits_for, entry.waits_until = full, entry.waits_since + patience_s
        if now >= entry.waits_until:
            return False
        self._try_again_at(entry.waits_until)
        return True

    def _still_waits(self, entry: Entry) -> bool:
        """Whether a group waits for a worker that is full as before; it need not be looked at again."""
        full = entry.waits_for
        is_full = full is not None and full.state == "ready" and not self._is_open(full)
        return is_full and self._loop.time() < entry.waits_until

    def _try_again_at(self, time_s: float) -> None:
        if self._retry is not None and self._retry.when() <= time_s:
            return
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._loop.call_at(time_s, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self.run()

    def _confirm(self) -> None:
        """Learn from what workers have begun to answer: it killed nobody, and its prefix was cached or was not."""
        for entry in [entry for entry in self._unproven if entry.has_progressed]:
            del self._unproven[entry]
            session, decision, cached_tokens = entry.session, entry.decision, entry.group.cached_tokens
            assert session is not None
            assert decision is not None
            if self._suspects.get(session.worker_id) is entry:
                del self._suspects[session.worker_id]
            if cached_tokens is None or entry.num_losses or decision.fetchable_tokens:
                continue
            self._fleet.compare(session.worker_id, predicted_tokens=decision.cached_tokens, cached_tokens=cached_tokens)
            num_computed = max(entry.ask.num_tokens - cached_tokens, 0)
            self._forecast.observe_first_token(num_computed, self._loop.time() - entry.placed_at)

    # Placing

    def _place(self, entry: Entry, session: Session) -> None:
        decision = entry.decision
        assert decision is not None
        self._queue.serve(entry)
        self._observe_drain(entry)
        self._count(entry, -1)
        entry.placed_at = self._loop.time()
        entry.is_waiting, entry.session = False, session
        self._running[entry.group.tenant.name] += entry.ask.num_outputs
        self._unproven[entry] = None
        if entry.is_suspect:
            self._suspects[session.worker_id] = entry
        self._fleet.index.hold(session.worker_id, entry.block_hashes)
        self._metrics.queue_time.observe(entry.group.age_s)
        self._metrics.route_decisions.labels(decision.reason).inc()
        entry.placed = streams = entry.group.open_streams
        session.submit(
            streams,
            _uncached(streams, decision.cached_tokens + decision.fetchable_tokens),
            family=entry.ask.key,
            source=self._source(entry, decision),
        )

    def _source(self, entry: Entry, decision: Decision) -> PrefixSource | None:
        """Another worker that has so much more of the prompt that it may be worth fetching from there."""
        if not decision.fetchable_tokens:
            return None
        return self._fleet.source(entry.block_hashes, but=decision.worker_id, num_tokens=decision.cached_tokens)

    def _observe_drain(self, entry: Entry) -> None:
        """Learn how fast work leaves the queue while there is some."""
        if self._drained_at is None:
            return
        now = self._loop.time()
        self._forecast.observe_drain(entry.ask.num_tokens + entry.ask.decode_tokens, now - self._drained_at)
        self._drained_at = now if len(self._queue) else None

    def _count(self, entry: Entry, sign: int) -> None:
        self._num_waiting += sign * entry.num_requests
        self._waiting_of[entry.group.tenant.name] += sign * entry.num_requests
        waiting, ask = self._waiting, entry.ask
        self._waiting = Work(
            waiting.prefill_tokens + sign * ask.num_tokens,
            waiting.decode_tokens + sign * ask.decode_tokens,
            waiting.num_outputs + sign * ask.num_outputs,
        )


def _uncached(streams: Sequence[Stream], cached_tokens: int) -> list[Work]:
    """Each stream's work without what the worker has in its cache: the first one's prompt, of which others share it."""
    works = [stream.work for stream in streams]
    works[0] = replace(works[0], prefill_tokens=max(works[0].prefill_tokens - cached_tokens, 0))
    return works
