"""One worker's session: a bidirectional stream that carries all of this router's requests to it.

Stands between admission, which submits, and the streams, which receive. Down come a hello, frames with what engine
steps made and heartbeats; up go packed groups, cancels and how often frames should come. A worker that closes, breaks
or falls silent is lost: every request it held ends in exactly one WorkerLost, and the session connects anew while the
worker is a member.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc

from protos.convert import delta_from_proto, failure_to_error, load_from_proto, submit_to_proto
from protos.errors import HeadwaterError, WorkerLost
from protos.messages import Failure, Load, ModelInfo
from protos.v1 import session_pb2 as session_pb
from protos.v1 import session_pb2_grpc as session_grpc
from router.config import SessionsSection
from router.metrics import RouterMetrics
from router.policy import Candidate
from router.reservations import Reservations
from router.stream import Stream

TOKEN_METADATA = "headwater-session-token"
ROUTER_METADATA = "headwater-router-id"
PACE_SLACK = 1.25  # an interval is told again when it has changed by this factor
WATCHDOG_TICKS = 4  # silence is counted in ticks of our own clock, so that a pause of this process is not the worker's

SessionState = Literal["connecting", "ready", "draining"]
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
    session_token: str
    model_name: str  # workers that serve another model are refused

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ((TOKEN_METADATA, self.session_token), (ROUTER_METADATA, self.router_id))


class Session:
    """The connection to one worker and the requests it holds. Owned by Fleet; touched on the event loop only.

    `on_change` is called when the worker became ready, was lost, changed its draining flag, or a request left it.
    """

    def __init__(
        self,
        worker_id: str,
        address: str,
        *,
        config: SessionsSection,
        identity: RouterIdentity,
        metrics: RouterMetrics,
        on_change: Callable[[], None],
    ) -> None:
        self.worker_id = worker_id
        self.address = address
        self.model: ModelInfo | None = None  # known while connected
        self.load = Load()
        self.reservations = Reservations()
        self._config = config
        self._identity = identity
        self._metrics = metrics
        self._series = metrics.worker(worker_id)
        self._on_change = on_change
        self._live: dict[str, Stream] = {}
        self._submits: list[session_pb.Submit] = []
        self._cancels: list[str] = []
        self._interval_s = 0.0  # wanted between two frames
        self._told_s = 0.0  # what the worker knows of it
        self._outgoing = asyncio.Event()
        self._retiring = False
        self._leave = asyncio.Event()
        self._num_heard = 0
        self._task = asyncio.create_task(self._run(), name=f"session {worker_id}")

    @property
    def state(self) -> SessionState:
        if self._retiring or self.load.draining:
            return "draining"
        return "connecting" if self.model is None else "ready"

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def candidate(self) -> Candidate:
        """What the policy may know of this worker."""
        return Candidate(self.worker_id, self.load, self.reservations.total)

    def has_room(self, num_requests: int) -> bool:
        """Whether a group of this size may be submitted now."""
        held = len(self._live) + len(self._cancels)
        return self.state == "ready" and held + num_requests <= self._config.max_in_flight

    def submit(self, streams: Sequence[Stream]) -> None:
        """Reserve the group's work and send it, in one frame where it fits. Needs `has_room`."""
        assert self.has_room(len(streams)), self.worker_id
        for stream in streams:
            request_id = stream.request.request_id
            self._live[request_id] = stream
            self.reservations.reserve(request_id, stream.work)
            self._submits.append(submit_to_proto(stream.request))
            stream.place(self.worker_id, self._series)
        self._outgoing.set()

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
        assert self.reservations.total.num_outputs == sum(s.request.sampling.n for s in self._live.values())

    # --- connection ---

    async def _run(self) -> None:
        delay_s = self._config.reconnect_first_s
        while not self._leave.is_set():
            greeted = False
            lost = SessionLost("closed", "the router closed the session")
            try:
                lost = await self._connection()
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
            async with grpc.aio.insecure_channel(self.address, options=self._channel_options()) as channel:
                call = session_grpc.WorkerSessionStub(channel).Session(metadata=self._identity.metadata)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._write(call))
                    tasks.create_task(self._watch())
                    tasks.create_task(self._retirement())
                    await self._read(call)
        except ExceptionGroup as group:
            return _loss(group)
        raise AssertionError("a session ends by being lost")

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
                self._on_change()

    async def _watch(self) -> None:
        """Ends the connection after WATCHDOG_TICKS ticks in a row without a frame."""
        num_silent, num_heard = 0, self._num_heard
        while num_silent < WATCHDOG_TICKS:
            await asyncio.sleep(self._patience_s / WATCHDOG_TICKS)
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
        """Forget the connection; every request it held ends here."""
        if self.model is not None and lost.reason != "retired":
            logger.warning("worker %s lost with %d requests: %s", self.worker_id, len(self._live), lost)
            self._metrics.worker_losses.labels(lost.reason).inc()
        streams = list(self._live.values())
        for stream in streams:
            self._forget(stream.request.request_id)
            stream.fail(WorkerLost(f"worker {self.worker_id} was lost ({lost}); send the request again"))
        self.model, self.load = None, Load()
        self._submits.clear()
        self._cancels.clear()
        self._told_s = 0.0  # a new connection begins with none
        self._outgoing.clear()
        self._changed()

    # --- frames ---

    def _take_frames(self) -> Iterator[session_pb.RouterFrame]:
        """All that waits to be sent, in as few frames as the size limit allows."""
        submits, self._submits = self._submits, []
        cancels, self._cancels = self._cancels, []
        frame = session_pb.RouterFrame(cancel=[session_pb.Cancel(request_id=request_id) for request_id in cancels])
        if self._told_s != self._interval_s:
            self._told_s = self._interval_s
            frame.interval_us = round(self._told_s * 1e6)
        frame_bytes = frame.ByteSize()
        for submit in submits:
            submit_bytes = submit.ByteSize()
            if frame.submit and frame_bytes + submit_bytes > self._config.max_frame_bytes:
                yield frame
                frame, frame_bytes = session_pb.RouterFrame(), 0
            frame.submit.append(submit)
            frame_bytes += submit_bytes
        if frame.submit or frame.cancel or frame.HasField("interval_us"):
            yield frame

    def _receive(self, frame: session_pb.WorkerFrame) -> None:
        match frame.WhichOneof("frame"):
            case "hello":
                self._greet(frame.hello)
            case _ if self.model is None:
                raise SessionLost("protocol", "the worker spoke before its hello")
            case "step":
                self._set_load(frame.step.load)
                self._deliver(frame.step.deltas)
            case "heartbeat":
                self._set_load(frame.heartbeat.load)

    def _greet(self, hello: session_pb.WorkerHello) -> None:
        if hello.model != self._identity.model_name:
            logger.error("worker %s serves %r, this router %r", self.worker_id, hello.model, self._identity.model_name)
            raise SessionLost("protocol", f"it serves {hello.model!r} instead of {self._identity.model_name!r}")
        self.model = ModelInfo(hello.model, hello.max_context, hello.vocab_size)
        self.load = load_from_proto(hello.load)
        self.pace(self._interval_s)
        logger.info("worker %s at %s is connected", self.worker_id, self.address)
        self._changed()

    def _set_load(self, load: session_pb.WorkerLoad) -> None:
        was_draining = self.load.draining
        self.load = load_from_proto(load)
        if self.load.draining != was_draining:
            self._changed()

    def _deliver(self, deltas: Iterable[session_pb.WorkerDelta]) -> None:
        num_live = len(self._live)
        for message in deltas:
            stream = self._live.get(message.request_id)
            if stream is not None:  # else it was cancelled while the delta travelled
                self._deliver_to(stream, message)
        if len(self._live) != num_live:
            self._changed()

    def _deliver_to(self, stream: Stream, message: session_pb.WorkerDelta) -> None:
        ended_by_worker = message.HasField("error")
        try:
            delta = delta_from_proto(message)
            if isinstance(delta, Failure):
                stream.fail(failure_to_error(delta))
            else:
                self.reservations.progress(delta.request_id, len(delta.token_ids))
                stream.deliver(delta)
        except HeadwaterError as error:
            stream.fail(error)
        if stream.ended:
            self._forget(message.request_id)
            if stream.error is not None and not ended_by_worker:
                self._send_cancel(message.request_id)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self.reservations.release(request_id)

    def _send_cancel(self, request_id: str) -> None:
        num_submits = len(self._submits)
        self._submits = [submit for submit in self._submits if submit.request_id != request_id]
        if len(self._submits) == num_submits:  # else it had not been sent
            self._cancels.append(request_id)
            self._outgoing.set()

    def _changed(self) -> None:
        if self._retiring and not self._live:
            self._leave.set()
        self._on_change()


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
