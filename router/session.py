"""One worker's session: a bidirectional stream that carries all of this router's requests to it.

Stands between admission, which submits, and the streams, which receive. Down come a hello, frames with what engine
steps made, what the prefix cache holds, and heartbeats; up go packed groups, cancels and how often frames should come.
A worker that closes, breaks or falls silent is lost: every request it held goes back to its owner, who finds another
worker for it, and the session connects anew while the worker is a member.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import grpc

from protos.convert import (
    delta_from_proto,
    failure_to_error,
    kv_events_from_proto,
    load_from_proto,
    pin_to_proto,
    submit_to_proto,
    totals_from_proto,
)
from protos.errors import HeadwaterError
from protos.messages import EngineTotals, Failure, KVEvents, Load, ModelInfo, Pin, PrefixSource
from protos.tls import Certificates, channel_credentials, channel_options, grpc_reason
from protos.v1 import session_pb2 as session_pb
from protos.v1 import session_pb2_grpc as session_grpc
from router.config import SessionsSection
from router.metrics import RouterMetrics
from router.pack import Pack
from router.reservations import Reservations
from router.stream import Stream
from router.work import Work

TOKEN_METADATA = "headwater-session-token"
ROUTER_METADATA = "headwater-router-id"
PACE_SLACK = 1.25  # an interval is told again when it has changed by this factor
WATCHDOG_TICKS = 4  # silence is counted in ticks of our own clock, so that a pause of this process is not the worker's

SessionState = Literal["connecting", "warming", "ready", "draining"]
LossReason = Literal["silent", "closed", "connection", "protocol", "retired"]
_Call = grpc.aio.StreamStreamCall[session_pb.RouterFrame, session_pb.WorkerFrame]

logger = logging.getLogger(__name__)


class SessionLost(Exception):
    """Ends one connection; never leaves this file."""

    def __init__(self, reason: LossReason, detail: str) -> None:
        super().__init__(detail)
        self.reason: LossReason = reason


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    """What a router shows to workers."""

    router_id: str
    session_token: str = field(repr=False)
    model_name: str  # workers that serve another model are refused
    certificates: Certificates | None = None  # None: plain text

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ((TOKEN_METADATA, self.session_token), (ROUTER_METADATA, self.router_id))


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker said of itself when it greeted."""

    page_size: int
    max_running: int
    step_tokens: int
    fetches_prefixes: bool = False  # from other workers


class SessionOwner(Protocol):
    """Who is told what happens to a session."""

    def greeted(self, session: Session) -> None:
        """The worker is connected; it knows nothing yet."""

    def changed(self) -> None:
        """The worker became ready, was lost, changed its draining flag, or has more room than before."""

    def heard(self, session: Session, events: KVEvents) -> None:
        """The worker's prefix cache has changed."""

    def lost(self, session: Session, streams: Sequence[Stream], loss: SessionLost) -> None:
        """The worker is gone; it held these streams, which have not ended."""

    def failed(self, session: Session, stream: Stream, error: HeadwaterError) -> None:
        """The worker could not go on with a stream. It has forgotten it; the stream has not ended."""


