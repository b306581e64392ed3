"""A router without a network: real admission, dispatcher, fleet and sessions, whose frames a test carries itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protos.convert import delta_to_proto, failure_to_proto, kv_events_to_proto, load_to_proto, submit_from_proto
from protos.errors import HeadwaterError
from protos.messages import Delta, Failure, Finish, KVEvents, Load, Request, Sampling
from protos.v1 import session_pb2 as session_pb
from router.admission import Admission
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.forecast import Forecast
from router.group import Group
from router.metrics import RouterMetrics
from router.pins import Pins
from router.quota import Quotas
from router.routing.accuracy import Accuracy
from router.routing.factory import make_policy
from router.routing.index import PrefixIndex
from router.session import LossReason, RouterIdentity, Session, SessionLost
from router.stream import Stream
from router.tenants import EVERYBODY, Tenant, Tenants

PAGE_SIZE = 4
IDENTITY = RouterIdentity("r0", "secret", "tiny")


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class OfflineSession(Session):
    """A session that connects to nothing: it says what `hears` is given, and what it would send is read by `sent`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._left: list[session_pb.RouterFrame] = []  # and not yet read by `sent`

    async def _run(self) -> None:
        await self._leave.wait()
        self.lose("retired")

    def greet(self, *, max_running: int = 0, step_tokens: int = 0, page_size: int = PAGE_SIZE) -> None:
        """The worker connects."""
        self.hears(
            hello=session_pb.WorkerHello(
                model="tiny",
                max_context=64,
                vocab_size=100,
                page_size=page_size,
                max_running=max_running,
                step_tokens=step_tokens,
            )
        )

    def hears(self, *, events: KVEvents | None = None, **frame: Any) -> None:
        """One frame from the worker."""
        message = session_pb.WorkerFrame(**frame)
        if events is not None:
            message.kv_events.CopyFrom(kv_events_to_proto(events))
        self._receive(message)

    def says(self, *news: Delta | Failure) -> None:
        """One step of the worker, which has had all that was to leave."""
        self._flush()
        deltas = [failure_to_proto(n) if isinstance(n, Failure) else delta_to_proto(n) for n in news]
        self.hears(step=session_pb.StepFrame(step=1, deltas=deltas, load=load_to_proto(self.load)))

    def reports(self, load: Load) -> None:
        """A heartbeat."""
        self.hears(heartbeat=session_pb.Heartbeat(load=load_to_proto(load)))

    def lose(self, reason: LossReason = "connection") -> None:
        """The connection ends; what was to leave before had left."""
        self._flush()
        self._left.clear()
        self._lose(SessionLost(reason, "gone"))

    def sent(self) -> list[session_pb.RouterFrame]:
        """What has left since the last time."""
        self._flush()
        frames, self._left = self._left, []
        return frames

    def _flush(self) -> None:
        """As the writing task does it."""
        self._outgoing.clear()
        frees_room = bool(self._cancels)
        self._left += self._take_frames()
        if frees_room:
            self._owner.changed()

    def submitted(self) -> list[Request]:
        """The requests of what leaves now."""
        return [submit_from_proto(submit) for frame in self.sent() for submit in frame.submit]


class OfflineFleet(Fleet):
    """Connects nobody."""

    def _connect(self, worker_id: str, address: str) -> Session:
        return OfflineSession(
            worker_id, address, config=self._config, identity=self._identity, metrics=self._metrics, owner=self
        )


