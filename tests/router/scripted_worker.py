"""A worker that does what a test tells it: real gRPC, real session protocol, no engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc

from protos.convert import (
    delta_to_proto,
    failure_to_proto,
    kv_events_to_proto,
    load_to_proto,
    pin_from_proto,
    submit_from_proto,
)
from protos.messages import Delta, Failure, Finish, KVEvents, Load, Pin, PositionLogprobs, Request
from protos.tls import Certificates, server_credentials
from protos.v1 import session_pb2 as session_pb

HEARTBEAT_S = 0.05
SERVICE = session_pb.DESCRIPTOR.services_by_name["WorkerSession"].full_name
Frame = session_pb.WorkerFrame | bytes  # bytes go as they are
Emit = Callable[[Delta | Failure], None]
Script = Callable[[Request, Emit], Awaitable[None]]


def token(index: int, position: int) -> int:
    """What every script generates at a position of an output."""
    return 10 + (index * 7 + position) % 80


def deltas(request: Request, num_tokens: int, *, finish: bool = True) -> Iterable[Delta]:
    """One token a delta, outputs interleaved, the last delta of each with its finish; after what was resumed."""
    resumed = {point.index: point for point in request.resume}
    for position in range(num_tokens):
        last = finish and position == num_tokens - 1
        for index in range(request.sampling.n):
            point = resumed.get(index)
            num_made = 0 if point is None else len(point.token_ids)
            if position >= num_made and not (point is not None and point.finished):
                yield Delta(
                    request_id=request.request_id,
                    index=index,
                    text=f"t{token(index, position)} ",
                    token_ids=(token(index, position),),
                    finish=Finish("length") if last else None,
                    cached_tokens=3 if position == num_made else None,
                )


def answer(num_tokens: int, *, delay_s: float = 0.0) -> Script:
    """Generates `num_tokens`, or max_tokens if that is less; scores requests that generate nothing."""

    async def script(request: Request, emit: Emit) -> None:
        if request.sampling.max_tokens == 0:
            emit(scored(request))
            return
        for delta in deltas(request, min(num_tokens, request.sampling.max_tokens)):
            await asyncio.sleep(delay_s)
            emit(delta)

    return script


def scored(request: Request) -> Delta:
    """Log-probability -0.5 for each prompt token asked for."""
    positions = tuple(
        PositionLogprobs(token_id, -0.5) for token_id in request.token_ids[request.prompt_logprobs_from :]
    )
    return Delta(request.request_id, 0, "", (), finish=Finish("length"), cached_tokens=2, prompt_logprobs=positions)


def hang(num_tokens: int = 0) -> Script:
    """Generates `num_tokens` and then nothing, for ever."""

    async def script(request: Request, emit: Emit) -> None:
        for delta in deltas(request, num_tokens, finish=False):
            emit(delta)
        await asyncio.Event().wait()

    return script


def refuse(kind: str, message: str) -> Script:
    """Fails every request."""

    async def script(request: Request, emit: Emit) -> None:
        emit(Failure(request.request_id, kind, message))

    return script


class ScriptedWorker:
    """Serves one session protocol. A test starts, scripts, silences, kills and stops it."""

    def __init__(
        self,
        worker_id: str,
        script: Script,
        *,
        model: str = "tiny",
        max_context: int = 64,
        vocab_size: int = 100,
        page_size: int = 4,
        max_running: int = 0,
        step_tokens: int = 0,
        port: int = 0,
        certificates: Certificates | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._certificates = certificates
        self.script = script
        self.load = Load(kv_capacity_tokens=1024)
        self.submitted: list[Request] = []
        self.frame_sizes: list[int] = []  # requests per frame
        self.frames: list[tuple[str, ...]] = []  # request ids, frame by frame
        self.cancelled: list[str] = []
        self.pins: list[Pin] = []
        self.unpins: list[str] = []
        self.num_resyncs = 0
        self.queued_tokens = 0  # as last told
        self.cache: list[int] | None = None  # what a session's first snapshot tells; None: no snapshot
        self.sequence = 0  # of the last message with KV events
        self.interval_us: int | None = None  # as last told
        self.metadata: dict[str, str | bytes] = {}
        self.num_sessions = 0
        self.silent = False
        self._hello = session_pb.WorkerHello(
            worker_id=worker_id,
            model=model,
            max_context=max_context,
            vocab_size=vocab_size,
            page_size=page_size,
            max_running=max_running,
            step_tokens=step_tokens,
        )
        self._port = port
        self._server: grpc.aio.Server | None = None
        self._out: set[asyncio.Queue[Frame]] = set()

    async def start(self) -> str:
        """The address."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(
            self._session, session_pb.RouterFrame.FromString, response_serializer=_to_bytes
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Session": handler}),))
        address = f"127.0.0.1:{self._port}"
        if self._certificates is None:
            self._port = self._server.add_insecure_port(address)
        else:
            self._port = self._server.add_secure_port(address, server_credentials(self._certificates))
        await self._server.start()
        return f"127.0.0.1:{self._port}"

    async def kill(self) -> None:
        """Cut every connection at once."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    def set_load(self, load: Load) -> None:
        self.load = load
        self._broadcast(self._heartbeat())

    def tell(self, events: KVEvents) -> None:
        """Say something about the prefix cache to every router."""
        self.send(session_pb.WorkerFrame(kv_events=kv_events_to_proto(events)))

    def store(self, names: Iterable[int]) -> None:
        """Have more blocks, and tell it as the next message."""
        self.sequence += 1
        self.tell(KVEvents(self.sequence, tuple(names)))

    def send(self, frame: Frame) -> None:
        """Send a frame to every router."""
        self._broadcast(frame)

    async def _session(self, request_iterator: AsyncIterator[session_pb.RouterFrame], context: Any) -> None:
        self.num_sessions += 1
        self.metadata = dict(context.invocation_metadata() or ())
        out: asyncio.Queue[Frame] = asyncio.Queue()
        out.put_nowait(session_pb.WorkerFrame(hello=self._hello))
        if self.cache is not None:
            self.sequence = 1
            snapshot = kv_events_to_proto(KVEvents(1, tuple(self.cache), snapshot=True))
            out.put_nowait(session_pb.WorkerFrame(kv_events=snapshot))
        self._out.add(out)
        tasks = [asyncio.create_task(work) for work in (self._write(out, context), self._beat(out))]
        running: dict[str, asyncio.Task[None]] = {}
        try:
            async for frame in request_iterator:
                self._receive(frame, out, running)
        finally:
            self._out.discard(out)
            for task in (*tasks, *running.values()):
                task.cancel()
            await asyncio.gather(*tasks, *running.values(), return_exceptions=True)

    def _receive(
        self,
        frame: session_pb.RouterFrame,
        out: asyncio.Queue[Frame],
        running: dict[str, asyncio.Task[None]],
    ) -> None:
        if frame.HasField("interval_us"):
            self.interval_us = frame.interval_us
        if frame.submit:
            self.frame_sizes.append(len(frame.submit))
            self.frames.append(tuple(submit.request_id for submit in frame.submit))
        if frame.HasField("queued_tokens"):
            self.queued_tokens = frame.queued_tokens
        self.num_resyncs += frame.resync
        self.pins += map(pin_from_proto, frame.pin)
        self.unpins += frame.unpin
        for request in map(submit_from_proto, frame.submit):
            self.submitted.append(request)
            running[request.request_id] = asyncio.create_task(self._play(request, out))
        for cancel in frame.cancel:
            self.cancelled.append(cancel.request_id)
            if (task := running.pop(cancel.request_id, None)) is not None:
                task.cancel()

    async def _play(self, request: Request, out: asyncio.Queue[Frame]) -> None:
        steps = itertools.count(1)

        def emit(news: Delta | Failure) -> None:
            message = failure_to_proto(news) if isinstance(news, Failure) else delta_to_proto(news)
            step = session_pb.StepFrame(step=next(steps), deltas=[message], load=load_to_proto(self.load))
            out.put_nowait(session_pb.WorkerFrame(step=step))

        await self.script(request, emit)

    async def _write(self, out: asyncio.Queue[Frame], context: Any) -> None:
        while True:
            frame = await out.get()
            while self.silent:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await context.write(frame)

    async def _beat(self, out: asyncio.Queue[Frame]) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            out.put_nowait(self._heartbeat())

    def _heartbeat(self) -> session_pb.WorkerFrame:
        return session_pb.WorkerFrame(heartbeat=session_pb.Heartbeat(load=load_to_proto(self.load)))

    def _broadcast(self, frame: Frame) -> None:
        for out in self._out:
            out.put_nowait(frame)


def _to_bytes(frame: Frame) -> bytes:
    return frame if isinstance(frame, bytes) else frame.SerializeToString()