class Session:
    """The connection to one worker and the requests it holds. Owned by Fleet; touched on the event loop only."""

    def __init__(
        self,
        worker_id: str,
        address: str,
        *,
        config: SessionsSection,
        identity: RouterIdentity,
        metrics: RouterMetrics,
        owner: SessionOwner,
    ) -> None:
        self.worker_id = worker_id
        self.address = address
        self.model: ModelInfo | None = None  # known while connected
        self.limits: WorkerLimits | None = None  # known while connected
        self.is_held = False  # an operator wants it to get no new work
        self.load = Load()
        self.totals: EngineTotals | None = None  # as last told, while connected
        self.reservations = Reservations()
        self._config = config
        self._identity = identity
        self._metrics = metrics
        self._series = metrics.worker(worker_id)
        self._owner = owner
        self._live: dict[str, Stream] = {}
        self._outgoing = asyncio.Event()
        self._pack = Pack(config.packing_window_s, self._outgoing.set, metrics.packs)
        self._wants_resync = False
        self._cancels: list[str] = []
        self._interval_s = 0.0  # wanted between two frames
        self._told_s = 0.0  # what the worker knows of it
        self._queued_tokens = 0  # that wait at this router for any worker
        self._told_queued_tokens = 0
        self._pins: list[Pin] = []  # to be told
        self._unpins: list[str] = []
        self._warm_up: asyncio.TimerHandle | None = None  # while it has not what it should have before it gets work
        self._retiring = False
        self._leave = asyncio.Event()
        self._num_heard = 0
        self._trouble = ""  # that kept the session from coming up, as it was logged last
        self._task = asyncio.create_task(self._run(), name=f"session {worker_id}")

    @property
    def state(self) -> SessionState:
        if self._retiring or self.is_held or self.load.draining:
            return "draining"
        if self.model is None:
            return "connecting"
        return "warming" if self._warm_up is not None else "ready"

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_outputs(self) -> int:
        """Outputs that the worker has to make, those of other routers included."""
        return max(self.reservations.total.num_outputs, self.load.num_running + self.load.num_waiting)

    @property
    def _computes_prompts(self) -> bool:
        """Whether the worker has prompts to compute, as far as this router knows: more than what waits to be sent."""
        return self.reservations.total.prefill_tokens > self._pack.num_tokens

    def may_hold(self, num_requests: int) -> bool:
        """Whether a group of this size may be submitted at all now."""
        held = len(self._live) + len(self._cancels)
        return self.state == "ready" and held + num_requests <= self._config.max_in_flight

    def submit(
        self, streams: Sequence[Stream], works: Sequence[Work], *, family: int, source: PrefixSource | None = None
    ) -> None:
        """Reserve each stream's work and send them, in one frame where it fits. Needs `may_hold`.

        `family` is equal for groups whose prompts begin alike: they are sent next to each other. `source`: who has more
        of the prompt than this worker.
        """
        assert self.may_hold(len(streams)), self.worker_id
        is_busy = self._computes_prompts
        submits = []
        for stream, work in zip(streams, works, strict=True):
            request_id = stream.request.request_id
            self._live[request_id] = stream
            self.reservations.reserve(request_id, work)
            submits.append(submit_to_proto(replace(stream.request, prefix_source=source)))
            stream.place(self.worker_id, self._series)
        budget = 0 if self.limits is None or not is_busy else self.limits.step_tokens
        self._pack.add(submits, num_tokens=sum(work.prefill_tokens for work in works), family=family, budget=budget)

    def hold(self, is_held: bool) -> None:
        """Give the worker no new work, or give it some again."""
        self.is_held = is_held
        self._changed()

    def pin(self, pin: Pin) -> None:
        """Have the worker compute a prefix and keep it."""
        if pin.pin_id in self._unpins:  # it has not been told, and keeps it
            self._unpins.remove(pin.pin_id)
            return
        self._pins.append(pin)
        self._outgoing.set()

    def unpin(self, pin_id: str) -> None:
        """Let the worker forget a prefix when it likes. One that is not connected has forgotten all."""
        if self.model is None:
            return
        num_pins = len(self._pins)
        self._pins = [pin for pin in self._pins if pin.pin_id != pin_id]
        if len(self._pins) == num_pins:  # else it was never told
            self._unpins.append(pin_id)
            self._outgoing.set()

    def warm_up(self) -> None:
        """Give the worker no work until `warmed`, or for too long."""
        assert self._warm_up is None, "warmed up twice"
        self._warm_up = asyncio.get_running_loop().call_later(self._config.warm_up_s, self.warmed)

    def warmed(self) -> None:
        """The worker has what it should have before it gets work, or has taken too long."""
        if self._warm_up is not None:
            self._warm_up.cancel()
            self._warm_up = None
            self._changed()

    def resync(self) -> None:
        """Have the worker tell its prefix cache's whole contents again."""
        self._wants_resync = True
        self._outgoing.set()

    def tell_queued(self, num_tokens: int) -> None:
        """Let the worker know how much waits here; it goes with the next frame, at a tick of the watchdog if none."""
        self._queued_tokens = num_tokens

    def cancel(self, stream: Stream) -> None:
        """Stop a request on the worker. Requests that it no longer holds are ignored."""
        request_id = stream.request.request_id
        if request_id not in self._live:
            return
        self._forget(request_id)
        self._send_cancel(request_id)
        self._changed()

    def pace(self, interval_s: float) -> None:
        """Have the worker leave this many seconds between two frames, as long as tokens can wait."""
        self._interval_s = interval_s
        if not self._told_s / PACE_SLACK <= interval_s <= self._told_s * PACE_SLACK:
            self._outgoing.set()

    def retire(self) -> None:
        """The worker left the membership: no new work; the session ends with its last request."""
        self._retiring = True
        self._changed()

    async def close(self) -> None:
        """End the session now; requests it holds end in WorkerLost."""
        self._leave.set()  # a TaskGroup that is failing already swallows a cancellation (before Python 3.13)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def add_closed_callback(self, callback: Callable[[], None]) -> None:
        """Call this when the session has ended for good."""
        self._task.add_done_callback(lambda _: callback())

    def check(self) -> None:
        """Raise what ended the session, if a fault of this program did, and state its invariants."""
        if self._task.done() and not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error
        self.reservations.check()
        assert self.reservations.num_open == len(self._live)

    # --- connection ---

    async def _run(self) -> None:
        delay_s = self._config.reconnect_first_s
        while not self._leave.is_set():
            greeted = False
            lost = SessionLost("closed", "the router closed the session")
            try:
                lost = await self._connection()
            except Exception:
                logger.exception("the session with worker %s failed; it gets no more work from here", self.worker_id)
                raise
            finally:
                greeted = self.model is not None
                self._lose(lost)
            delay_s = self._config.reconnect_first_s if greeted else min(2 * delay_s, self._config.reconnect_max_s)
            await self._pause(delay_s * random.uniform(0.5, 1.0))

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past retirement."""
        try:
            async with asyncio.timeout(seconds):
                await self._leave.wait()
        except TimeoutError:
            pass

    async def _connection(self) -> SessionLost:
        """Connect and serve the session until it is lost; the loss is the result."""
        try:
            async with self._channel() as channel:
                call = session_grpc.WorkerSessionStub(channel).Session(metadata=self._identity.metadata)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._write(call))
                    tasks.create_task(self._watch())
                    tasks.create_task(self._retirement())
                    await self._read(call)
        except ExceptionGroup as group:
            lost = _loss(group)
            self._explain(lost)
            return lost
        raise AssertionError("a session ends by being lost")

    def _channel(self) -> grpc.aio.Channel:
        certificates = self._identity.certificates
        if certificates is None:
            return grpc.aio.insecure_channel(self.address, options=self._channel_options())
        options = [*self._channel_options(), *channel_options(certificates)]
        return grpc.aio.secure_channel(self.address, channel_credentials(certificates), options=options)

    def _explain(self, lost: SessionLost) -> None:
        """Log why no session came up: said once, though it is tried again and again."""
        trouble = "" if self.model is not None or lost.reason == "retired" else grpc_reason(str(lost))
        if trouble and trouble != self._trouble:
            logger.error("no session with worker %s at %s: %s", self.worker_id, self.address, trouble)
        self._trouble = trouble

    def _channel_options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", -1),  # a frame is bounded by what this router asked for
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),  # a new attempt does not inherit the last one's backoff
        ]

    async def _read(self, call: _Call) -> None:
        while isinstance(frame := await call.read(), session_pb.WorkerFrame):
            self._num_heard += 1
            self._receive(frame)
        raise SessionLost("closed", "the worker closed the session")

    async def _write(self, call: _Call) -> None:
        while True:
            await self._outgoing.wait()
            self._outgoing.clear()
            frees_room = bool(self._cancels)
            for frame in self._take_frames():
                await call.write(frame)
            if frees_room:
                self._owner.changed()

    async def _watch(self) -> None:
        """Ends the connection after WATCHDOG_TICKS ticks in a row without a frame."""
        num_silent, num_heard = 0, self._num_heard
        while num_silent < WATCHDOG_TICKS:
            await asyncio.sleep(self._patience_s / WATCHDOG_TICKS)
            if self.model is not None and self._told_queued_tokens != self._queued_tokens:
                self._outgoing.set()
            num_silent = num_silent + 1 if self._num_heard == num_heard else 0
            num_heard = self._num_heard
        raise SessionLost("silent", f"nothing was heard for {self._patience_s:g} s")

    async def _retirement(self) -> None:
        await self._leave.wait()
        raise SessionLost("retired", "the worker left the cluster")

    @property
    def _patience_s(self) -> float:
        return self._config.connect_timeout_s if self.model is None else self._config.watchdog_s

    def _lose(self, lost: SessionLost) -> None:
        """Forget the connection; what it held goes back to the owner."""
        if self.model is not None and lost.reason != "retired":
            logger.warning("worker %s lost with %d requests: %s", self.worker_id, len(self._live), lost)
            self._metrics.worker_losses.labels(lost.reason).inc()
        streams = list(self._live.values())
        for stream in streams:
            self._forget(stream.request.request_id)
        self.model, self.limits, self.load, self.totals = None, None, Load(), None
        self._pack.clear()
        self._cancels.clear()
        self._wants_resync = False
        self._pins.clear()
        self._unpins.clear()
        if self._warm_up is not None:
            self._warm_up.cancel()
            self._warm_up = None
        self._told_s, self._told_queued_tokens = 0.0, 0  # a new connection begins with none
        self._outgoing.clear()
        self._owner.lost(self, streams, lost)
        self._changed()

    # --- frames ---

    def _take_frames(self) -> Iterator[session_pb.RouterFrame]:
        """All that waits to be sent, in as few frames as the size limit allows."""
        submits = [submit for submit in self._pack.take() if submit.request_id in self._live]  # else it ended unsent
        for submit in submits:
            self._live[submit.request_id].was_sent = True
        cancels, self._cancels = self._cancels, []
        frame = session_pb.RouterFrame(cancel=[session_pb.Cancel(request_id=request_id) for request_id in cancels])
        if self._told_s != self._interval_s:
            self._told_s = self._interval_s
            frame.interval_us = round(self._told_s * 1e6)
        if self._wants_resync:
            self._wants_resync, frame.resync = False, True
        frame.pin.extend(map(pin_to_proto, self._pins))
        frame.unpin.extend(self._unpins)
        self._pins, self._unpins = [], []
        if self._told_queued_tokens != self._queued_tokens:
            self._told_queued_tokens = frame.queued_tokens = self._queued_tokens
        frame_bytes = frame.ByteSize()
        for submit in submits:
            submit_bytes = submit.ByteSize()
            if frame.submit and frame_bytes + submit_bytes > self._config.max_frame_bytes:
                yield frame
                frame, frame_bytes = session_pb.RouterFrame(), 0
            frame.submit.append(submit)
            frame_bytes += submit_bytes
        if frame.ByteSize():
            yield frame

    def _receive(self, frame: session_pb.WorkerFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind != "hello" and self.model is None:
            raise SessionLost("protocol", "the worker spoke before its hello")
        if frame.HasField("kv_events"):
            self._owner.heard(self, kv_events_from_proto(frame.kv_events))
        match kind:
            case "hello":
                self._greet(frame.hello)
            case "step":
                self._set_load(frame.step.load)
                self._deliver(frame.step.deltas)
            case "heartbeat":
                self._set_load(frame.heartbeat.load)
                if frame.heartbeat.HasField("totals"):
                    self.totals = totals_from_proto(frame.heartbeat.totals)

    def _greet(self, hello: session_pb.WorkerHello) -> None:
        if self.model is not None:
            raise SessionLost("protocol", "the worker greeted twice")
        if hello.model != self._identity.model_name:
            logger.error("worker %s serves %r, this router %r", self.worker_id, hello.model, self._identity.model_name)
            raise SessionLost("protocol", f"it serves {hello.model!r} instead of {self._identity.model_name!r}")
        if not hello.max_context or not hello.vocab_size:
            raise SessionLost("protocol", "its hello lacks the model's limits")
        self.model = ModelInfo(hello.model, hello.max_context, hello.vocab_size)
        self.limits = WorkerLimits(hello.page_size, hello.max_running, hello.step_tokens, hello.fetches_prefixes)
        self.load = load_from_proto(hello.load)
        self.totals = totals_from_proto(hello.totals) if hello.HasField("totals") else None
        self.pace(self._interval_s)
        logger.info("worker %s at %s is connected", self.worker_id, self.address)
        self._owner.greeted(self)
        self._changed()

    def _set_load(self, load: session_pb.WorkerLoad) -> None:
        was_draining = self.load.draining
        self.load = load_from_proto(load)
        if self.load.draining != was_draining:
            self._changed()

    def _deliver(self, deltas: Iterable[session_pb.WorkerDelta]) -> None:
        num_live, prefill_tokens = len(self._live), self.reservations.total.prefill_tokens
        for message in deltas:
            stream = self._live.get(message.request_id)
            if stream is not None:  # else it was cancelled while the delta travelled
                self._deliver_to(stream, message)
        if len(self._live) != num_live or self.reservations.total.prefill_tokens != prefill_tokens:
            if not self._computes_prompts:
                self._pack.release()  # nothing is ahead of what waits here
            self._changed()

    def _deliver_to(self, stream: Stream, message: session_pb.WorkerDelta) -> None:
        try:
            delta = delta_from_proto(message)
            if isinstance(delta, Failure):
                self._forget(message.request_id)
                self._owner.failed(self, stream, failure_to_error(delta))
                return
            self.reservations.progress(delta.request_id, len(delta.token_ids))
            stream.deliver(delta)
        except HeadwaterError as error:
            stream.fail(error)
        if stream.ended:
            self._forget(message.request_id)
            if stream.error is not None:
                self._send_cancel(message.request_id)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self.reservations.release(request_id)

    def _send_cancel(self, request_id: str) -> None:
        if not self._pack.drop(request_id):  # else it had not been sent
            self._cancels.append(request_id)
            self._outgoing.set()

    def _changed(self) -> None:
        if self._retiring and not self._live:
            self._leave.set()
        self._owner.changed()


def _loss(group: ExceptionGroup[Exception]) -> SessionLost:
    """The loss behind what ended a connection's tasks. Faults of this program are raised on."""
    faults = group.split((SessionLost, grpc.aio.AioRpcError))[1]
    if faults is not None:
        raise faults
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return SessionLost("connection", f"{error.code().name}: {error.details()}")
    assert isinstance(error, SessionLost)
    return error
