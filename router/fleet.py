"""The workers this router may use: one session each, kept in step with the membership, and what their caches hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from protos.errors import HeadwaterError
from protos.messages import KVEvents, ModelInfo, Pin, PrefixSource
from router.config import SessionsSection
from router.metrics import RouterMetrics
from router.pins import PinnedPrefix, Pins
from router.routing.accuracy import Accuracy
from router.routing.index import PrefixIndex
from router.session import RouterIdentity, Session, SessionLost, SessionState
from router.stream import Stream

ResyncReason = Literal["gap", "error"]


class FleetOwner(Protocol):
    """Who is told what happens to workers and to what they held."""

    def fleet_changed(self) -> None:
        """A worker came, went, or has room again."""

    def streams_lost(self, session: Session, streams: Sequence[Stream], loss: SessionLost) -> None:
        """A worker is gone; it held these streams, which have not ended."""

    def stream_failed(self, session: Session, stream: Stream, error: HeadwaterError) -> None:
        """A worker could not go on with a stream, which has not ended."""


class Fleet:
    """Owner of all sessions and of the index of their caches. Owned by RouterServer; touched on the event loop only."""

    def __init__(
        self,
        config: SessionsSection,
        identity: RouterIdentity,
        metrics: RouterMetrics,
        index: PrefixIndex,
        pins: Pins,
        *,
        accuracy: Accuracy,
        owner: FleetOwner,
    ) -> None:
        self.index = index
        self.pins = pins
        self._config = config
        self._identity = identity
        self._metrics = metrics
        self._accuracy = accuracy
        self._owner = owner
        self._members: dict[str, Session] = {}
        self._retired: set[Session] = set()
        self._model: ModelInfo | None = None
        self._page_size = 0
        self._interval_s = 0.0

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Sessions of members; those of workers that left are not among them."""
        return tuple(self._members.values())

    @property
    def num_connected(self) -> int:
        """Members that have greeted, draining ones included."""
        return sum(session.model is not None for session in self._members.values())

    @property
    def model(self) -> ModelInfo | None:
        """The limits that every connected worker can meet; the last known ones while none is connected."""
        models = [session.model for session in self._members.values() if session.model is not None]
        if models:
            self._model = ModelInfo(
                models[0].name, min(model.max_context for model in models), min(model.vocab_size for model in models)
            )
        return self._model

    @property
    def page_size(self) -> int:
        """Tokens in a block of the workers' prefix caches; the last known while none is connected, at first 0."""
        sizes = (s.limits.page_size for s in self._members.values() if s.limits is not None)
        self._page_size = next(sizes, self._page_size)
        return self._page_size

    @property
    def num_slots(self) -> int:
        """Outputs that all connected workers run at once."""
        return sum(s.limits.max_running for s in self._members.values() if s.limits is not None)

    def session(self, worker_id: str) -> Session | None:
        """A member's session."""
        return self._members.get(worker_id)

    def num_in(self, state: SessionState) -> int:
        """Workers in a state, those that left but still finish requests included. Safe from any thread."""
        return sum(session.state == state for session in (*self._members.values(), *self._retired))

    def set_members(self, members: Mapping[str, str]) -> None:
        """Make the sessions match worker id → address. A worker that left finishes what it holds first."""
        for worker_id, session in list(self._members.items()):
            if members.get(worker_id) != session.address:
                self._retire(self._members.pop(worker_id))
        for worker_id, address in members.items():
            if worker_id not in self._members:
                self._members[worker_id] = self._connect(worker_id, address)
        self._owner.fleet_changed()

    def pace(self, interval_s: float) -> None:
        """Have every worker leave this many seconds between two messages."""
        self._interval_s = interval_s
        for session in (*self._members.values(), *self._retired):
            session.pace(interval_s)

    def tell_queued(self, num_tokens: int) -> None:
        """Let every worker know how much token-work waits here."""
        for session in self._members.values():
            session.tell_queued(num_tokens)

    def resync(self, worker_id: str, *, reason: ResyncReason) -> None:
        """Have a worker tell anew what its prefix cache holds."""
        if session := self._members.get(worker_id):
            self._metrics.index_resyncs.labels(reason).inc()
            session.resync()

    def compare(self, worker_id: str, *, predicted_tokens: int, cached_tokens: int) -> None:
        """A prediction and what came of it: where they differ too often, the index is wrong."""
        self._metrics.observe_prediction(predicted_tokens=predicted_tokens, cached_tokens=cached_tokens)
        if self._accuracy.observe(worker_id, predicted_tokens, cached_tokens, self.page_size):
            self.resync(worker_id, reason="error")

    async def close(self) -> None:
        """End all sessions now."""
        sessions = [*self._members.values(), *self._retired]
        self._members.clear()
        await asyncio.gather(*(session.close() for session in sessions))
        self._retired.clear()

    def check(self) -> None:
        """Raise if a session died of a fault of this program; state invariants."""
        for session in (*self._members.values(), *self._retired):
            session.check()
        self.index.check()

    # What sessions tell

    def greeted(self, session: Session) -> None:
        """See SessionOwner."""
        for pin in self.pins:
            session.pin(self._told(pin, session))
        if len(self.pins):
            session.warm_up()

    def changed(self) -> None:
        """See SessionOwner."""
        self._owner.fleet_changed()

    def heard(self, session: Session, events: KVEvents) -> None:
        """See SessionOwner."""
        if not self._is_member(session):
            return
        if events.snapshot:
            self._accuracy.refreshed(session.worker_id)
        if not self.index.update(session.worker_id, events):
            self.resync(session.worker_id, reason="gap")
        self._check_warm(session)

    def lost(self, session: Session, streams: Sequence[Stream], loss: SessionLost) -> None:
        """See SessionOwner."""
        if self._is_member(session):
            self._forget_cache(session.worker_id)
        self._owner.streams_lost(session, streams, loss)

    def failed(self, session: Session, stream: Stream, error: HeadwaterError) -> None:
        """See SessionOwner."""
        self._owner.stream_failed(session, stream, error)

    # Prefixes that stay

    def pin(self, tenant: str, cache_salt: str, token_ids: Sequence[int]) -> PinnedPrefix:
        """Have every worker keep a prefix. Raises InvalidParameter, or Overloaded if the tenant has pinned enough."""
        num_pins = len(self.pins)
        pin = self.pins.add(tenant, cache_salt, token_ids, self.page_size)
        for session in self._members.values():
            if session.model is not None and len(self.pins) > num_pins:  # else it has been told
                session.pin(self._told(pin, session))
        return pin

    def unpin(self, tenant: str, pin_id: str) -> bool:
        """Let every worker forget a prefix when it likes; False if the tenant has not pinned it."""
        pin = self.pins.remove(tenant, pin_id)
        if pin is not None:
            for session in self.sessions:
                session.unpin(pin.session_id)
                self._check_warm(session)
        return pin is not None

    def has(self, worker_id: str, pin: PinnedPrefix) -> bool:
        """Whether a worker's cache holds all of a pinned prefix."""
        match = self.index.match(pin.block_hashes).get(worker_id)
        return match is not None and match.known == len(pin.block_hashes)

    def source(self, block_hashes: Sequence[int], *, but: str, num_tokens: int) -> PrefixSource | None:
        """The worker with the longest beginning of a prompt, if that is longer than `num_tokens` of worker `but`."""
        best: PrefixSource | None = None
        for worker_id, depth in self.index.stored(block_hashes).items():
            session, found = self._members.get(worker_id), depth * self.page_size
            if worker_id != but and session is not None and found > num_tokens:
                best, num_tokens = PrefixSource(worker_id, session.address, found), found
        return best

    def _check_warm(self, session: Session) -> None:
        if session.state == "warming" and all(self.has(session.worker_id, pin) for pin in self.pins):
            session.warmed()

    def _told(self, pin: PinnedPrefix, session: Session) -> Pin:
        source = self.source(pin.block_hashes, but=session.worker_id, num_tokens=0)
        return Pin(pin.session_id, pin.cache_salt, pin.token_ids, source)

    # Members

    def _connect(self, worker_id: str, address: str) -> Session:
        session = Session(
            worker_id, address, config=self._config, identity=self._identity, metrics=self._metrics, owner=self
        )
        session.pace(self._interval_s)
        return session

    def _is_member(self, session: Session) -> bool:
        """Whether it is not one that was retired: its worker's id may have a new session."""
        return self._members.get(session.worker_id) is session

    def _forget_cache(self, worker_id: str) -> None:
        self.index.forget(worker_id)
        self._accuracy.forget(worker_id)

    def _retire(self, session: Session) -> None:
        self._forget_cache(session.worker_id)
        self._retired.add(session)
        session.add_closed_callback(lambda: self._reap(session))
        session.retire()

    def _reap(self, session: Session) -> None:
        self._retired.discard(session)
        others = (*self._members.values(), *self._retired)
        if all(other.worker_id != session.worker_id for other in others):
            self._metrics.forget(session.worker_id)
