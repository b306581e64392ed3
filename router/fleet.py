"""The workers this router may use: one session each, kept in step with the membership."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from protos.messages import ModelInfo
from router.config import SessionsSection
from router.metrics import RouterMetrics
from router.session import RouterIdentity, Session, SessionState


class Fleet:
    """Owner of all sessions. Owned by RouterServer; touched on the event loop only."""

    def __init__(
        self,
        config: SessionsSection,
        identity: RouterIdentity,
        metrics: RouterMetrics,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._identity = identity
        self._metrics = metrics
        self._on_change = on_change
        self._members: dict[str, Session] = {}
        self._retired: set[Session] = set()
        self._model: ModelInfo | None = None
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
        self._on_change()

    def pace(self, interval_s: float) -> None:
        """Have every worker leave this many seconds between two messages."""
        self._interval_s = interval_s
        for session in (*self._members.values(), *self._retired):
            session.pace(interval_s)

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

    def _connect(self, worker_id: str, address: str) -> Session:
        session = Session(
            worker_id,
            address,
            config=self._config,
            identity=self._identity,
            metrics=self._metrics,
            on_change=self._on_change,
        )
        session.pace(self._interval_s)
        return session

    def _retire(self, session: Session) -> None:
        self._retired.add(session)
        session.add_closed_callback(lambda: self._reap(session))
        session.retire()

    def _reap(self, session: Session) -> None:
        self._retired.discard(session)
        others = (*self._members.values(), *self._retired)
        if all(other.worker_id != session.worker_id for other in others):
            self._metrics.forget(session.worker_id)
