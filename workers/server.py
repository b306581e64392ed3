"""The worker's session server: routers connect here, and an engine stands behind it.

One bidirectional gRPC stream per router carries submits and cancels up, and at most one frame per engine step down. A
session that ends cancels what it had submitted.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

import grpc
from tokenizers import Tokenizer

from protos import convert
from protos.errors import EngineFailure, HeadwaterError, ModelError, SetupError, Unauthenticated, trailers
from protos.messages import Delta, Failure
from protos.v1 import session_pb2 as pb
from protos.v1 import session_pb2_grpc as rpc
from workers.config import WorkerConfig
from workers.engine.factory import make_engine
from workers.loop import EngineLoop, Frame
from workers.metrics import MetricsServer, WorkerMetrics
from workers.speculative.pool.members import Members, PoolAccess

log = logging.getLogger(__name__)

TOKEN_KEY = "headwater-session-token"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DRAIN_POLL_S = 0.02
STOP_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker's two servers listen, as host:port."""

    session: str
    metrics: str


class WorkerServer:
    """One worker: engine, session server and metrics endpoint. Lives on one event loop."""

    def __init__(
        self, config: WorkerConfig, *, worker_id: str, session_token: str, local_rank: int = 0, threads: int = 1
    ) -> None:
        self._config = config
        self._worker_id = worker_id
        self._token = session_token
        self._local_rank = local_rank
        self._threads = threads
        self._sessions: dict[int, asyncio.Queue[pb.WorkerFrame | None]] = {}
        self._num_sessions = 0
        self._loop: EngineLoop | None = None  # until started
        self._drafters = Members()
        self._exits = AsyncExitStack()

    @property
    def _engine(self) -> EngineLoop:
        assert self._loop is not None, "not started"
        return self._loop

    async def start(self) -> WorkerAddress:
        """Load the model, start the engine and listen. Raises SetupError, and then nothing is left behind."""
        async with AsyncExitStack() as exits:
            address = await self._start(exits)
            self._exits = exits.pop_all()
        return address

    async def _start(self, exits: AsyncExitStack) -> WorkerAddress:
        config = self._config
        metrics = WorkerMetrics(model_name=config.model.served_name, worker_id=self._worker_id)
        engine = await asyncio.to_thread(
            make_engine, config, threads=self._threads, pool=PoolAccess(self._drafters, self._token)
        )
        exits.callback(engine.close)
        self._model = engine.model
        event_loop = asyncio.get_running_loop()

        def deliver(frames: list[Frame]) -> None:
            event_loop.call_soon_threadsafe(self._deliver, frames)

        loop = EngineLoop(engine, _load_tokenizer(config), metrics, deliver=deliver, stall_s=config.engine.stall_s)
        metrics.watch(lambda: loop.load, lambda: loop.stats)
        port = config.metrics.port + self._local_rank if config.metrics.port else 0
        scrape = MetricsServer(metrics.registry, host=config.metrics.host, port=port)
        exits.push_async_callback(asyncio.to_thread, scrape.stop)
        loop.start()
        exits.push_async_callback(asyncio.to_thread, loop.stop)
        self._loop = loop
        server, session_port = await self._listen(config.session.host)
        exits.push_async_callback(server.stop, STOP_GRACE_S)
        return WorkerAddress(f"{config.session.host}:{session_port}", scrape.address)

    def set_drafters(self, addresses: Mapping[str, str]) -> None:
        """There are these drafters now: id to address. Safe from any thread."""
        self._drafters.set(addresses)

    def check(self) -> None:
        """Raises EngineFailure if the engine is broken or hangs."""
        if self._loop is not None:
            self._loop.check()

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for live ones; False if some are left after `timeout_s`."""
        if self._loop is None:
            return True
        self._loop.drain()
        for queue in self._sessions.values():
            queue.put_nowait(self._heartbeat())
        try:
            async with asyncio.timeout(timeout_s):
                while self._loop.num_live:  # noqa: ASYNC110 - the engine's thread has no event to await
                    await asyncio.sleep(DRAIN_POLL_S)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End every session, then the engine. Idempotent."""
        for queue in self._sessions.values():
            queue.put_nowait(None)
        await self._exits.aclose()

    async def session(self, frames: AsyncIterator[pb.RouterFrame]) -> AsyncGenerator[pb.WorkerFrame, None]:
        """Serve one router: its work goes to the engine, the engine's frames and heartbeats come out."""
        self._num_sessions += 1
        session = self._num_sessions
        queue = self._sessions[session] = asyncio.Queue()
        reader = asyncio.create_task(self._read(session, frames, queue))
        try:
            yield pb.WorkerFrame(hello=self._hello())
            while (frame := await self._next_frame(queue)) is not None:
                yield frame
        finally:
            self._sessions.pop(session, None)
            self._engine.cancel(session)
            reader.cancel()
            [ending] = await asyncio.gather(reader, return_exceptions=True)
            if isinstance(ending, Exception):
                log.error("a router's frames could not be read", exc_info=ending)

    async def _listen(self, host: str) -> tuple[grpc.aio.Server, int]:
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ]
        server = grpc.aio.server(options=options)
        rpc.add_WorkerSessionServicer_to_server(_Servicer(self, self._token), server)
        try:
            port = server.add_insecure_port(f"{host}:0")
        except RuntimeError as error:
            raise SetupError(f"cannot listen on {host}: {error}; set worker.session.host") from error
        await server.start()
        return server, port

    async def _read(
        self, session: int, frames: AsyncIterator[pb.RouterFrame], queue: asyncio.Queue[pb.WorkerFrame | None]
    ) -> None:
        """Hand a router's work to the engine; the session ends when the router says no more."""
        try:
            async for frame in frames:
                for submit in frame.submit:
                    self._engine.submit(session, convert.submit_from_proto(submit))
                for cancel in frame.cancel:
                    self._engine.cancel(session, cancel.request_id)
                if frame.HasField("interval_us"):
                    self._engine.pace(session, frame.interval_us / 1e6)
        finally:
            queue.put_nowait(None)

    async def _next_frame(self, queue: asyncio.Queue[pb.WorkerFrame | None]) -> pb.WorkerFrame | None:
        """The next frame, or a heartbeat after silence; None when the session must end."""
        try:
            return await asyncio.wait_for(queue.get(), self._config.session.heartbeat_s)
        except TimeoutError:
            self._engine.check()  # a worker whose engine hangs falls silent
            return self._heartbeat()

    def _deliver(self, frames: list[Frame]) -> None:
        for frame in frames:
            if queue := self._sessions.get(frame.session):
                self._queue(frame, queue)

    def _queue(self, frame: Frame, queue: asyncio.Queue[pb.WorkerFrame | None]) -> None:
        """Queue a frame; a router that leaves too many unread loses its session and its requests at once."""
        if queue.qsize() < self._config.session.max_queued_frames:
            queue.put_nowait(_to_proto(frame))
            return
        log.warning("a router reads too slowly: %d frames wait; its session ends", queue.qsize())
        del self._sessions[frame.session]
        self._engine.cancel(frame.session)
        queue.put_nowait(None)

    def _heartbeat(self) -> pb.WorkerFrame:
        return pb.WorkerFrame(heartbeat=pb.Heartbeat(load=convert.load_to_proto(self._engine.load)))

    def _hello(self) -> pb.WorkerHello:
        stats = self._engine.stats
        return pb.WorkerHello(
            worker_id=self._worker_id,
            model=self._model.name,
            max_context=self._model.max_context,
            vocab_size=self._model.vocab_size,
            page_size=stats.page_size,
            kv_capacity_tokens=stats.kv_total_pages * stats.page_size,
            load=convert.load_to_proto(self._engine.load),
        )


