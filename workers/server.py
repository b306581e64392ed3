"""The worker's session server: routers connect here, and an engine stands behind it.

One bidirectional gRPC stream per router carries submits and cancels up, and at most one frame per engine step down. A
session that ends cancels what it had submitted.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc
from tokenizers import Tokenizer

from protos import convert
from protos.errors import EngineFailure, HeadwaterError, ModelError, SetupError, Unauthenticated, trailers
from protos.messages import Delta, EngineTotals, Failure, Pin, PrefixSource, Request
from protos.tls import Certificates, PeerTLS, server_credentials
from protos.tracing import Tracer, Tracing
from protos.v1 import session_pb2 as pb
from protos.v1 import session_pb2_grpc as rpc
from protos.v1 import totals_pb2
from workers.config import ExchangeSection, WorkerConfig
from workers.engine.factory import make_engine
from workers.engine.protocol import Engine
from workers.exchange import Exchange, Puller
from workers.exports import Exports
from workers.kv.arena import Arena, ArenaUnusable
from workers.kv.block import BlockFormat
from workers.loop import EngineLoop, Frame
from workers.metrics import MetricsServer, WorkerMetrics
from workers.peers import TOKEN_KEY, Peers
from workers.priority import give_way
from workers.speculative.pool.members import Members, PoolAccess
from workers.speculative.stats import SpeculationStats
from workers.usage import Usage
from workers.waiting import Waiting

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DRAIN_POLL_S = 0.02
STOP_GRACE_S = 0.5
TOTALS_S = 1.0  # between two tellings of the engine's totals
# A router that is cut off or whose machine has died closes no connection, and TCP tries to reach it for a quarter of an
# hour. Pings find it within ten seconds; its session ends then, which frees what it had submitted.
KEEPALIVE: Final = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it a ping's answer has a minute, whatever the line above says
)


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker's two servers listen, as host:port."""

    session: str
    metrics: str