class OfflineRouter:
    """The parts of a router between its services and its network. Needs a running event loop to be made."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] | None = None) -> None:
        self.metrics = RouterMetrics()
        self.forecast = Forecast(clock) if clock else Forecast()
        self.tenants = Tenants(config.tenants)
        self.index = PrefixIndex(config.routing.max_index_blocks)
        self.policy = make_policy(config.routing)
        self.fleet = OfflineFleet(
            config.sessions,
            IDENTITY,
            self.metrics,
            self.index,
            Pins(config.limits.max_pinned_tokens),
            accuracy=Accuracy(clock=clock or (lambda: 0.0), interval_s=1.0),
            owner=self,
        )
        self.dispatcher = Dispatcher(
            config.dispatch,
            self.fleet,
            self.policy,
            tenants=self.tenants,
            forecast=self.forecast,
            metrics=self.metrics,
        )
        self.admission = Admission(
            config.limits,
            config.recovery,
            fleet=self.fleet,
            dispatcher=self.dispatcher,
            quotas=Quotas(),
            forecast=self.forecast,
            metrics=self.metrics,
        )
        self._serial = itertools.count(1)

    def workers(self, *worker_ids: str, **limits: int) -> list[OfflineSession]:
        """Members that are connected."""
        self.set_members({worker_id: worker_id for worker_id in worker_ids})
        sessions = [self.session(worker_id) for worker_id in worker_ids]
        for session in sessions:
            session.greet(**limits)
        return sessions

    def set_members(self, members: Mapping[str, str]) -> None:
        self.fleet.set_members(members)

    def session(self, worker_id: str) -> OfflineSession:
        session = self.fleet.session(worker_id)
        assert isinstance(session, OfflineSession)
        return session

    def group(
        self,
        prompt: Sequence[int] = (5,),
        *,
        tenant: Tenant = EVERYBODY,
        group_id: str = "",
        num_streams: int = 1,
        remaining_s: float = 1000.0,
        priority: int = 0,
        **sampling: Any,
    ) -> Group:
        """A group that has not been admitted."""
        group_id = group_id or f"g{next(self._serial)}"
        streams = [
            Stream(
                Request(
                    request_id=f"{group_id}@{next(self._serial)}",
                    token_ids=tuple(prompt),
                    sampling=Sampling(**{"seed": 1, "max_tokens": 4, "ignore_eos": False} | sampling),
                    cache_salt=self.tenants.cache_salt(tenant),
                    priority=priority,
                ),
                client_id=group_id,
                group_id=group_id,
                model="tiny",
                created=0.0,
                clock=lambda: 0.0,
            )
            for _ in range(num_streams)
        ]
        return Group(group_id, tuple(streams), tenant, remaining_s)

    def admit(self, *args: Any, **options: Any) -> Group:
        """A group that has been admitted."""
        group = self.group(*args, **options)
        self.admission.admit(group)
        return group

    def place_of(self, group: Group) -> str | None:
        """The worker that has a group."""
        entry = self.admission._entries[group.group_id]
        return None if entry.session is None else entry.session.worker_id

    async def close(self) -> None:
        await self.fleet.close()
        self.admission.close()

    def check(self) -> None:
        """Every invariant there is."""
        self.fleet.check()
        self.admission.check()

    def check_empty(self) -> None:
        """Nothing is left of any group."""
        self.check()
        assert self.admission.num_live == 0
        assert self.dispatcher.num_waiting == 0
        dispatcher = self.dispatcher
        counts = (dispatcher.running, dispatcher.waiting)
        kept = (*counts, dispatcher._known_tenants, dispatcher._suspects, dispatcher._unproven)
        assert not any(kept), kept
        assert not self.index._live
        assert all(session.num_live == session.reservations.num_open == 0 for session in self.fleet.sessions)

    # FleetOwner

    def fleet_changed(self) -> None:
        self.admission.fleet_changed()

    def streams_lost(self, session: Session, streams: Sequence[Stream], loss: SessionLost) -> None:
        self.admission.streams_lost(session, streams, loss)

    def stream_failed(self, session: Session, stream: Stream, error: HeadwaterError) -> None:
        self.admission.stream_failed(session, stream, error)


def whole(request: Request, num_tokens: int, *, finish: bool = False, cached_tokens: int = 0) -> list[Delta]:
    """The next tokens of each output, after what was resumed."""
    made = {point.index: len(point.token_ids) for point in request.resume if not point.finished}
    finished = {point.index for point in request.resume if point.finished}
    return [
        Delta(
            request.request_id,
            index,
            "",
            tuple(10 + made.get(index, 0) + i for i in range(num_tokens)),
            finish=Finish("length") if finish else None,
            cached_tokens=cached_tokens,
        )
        for index in range(request.sampling.n)
        if index not in finished
    ]