class _Servicer(rpc.WorkerSessionServicer):
    """Checks the caller's token, then hands the stream to the worker."""

    def __init__(self, worker: WorkerServer, token: str) -> None:
        self._worker, self._token = worker, token

    async def Session(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.RouterFrame],
        context: grpc.aio.ServicerContext[pb.RouterFrame, pb.WorkerFrame],
    ) -> AsyncIterator[pb.WorkerFrame]:
        """See WorkerSession.Session."""
        try:
            self._authenticate(context)
            async with aclosing(self._worker.session(request_iterator)) as frames:
                async for frame in frames:
                    yield frame
        except HeadwaterError as error:
            await context.abort(error.status, error.message, trailers(error))
        except Exception as error:
            log.exception("a session failed")
            failure = EngineFailure(f"the session failed: {error}")
            await context.abort(failure.status, failure.message, trailers(failure))

    def _authenticate(self, context: grpc.aio.ServicerContext[pb.RouterFrame, pb.WorkerFrame]) -> None:
        given = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
        if not hmac.compare_digest(str(given), self._token):
            raise Unauthenticated("the session token is missing or wrong; routers and workers must share one")


def _load_tokenizer(config: WorkerConfig) -> Tokenizer:
    file = config.model.path / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file}: {error}; the model directory needs a tokenizer.json") from error


def _to_proto(frame: Frame) -> pb.WorkerFrame:
    deltas = [_delta_to_proto(delta) for delta in frame.deltas]
    return pb.WorkerFrame(step=pb.StepFrame(step=frame.step, deltas=deltas, load=convert.load_to_proto(frame.load)))


def _delta_to_proto(delta: Delta | Failure) -> pb.WorkerDelta:
    return convert.delta_to_proto(delta) if isinstance(delta, Delta) else convert.failure_to_proto(delta)