class WorkerServer:
    """One worker: engine, session server and metrics endpoint. Lives on one event loop."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        worker_id: str,
        session_token: str,
        tls: PeerTLS | None = None,
        local_rank: int = 0,
        threads: int = 1,
        puller: Puller | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`tls`: of sessions and of channels to drafters and other workers; None: plain text. `tracing`: None: off.

        `puller`: the way to prefixes of workers that share no memory with this one.
        """
        self._config = config
        self._worker_id = worker_id
        self._token = session_token
        self._tls = tls
        self._local_rank = local_rank
        self._threads = threads
        self._puller = puller
        self._tracing = tracing
        self._exchange: Exchange | None = None  # until started, or for good
        self._exports: Exports | None = None  # until started
        self._num_fetching = 0  # requests and pins that wait for a prefix
        self._sessions: dict[int, asyncio.Queue[pb.WorkerFrame | None]] = {}
        self._queued_tokens: dict[int, int] = {}  # by session
        self._num_sessions = 0
        self._first_tokens = (0, 0.0)  # when usage was last asked
        self._loop: EngineLoop | None = None  # until started
        self._made = time.monotonic()
        self._telling: asyncio.Task[None] | None = None  # until started
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
        tracer = Tracer(self._tracing, role="worker", instance=self._worker_id)
        exits.push_async_callback(asyncio.to_thread, tracer.close)
        engine = await self._make_engine()
        exits.callback(engine.close)
        self._model, self._limits = engine.model, engine.limits
        self._metrics = metrics
        event_loop = asyncio.get_running_loop()

        def deliver(frames: list[Frame]) -> None:
            event_loop.call_soon_threadsafe(self._deliver, frames)

        loop = EngineLoop(
            engine,
            _load_tokenizer(config),
            metrics,
            deliver=deliver,
            stall_s=config.engine.stall_s,
            niceness=config.engine.niceness,
            tracer=tracer,
        )
        metrics.watch(lambda: loop.load, lambda: loop.stats)
        port = config.metrics.port + self._local_rank if config.metrics.port else 0
        scrape = MetricsServer(metrics.registry, host=config.metrics.host, port=port)
        exits.push_async_callback(asyncio.to_thread, scrape.stop)
        loop.start()
        exits.push_async_callback(asyncio.to_thread, loop.stop)
        self._loop = loop
        await self._start_exchange(loop, engine.block_format, metrics, exits)
        self._telling = asyncio.create_task(self._tell_totals(), name="totals")
        exits.push_async_callback(_end, self._telling)
        server, session_port = await self._listen(config.session.host)
        exits.push_async_callback(server.stop, STOP_GRACE_S)
        return WorkerAddress(f"{config.session.host}:{session_port}", scrape.address)

    async def _make_engine(self) -> Engine:
        """On a thread whose priority the engine's own threads inherit."""
        config, niceness = self._config, self._config.engine.niceness
        pool = PoolAccess(self._drafters, self._token, self._tls)
        with ThreadPoolExecutor(1, "engine maker", initializer=give_way, initargs=(niceness,)) as maker:
            make = partial(make_engine, config, threads=self._threads, pool=pool)
            return await asyncio.get_running_loop().run_in_executor(maker, make)

    async def _start_exchange(
        self, loop: EngineLoop, block_format: BlockFormat | None, metrics: WorkerMetrics, exits: AsyncExitStack
    ) -> None:
        config, arena = self._config.engine.kv.exchange, None
        if block_format is not None:
            arena = await asyncio.to_thread(_open_arena, config)
        if arena is not None:
            exits.push_async_callback(asyncio.to_thread, arena.close)
            metrics.watch_arena(lambda: arena.num_bytes)
        self._exports = Exports(loop, block_format, arena, metrics)
        exits.push_async_callback(self._exports.close)
        if block_format is None:
            return
        peers = Peers(self._token, self._tls)
        exits.push_async_callback(peers.close)
        self._exchange = Exchange(
            loop,
            block_format,
            peers,
            metrics,
            worker_id=self._worker_id,
            config=config,
            arena=arena,
            puller=self._puller,
        )
        exits.push_async_callback(self._exchange.close)

    def packed_prefix(self, salt: str, token_ids: Sequence[int], *, timeout_s: float) -> memoryview | None:
        """For pullers: the packed block of what the engine has of a prompt. Waits; from any thread but the loop's."""
        return self._exports.packed(salt, token_ids, timeout_s=timeout_s) if self._exports is not None else None

    async def export_prefix(self, request: pb.ExportPrefixRequest) -> pb.ExportPrefixResponse:
        """See WorkerSession.ExportPrefix."""
        assert self._exports is not None, "not started"
        return await self._exports.answer(request)

    def set_drafters(self, addresses: Mapping[str, str]) -> None:
        """There are these drafters now: id to address. Safe from any thread."""
        self._drafters.set(addresses)

    def check(self) -> None:
        """Raises EngineFailure if the engine is broken or hangs, and what has ended a task that should go on."""
        if self._loop is not None:
            self._loop.check()
        if self._telling is not None and self._telling.done() and not self._telling.cancelled():
            self._telling.result()

    @property
    def queued_tokens(self) -> int:
        """Token-work that waits at the routers for any worker, as they last said."""
        return sum(self._queued_tokens.values())

    def usage(self) -> Usage:
        """What there is to do now, and the mean time to first token since this was last asked."""
        load, (num_before, seconds_before) = self._engine.load, self._first_tokens
        num_requests, seconds = self._first_tokens = self._metrics.first_tokens
        num_new = num_requests - num_before
        return Usage(
            self.queued_tokens,
            load.pending_prefill_tokens,
            load.kv_used_tokens / max(load.kv_capacity_tokens, 1),
            load.num_running,
            self._limits.max_running,
            (seconds - seconds_before) / num_new if num_new else 0.0,
        )

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for live ones; False if some are left after `timeout_s`."""
        if self._loop is None:
            return True
        self._loop.drain()
        for queue in self._sessions.values():
            queue.put_nowait(self._heartbeat())
        try:
            async with asyncio.timeout(timeout_s):
                while self._loop.num_live or self._num_fetching:  # noqa: ASYNC110 - the engine's thread has no event to await
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
        self._engine.open(session)
        reader = asyncio.create_task(self._read(session, frames, queue))
        try:
            yield pb.WorkerFrame(hello=self._hello())
            while (frame := await self._next_frame(queue)) is not None:
                yield frame
        finally:
            self._sessions.pop(session, None)
            self._engine.close(session)
            reader.cancel()
            [ending] = await asyncio.gather(reader, return_exceptions=True)
            if isinstance(ending, Exception):
                log.error("a router's frames could not be read", exc_info=ending)
            self._queued_tokens.pop(session, None)

    async def _listen(self, host: str) -> tuple[grpc.aio.Server, int]:
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            *KEEPALIVE,
        ]
        server = grpc.aio.server(options=options)
        rpc.add_WorkerSessionServicer_to_server(_Servicer(self, self._token), server)
        try:
            port = _add_port(server, f"{host}:0", self._tls)
        except RuntimeError as error:
            raise SetupError(f"cannot listen on {host}: {error}; set worker.session.host") from error
        await server.start()
        return server, port

    async def _read(
        self, session: int, frames: AsyncIterator[pb.RouterFrame], queue: asyncio.Queue[pb.WorkerFrame | None]
    ) -> None:
        """Hand a router's work to the engine; the session ends when the router says no more."""
        waiting = Waiting()
        try:
            async for frame in frames:
                for submit in frame.submit:
                    self._submit(session, convert.submit_from_proto(submit), waiting)
                for cancel in frame.cancel:
                    waiting.cancel(("request", cancel.request_id))
                    self._engine.cancel(session, cancel.request_id)
                for pin in frame.pin:
                    self._pin(session, convert.pin_from_proto(pin), waiting)
                for pin_id in frame.unpin:
                    waiting.cancel(("pin", pin_id))
                    self._engine.unpin(session, pin_id)
                if frame.HasField("interval_us"):
                    self._engine.pace(session, frame.interval_us / 1e6)
                if frame.resync:
                    self._engine.resync(session)
                if frame.HasField("queued_tokens"):
                    self._queued_tokens[session] = frame.queued_tokens
        finally:
            queue.put_nowait(None)
            await waiting.close()

    def _submit(self, session: int, request: Request, waiting: Waiting) -> None:
        """Hand a request to the engine; one whose prefix another worker has, when that is here or does not come."""
        if self._exchange is None or request.prefix_source is None:
            self._engine.submit(session, request)
            return
        fetch = partial(self._fetch, request.cache_salt, request.token_ids, request.prefix_source)
        waiting.after(fetch, lambda: self._engine.submit(session, request), ("request", request.request_id))

    def _pin(self, session: int, pin: Pin, waiting: Waiting) -> None:
        if self._exchange is None or pin.prefix_source is None:
            self._engine.pin(session, pin)
            return
        fetch = partial(self._fetch, pin.cache_salt, pin.token_ids, pin.prefix_source)
        waiting.after(fetch, lambda: self._engine.pin(session, pin), ("pin", pin.pin_id))

    async def _fetch(self, salt: str, token_ids: Sequence[int], source: PrefixSource) -> None:
        assert self._exchange is not None
        self._num_fetching += 1
        try:
            await self._exchange.fetch(salt, token_ids, source)
        finally:
            self._num_fetching -= 1

    async def _next_frame(self, queue: asyncio.Queue[pb.WorkerFrame | None]) -> pb.WorkerFrame | None:
        """The next frame, or a heartbeat after silence; None when the session must end."""
        try:
            async with asyncio.timeout(self._config.session.heartbeat_s):
                return await queue.get()
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
        self._engine.close(frame.session)
        queue.put_nowait(None)

    async def _tell_totals(self) -> None:
        """Let every router know the engine's totals, once a second and not with every frame."""
        while True:
            await asyncio.sleep(TOTALS_S)
            try:
                self._engine.check()
            except EngineFailure:
                continue  # a worker whose engine hangs falls silent
            frame = self._heartbeat()
            frame.heartbeat.totals.CopyFrom(self._totals())
            for queue in self._sessions.values():
                if queue.qsize() < self._config.session.max_queued_frames:
                    queue.put_nowait(frame)

    def _totals(self) -> totals_pb2.EngineTotals:
        stats, (num_steps, num_step_outputs) = self._engine.stats, self._metrics.steps
        speculation = stats.speculation or SpeculationStats()
        totals = EngineTotals(
            seconds=time.monotonic() - self._made,
            num_steps=num_steps,
            num_step_outputs=num_step_outputs,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generation_tokens,
            prefix_queries_tokens=stats.prefix_queries_tokens,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            attention_keys=stats.attention_keys,
            attention_read_keys=stats.attention_read_keys,
            budget_tokens=stats.budget_tokens,
            budget_used_tokens=stats.budget_used_tokens,
            drafted_tokens=speculation.drafted_tokens,
            accepted_tokens=speculation.accepted_tokens,
        )
        return convert.totals_to_proto(totals)

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
            max_running=self._limits.max_running,
            step_tokens=self._limits.step_tokens,
            fetches_prefixes=self._exchange is not None,
            totals=self._totals(),
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

    async def ExportPrefix(  # noqa: N802
        self,
        request: pb.ExportPrefixRequest,
        context: grpc.aio.ServicerContext[pb.ExportPrefixRequest, pb.ExportPrefixResponse],
    ) -> pb.ExportPrefixResponse:
        """See WorkerSession.ExportPrefix."""
        try:
            self._authenticate(context)
            return await self._worker.export_prefix(request)
        except HeadwaterError as error:
            await context.abort(error.status, error.message, trailers(error))

    def _authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        given = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
        if not hmac.compare_digest(str(given), self._token):
            raise Unauthenticated("the session token is missing or wrong; routers and workers must share one")


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel it; raises what had ended it before."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _open_arena(config: ExchangeSection) -> Arena | None:
    """This worker's part of the arena; None, said once, where there can be none."""
    try:
        return Arena.open(config.directory, max_bytes=config.max_bytes)
    except ArenaUnusable as error:
        log.warning(
            "no prefixes through shared memory: %s; set worker.engine.kv.exchange.directory or max_bytes", error.reason
        )
        return None


def _add_port(server: grpc.aio.Server, address: str, tls: PeerTLS | None) -> int:
    """The port's number. Raises SetupError for certificates that cannot be used, RuntimeError for the address."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, server_credentials(Certificates.of_peer(tls)))


def _load_tokenizer(config: WorkerConfig) -> Tokenizer:
    file = config.model.path / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file}: {error}; the model directory needs a tokenizer.json") from error


def _to_proto(frame: Frame) -> pb.WorkerFrame:
    deltas = [_delta_to_proto(delta) for delta in frame.deltas]
    step = pb.StepFrame(step=frame.step, deltas=deltas, load=convert.load_to_proto(frame.load))
    return pb.WorkerFrame(step=step, kv_events=frame.kv_events and convert.kv_events_to_proto(frame.kv_events))


def _delta_to_proto(delta: Delta | Failure) -> pb.WorkerDelta:
    return convert.delta_to_proto(delta) if isinstance(delta, Delta) else convert.failure_to_proto(delta)
