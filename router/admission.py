"""Every live group from its acceptance to its one end: refused at once, waiting, on a worker, or on its way to another.

Stands between the servicer and the sessions. What may not wait is refused here with a typed error; what waits is in the
dispatcher's hands; what a lost worker held comes back here and goes on elsewhere, from where its outputs stand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from protos.blocks import block_hashes
from protos.errors import (
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    EngineFailure,
    HeadwaterError,
    NoWorker,
    Overloaded,
    WorkerLost,
)
from protos.messages import ModelInfo
from router.config import LimitsSection, RecoverySection
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.forecast import Forecast
from router.group import Entry, Group
from router.metrics import RouterMetrics
from router.quota import Quotas
from router.routing.protocol import Ask, Decision
from router.session import LossReason, Session, SessionLost
from router.stream import Stream

MIN_RETRY_S = 0.1
MAX_RETRY_S = 10.0
CRASHES: frozenset[LossReason] = frozenset({"connection", "silent"})  # ends that a request may have caused
UNWILLING = (Draining, Overloaded)  # a worker's errors that say nothing about the request


class Admission:
    """All live groups, by their id. Owned by RouterServer; touched on the event loop only."""

    def __init__(
        self,
        limits: LimitsSection,
        recovery: RecoverySection,
        *,
        fleet: Fleet,
        dispatcher: Dispatcher,
        quotas: Quotas,
        forecast: Forecast,
        metrics: RouterMetrics,
        on_demand: bool = False,
    ) -> None:
        """`on_demand`: workers come when somebody waits for one."""
        self._limits = limits
        self._recovery = recovery
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._quotas = quotas
        self._forecast = forecast
        self._metrics = metrics
        self._entries: dict[str, Entry] = {}
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self._connected = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._on_demand = on_demand
        self._num_asking = 0  # calls that wait for the model's limits
        self._alone = self._loop.call_later(limits.no_worker_grace_s, self._give_up)
        self._gave_up = False
        self._mind_grace()

    @property
    def num_live(self) -> int:
        """Requests accepted and not yet released."""
        return sum(len(entry.group.streams) for entry in list(self._entries.values()))

    @property
    def wants_worker(self) -> bool:
        """Whether somebody waits, and no worker is connected."""
        return not self._fleet.num_connected and (self._num_asking > 0 or self._dispatcher.num_waiting > 0)

    async def model(self) -> ModelInfo:
        """The served model's limits, which the first worker tells. Raises NoWorker after the grace, or Draining."""
        self._num_asking += 1
        self._mind_grace()
        try:
            while (model := self._fleet.model) is None:
                self._refuse_if_closed()
                self._connected.clear()
                await self._connected.wait()
            return model
        finally:
            self._num_asking -= 1
            self._mind_grace()

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
        self._check_deadline(group)
        work = group.work
        num_tokens = work.prefill_tokens + work.decode_tokens
        self._quotas.charge(group.tenant, num_tokens)
        entry = Entry(
            group,
            expiry=self._loop.call_later(group.remaining_s, self._expire, group),
            ask=self._ask(group, hashes := self._hashes(group)),
            block_hashes=hashes,
            charged_tokens=num_tokens,
            num_requests=len(group.streams),
        )
        self._entries[group.group_id] = entry
        self._dispatcher.add(entry)
        if entry.is_waiting and (refusal := self._refusal(entry)) is not None:
            entry.expiry.cancel()
            self._dispatcher.remove(entry)
            del self._entries[group.group_id]
            self._quotas.refund(group.tenant, num_tokens, num_requests=1)
            raise refusal
        self._empty.clear()
        self._mind_grace()

    def release(self, group: Group) -> None:
        """Forget a group; what still runs is cancelled on its worker. Idempotent."""
        entry = self._entries.get(group.group_id)
        if entry is None or entry.group is not group:
            return
        del self._entries[group.group_id]
        entry.expiry.cancel()
        if entry.is_waiting:
            self._dispatcher.remove(entry)
        if (session := entry.session) is not None:
            self._dispatcher.leave(entry)
            for stream in group.streams:
                session.cancel(stream)
        if entry.was_placed:
            self._settle(entry)
        unused_tokens = max(entry.charged_tokens - group.used_tokens, 0)
        self._quotas.refund(group.tenant, unused_tokens, num_requests=0)
        if not self._entries:
            self._empty.set()
        self._dispatcher.run()
        self._mind_grace()

    def decision(self, group: Group) -> Decision | None:
        """Why a live group is on its worker; None if it never was on one."""
        entry = self._entries.get(group.group_id)
        return None if entry is None or entry.group is not group else entry.decision

    def _settle(self, entry: Entry) -> None:
        """A group that ran has ended: queue and forecast learn what it needed, and it is counted."""
        group, tenant = entry.group, entry.group.tenant
        self._dispatcher.settle(entry)
        for kind, num_tokens in (
            ("prompt", group.num_tokens),
            ("cached", group.cached_tokens or 0),
            ("generation", group.num_completion_tokens),
        ):
            self._metrics.tenant_tokens.labels(tenant.name, kind).inc(num_tokens)

    def abort(self, group_id: str) -> bool:
        """End a live group with finish reason ABORT; False if there is none."""
        entry = self._entries.get(group_id)
        if entry is None:
            return False
        entry.group.abort()
        self.release(entry.group)
        return True

    def fleet_changed(self) -> None:
        """A worker came, went, or has room again."""
        self._mind_grace()
        self._connected.set()
        self._dispatcher.run()

    # Recovery

    def streams_lost(self, session: Session, streams: Sequence[Stream], loss: SessionLost) -> None:
        """A worker is gone: what it held goes on elsewhere, from where its outputs stand."""
        error = WorkerLost(f"worker {session.worker_id} was lost ({loss}); send the request again")
        for entry in self._entries.values():
            if entry.session is session:  # some may have ended, and wait for their clients to read
                self._dispatcher.leave(entry, is_lost=True)
        for entry in self._entries_of(streams):
            entry.num_losses += 1
            entry.num_strikes += loss.reason in CRASHES and entry.was_sent and not entry.has_progressed
            self._recover(entry, error)

    def stream_failed(self, session: Session, stream: Stream, error: HeadwaterError) -> None:
        """A worker could not go on with a stream: another may, unless it is the request's own fault."""
        if not isinstance(error, (EngineFailure, *UNWILLING)):
            stream.fail(error)
            return
        [entry] = self._entries_of([stream])
        self._dispatcher.leave(entry)
        for other in entry.group.open_streams:
            session.cancel(other)
        entry.unwilling.add(session.worker_id)
        if isinstance(error, UNWILLING) and not self._dispatcher.has_others(entry.unwilling):
            entry.group.fail(error)
            return
        entry.num_losses += 1
        entry.num_strikes += isinstance(error, EngineFailure)
        self._recover(entry, error)

    def _entries_of(self, streams: Sequence[Stream]) -> list[Entry]:
        return [self._entries[group_id] for group_id in dict.fromkeys(stream.group_id for stream in streams)]

    def _recover(self, entry: Entry, error: HeadwaterError) -> None:
        """Let a group that lost its worker wait for another one, unless it has cost too many."""
        entry.last_error = error
        group = entry.group
        if entry.num_strikes >= self._recovery.max_strikes or entry.num_losses > self._recovery.max_losses:
            self._metrics.recoveries.labels("given_up").inc()
            group.fail(self._last_word(entry, error))
            return
        self._metrics.recoveries.labels("resumed").inc()
        for stream in group.open_streams:
            stream.resume()
        entry.ask, entry.num_requests = self._ask(group, entry.block_hashes), len(group.open_streams)
        self._dispatcher.add(entry)

    def _last_word(self, entry: Entry, error: HeadwaterError) -> HeadwaterError:
        if entry.num_strikes < self._recovery.max_strikes:
            return error
        return EngineFailure(
            f"the request failed on {entry.num_strikes} workers before it made a token, the limit is "
            f"{self._recovery.max_strikes}: it may be what ends them, and is not tried again ({error.message})"
        )

    # Limits

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
        self._dispatcher.close()
        for entry in self._entries.values():
            entry.expiry.cancel()

    def check(self) -> None:
        """What waits is what has no worker and has not ended."""
        waiting = {id(entry) for entry in self._dispatcher}
        assert waiting == {id(entry) for entry in self._entries.values() if entry.is_waiting}
        assert all(entry.session is None for entry in self._entries.values() if entry.is_waiting)
        self._dispatcher.check()

    def _refuse_if_closed(self) -> None:
        if self._draining:
            raise Draining("this router is shutting down; send the request to another one")
        if self._gave_up:
            raise self._no_worker()

    def _check_deadline(self, group: Group) -> None:
        """Raises DeadlineExceeded for a group that cannot end in time even if all goes better than it does now."""
        if group.remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived; give it more time")
        waiting = self._dispatcher.waiting_work
        expected_s = self._forecast.end_s(
            work_ahead_tokens=waiting.prefill_tokens + waiting.decode_tokens if group.priority <= 0 else 0,
            prefill_tokens=0,  # it may all be cached
            certain_decode_tokens=group.certain_tokens,
        )
        left_s = group.remaining_s
        if expected_s is not None and expected_s > left_s:
            raise DeadlineExceeded(
                f"the answer would take {expected_s:.2f} s at the least, but the deadline leaves {left_s:.2f} s; "
                "ask for fewer tokens, give it more time, or try again later"
            )

    def _refusal(self, entry: Entry) -> Overloaded | None:
        """Why a group may not wait; None if it may. One that finds nothing before it always may, however large."""
        limits, tenant = self._limits, entry.group.tenant
        num_waiting = self._dispatcher.num_waiting - entry.num_requests
        num_tokens = self._dispatcher.waiting_work.prefill_tokens - entry.ask.num_tokens
        num_own = self._dispatcher.waiting[tenant.name] - entry.num_requests
        if num_waiting == 0:
            return None
        if num_waiting + entry.num_requests > limits.max_queued_requests:
            return self._overloaded(f"{num_waiting} requests wait, the limit is {limits.max_queued_requests}")
        if num_tokens + entry.ask.num_tokens > limits.max_queued_tokens:
            return self._overloaded(
                f"{num_tokens} prompt tokens wait and the request has {entry.ask.num_tokens}, "
                f"the limit is {limits.max_queued_tokens}"
            )
        if tenant.max_queued is not None and num_own + entry.num_requests > tenant.max_queued:
            return self._overloaded(f"{num_own} requests of {tenant.name} wait, its limit is {tenant.max_queued}")
        return None

    def _overloaded(self, what: str) -> Overloaded:
        waiting = self._dispatcher.waiting_work
        drained_s = self._forecast.drain_s(waiting.prefill_tokens + waiting.decode_tokens)
        retry_after_s = min(max(drained_s or 0.0, MIN_RETRY_S), MAX_RETRY_S)
        return Overloaded(f"{what}; try again in {retry_after_s:.1f} s or add workers", retry_after_s=retry_after_s)

    # Entries

    def _hashes(self, group: Group) -> list[int]:
        """The names of the prompt's blocks, if any worker has told how long its blocks are."""
        size = self._fleet.page_size
        return block_hashes(group.cache_salt, group.prompt, size) if size else []

    def _ask(self, group: Group, hashes: Sequence[int]) -> Ask:
        work, prompt = group.work, group.prompt
        [key] = hashes[:1] or block_hashes(group.cache_salt, prompt, len(prompt))
        return Ask(work.prefill_tokens, work.decode_tokens, work.num_outputs, key)

    def _expire(self, group: Group) -> None:
        group.fail(DeadlineExceeded("the deadline passed before the request ended; give it more time or fewer tokens"))
        self.release(group)

    def _give_up(self) -> None:
        """No worker has been connected for the whole grace."""
        self._gave_up = True
        self._connected.set()
        for entry in list(self._dispatcher):
            if entry.last_error is not None:  # it had a worker, and waited for another
                self._metrics.recoveries.labels("given_up").inc()
            entry.group.fail(entry.last_error or self._no_worker())
            self.release(entry.group)

    def _mind_grace(self) -> None:
        """It runs while no worker is connected; where they come on demand, only while somebody waits for one."""
        if self._fleet.num_connected or (self._on_demand and not self.wants_worker):
            self._alone.cancel()
            self._gave_up = False
        elif self._alone.cancelled():
            self._alone = self._loop.call_later(self._limits.no_worker_grace_s, self._give_up)

    def _no_worker(self) -> NoWorker:
        return NoWorker(
            f"no worker has been connected for {self._limits.no_worker_grace_s:g} s; check the workers, then try again"
        )

    def _fail_all(self, error: HeadwaterError) -> None:
        for entry in list(self._entries.values()):
            entry.group.fail(error)
            self.release(entry.group)
