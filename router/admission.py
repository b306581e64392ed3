"""Who waits, who runs: a bounded queue of packed groups and their placement on workers.

Stands between the servicer and the sessions. It has no task of its own: it acts when a group comes or goes, when the
fleet changes, and on timers of the event loop, so a decision and its reservation are atomic.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from protos.errors import DeadlineExceeded, Draining, DuplicateRequest, HeadwaterError, NoWorker, Overloaded
from protos.messages import ModelInfo
from router.config import LimitsSection
from router.fleet import Fleet
from router.group import Group
from router.metrics import RouterMetrics
from router.policy import Policy
from router.session import Session

MIN_RETRY_S = 0.1
MAX_RETRY_S = 10.0


@dataclass(slots=True, eq=False)
class _Entry:
    """A live group. Mutated only by Admission."""

    group: Group
    expiry: asyncio.TimerHandle
    session: Session | None = None  # None: waiting


class Admission:
    """All live groups, by their id. Owned by RouterServer; touched on the event loop only."""

    def __init__(self, limits: LimitsSection, fleet: Fleet, policy: Policy, metrics: RouterMetrics) -> None:
        self._limits = limits
        self._fleet = fleet
        self._policy = policy
        self._metrics = metrics
        self._entries: dict[str, _Entry] = {}
        self._queues: dict[int, dict[str, _Entry]] = {}  # priority: group id, in order of arrival
        self._num_waiting = 0
        self._waiting_tokens = 0
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self._connected = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._alone = self._loop.call_later(limits.no_worker_grace_s, self._give_up)
        self._gave_up = False

    @property
    def num_live(self) -> int:
        """Requests accepted and not yet released."""
        return sum(len(entry.group.streams) for entry in list(self._entries.values()))

    @property
    def num_waiting(self) -> int:
        """Requests that have no worker yet."""
        return self._num_waiting

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that have no worker yet."""
        return self._waiting_tokens

    async def model(self) -> ModelInfo:
        """The served model's limits, which the first worker tells. Raises NoWorker after the grace, or Draining."""
        while (model := self._fleet.model) is None:
            self._refuse_if_closed()
            self._connected.clear()
            await self._connected.wait()
        return model

    def check_id(self, group_id: str) -> None:
        """Raises DuplicateRequest if a live group has this id, Draining or NoWorker if no new work is taken."""
        self._refuse_if_closed()
        if group_id in self._entries:
            raise DuplicateRequest(f"request id {group_id!r} is live; wait for its end, abort it, or choose another id")

    def admit(self, group: Group) -> None:
        """Accept a group: it runs at once or waits; from here on it has one end and must be released.

        Raises Draining, DuplicateRequest, DeadlineExceeded, NoWorker or Overloaded, and then nothing is kept.
        """
        self.check_id(group.group_id)
        if group.remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived; give it more time")
        expiry = self._loop.call_later(group.remaining_s, self._expire, group)
        entry = _Entry(group, expiry)
        try:
            self._place_or_queue(entry)
        except HeadwaterError:
            expiry.cancel()
            raise
        self._entries[group.group_id] = entry
        self._empty.clear()

    def release(self, group: Group) -> None:
        """Forget a group; what still runs is cancelled on its worker. Idempotent."""
        entry = self._entries.get(group.group_id)
        if entry is None or entry.group is not group:
            return
        del self._entries[group.group_id]
        entry.expiry.cancel()
        if entry.session is None:
            self._unqueue(entry)
        else:
            for stream in group.streams:
                entry.session.cancel(stream)
        if not self._entries:
            self._empty.set()
        self.dispatch()

    def abort(self, group_id: str) -> bool:
        """End a live group with finish reason ABORT; False if there is none."""
        entry = self._entries.get(group_id)
        if entry is None:
            return False
        entry.group.abort()
        self.release(entry.group)
        return True

    def dispatch(self) -> None:
        """Place waiting groups, first come first served within a priority, until the next one fits nowhere."""
        while (entry := next(self._waiting(), None)) is not None:
            session = self._pick(entry.group)
            if session is None:
                return
            self._unqueue(entry)
            self._place(entry, session)

    def fleet_changed(self) -> None:
        """A worker came, went, or has room again."""
        if self._fleet.num_connected:
            self._alone.cancel()
            self._gave_up = False
        elif self._alone.cancelled():
            self._alone = self._loop.call_later(self._limits.no_worker_grace_s, self._give_up)
        self._connected.set()
        self.dispatch()

    def drain(self) -> None:
        """Take no new work; what is live goes on."""
        self._draining = True
        self._connected.set()

    async def finish(self, grace_s: float) -> None:
        """Wait for live groups to end; those left after the grace end in Draining."""
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            self._fail_all(Draining("the router shut down before the request ended; send it again"))

    def close(self) -> None:
        """Cancel the timers."""
        self._alone.cancel()
        for entry in self._entries.values():
            entry.expiry.cancel()

    def check(self) -> None:
        """The queue holds exactly the entries without a session, and its counts are theirs."""
        waiting = {group_id for group_id, entry in self._entries.items() if entry.session is None}
        assert waiting == {entry.group.group_id for entry in self._waiting()}
        assert self._num_waiting == sum(len(self._entries[group_id].group.streams) for group_id in waiting)
        assert self._waiting_tokens == sum(self._entries[group_id].group.num_tokens for group_id in waiting)

    def _refuse_if_closed(self) -> None:
        if self._draining:
            raise Draining("this router is shutting down; send the request to another one")
        if self._gave_up:
            raise self._no_worker()

    def _place_or_queue(self, entry: _Entry) -> None:
        session = self._pick(entry.group) if next(self._waiting(), None) is None else None
        if session is not None:
            self._place(entry, session)
            return
        self._check_room(entry.group)
        self._queues.setdefault(entry.group.priority, {})[entry.group.group_id] = entry
        self._num_waiting += len(entry.group.streams)
        self._waiting_tokens += entry.group.num_tokens

    def _check_room(self, group: Group) -> None:
        """A group that finds the queue empty may always wait, however large."""
        num_waiting, limits = self.num_waiting, self._limits
        if num_waiting == 0:
            return
        if num_waiting + len(group.streams) > limits.max_queued_requests:
            raise self._overloaded(f"{num_waiting} requests wait, the limit is {limits.max_queued_requests}")
        if self._waiting_tokens + group.num_tokens > limits.max_queued_tokens:
            raise self._overloaded(
                f"{self._waiting_tokens} prompt tokens wait and the request has {group.num_tokens}, "
                f"the limit is {limits.max_queued_tokens}"
            )

    def _overloaded(self, what: str) -> Overloaded:
        """The first in line has waited as long as a newcomer probably would."""
        waited_s = max(entry.group.age_s for entry in self._waiting())
        retry_after_s = min(max(waited_s, MIN_RETRY_S), MAX_RETRY_S)
        return Overloaded(f"{what}; try again in {retry_after_s:.1f} s or add workers", retry_after_s=retry_after_s)

    def _pick(self, group: Group) -> Session | None:
        sessions = {s.worker_id: s for s in self._fleet.sessions if s.has_room(len(group.streams))}
        choice = self._policy.pick(group.requests, [session.candidate for session in sessions.values()])
        return None if choice is None else sessions[choice.worker_id]

    def _place(self, entry: _Entry, session: Session) -> None:
        entry.session = session
        self._metrics.queue_time.observe(entry.group.age_s)
        session.submit(entry.group.streams)

    def _waiting(self) -> Iterator[_Entry]:
        for priority in sorted(self._queues, reverse=True):
            yield from self._queues[priority].values()

    def _unqueue(self, entry: _Entry) -> None:
        queue = self._queues[entry.group.priority]
        del queue[entry.group.group_id]
        if not queue:
            del self._queues[entry.group.priority]
        self._num_waiting -= len(entry.group.streams)
        self._waiting_tokens -= entry.group.num_tokens

    def _expire(self, group: Group) -> None:
        group.fail(DeadlineExceeded("the deadline passed before the request ended; give it more time or fewer tokens"))
        self.release(group)

    def _give_up(self) -> None:
        """No worker has been connected for the whole grace."""
        self._gave_up = True
        self._connected.set()
        for entry in list(self._waiting()):
            entry.group.fail(self._no_worker())
            self.release(entry.group)

    def _no_worker(self) -> NoWorker:
        return NoWorker(
            f"no worker has been connected for {self._limits.no_worker_grace_s:g} s; check the workers, then try again"
        )

    def _fail_all(self, error: HeadwaterError) -> None:
        for entry in list(self._entries.values()):
            entry.group.fail(error)
            self.release(entry.group)
