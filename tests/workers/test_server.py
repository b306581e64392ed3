"""The session server over real gRPC, with a fake engine behind it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from protos import convert
from protos.blocks import block_hashes
from protos.errors import EngineFailure, Unauthenticated, from_rpc_error
from protos.messages import Delta, EngineTotals, Failure, Request, Sampling
from protos.v1 import session_pb2 as pb
from protos.v1 import session_pb2_grpc as rpc
from tests.metrics import scrape
from tests.workers.kv.mirror import Mirror
from tests.workers.proxy import Proxy
from workers import server as worker_server
from workers.config import (
    EngineSection,
    KernelsSection,
    KVSection,
    MetricsSection,
    ModelSection,
    SchedulerSection,
    SessionSection,
    WorkerConfig,
)
from workers.engine.fake import FakeEngine, next_token
from workers.server import TOKEN_KEY, WorkerAddress, WorkerServer

TOKEN = "secret"
MAX_QUEUED_FRAMES = 200


class Session:
    """One side of a session, as a router holds it."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.call = rpc.WorkerSessionStub(self.channel).Session(metadata=((TOKEN_KEY, token),))
        self.cache = Mirror()

    async def submit(self, *requests: Request) -> None:
        await self.call.write(pb.RouterFrame(submit=[convert.submit_to_proto(request) for request in requests]))

    async def cancel(self, request_id: str) -> None:
        await self.call.write(pb.RouterFrame(cancel=[pb.Cancel(request_id=request_id)]))

    async def pace(self, interval_us: int) -> None:
        await self.call.write(pb.RouterFrame(interval_us=interval_us))

    async def resync(self) -> None:
        await self.call.write(pb.RouterFrame(resync=True))

    async def read(self) -> pb.WorkerFrame:
        frame = await asyncio.wait_for(self.call.read(), 5)
        assert isinstance(frame, pb.WorkerFrame)
        if frame.HasField("kv_events"):
            self.cache.receive(convert.kv_events_from_proto(frame.kv_events))
        return frame

    async def step(self) -> pb.WorkerFrame:
        """The next frame with tokens."""
        while not (frame := await self.read()).step.deltas:
            pass
        return frame

    async def deltas(self, request_id: str) -> list[Delta | Failure]:
        """Everything about one request until its outputs have ended."""
        found: list[Delta | Failure] = []
        while True:
            for message in (await self.read()).step.deltas:
                delta = convert.delta_from_proto(message)
                if delta.request_id == request_id:
                    found.append(delta)
                    if isinstance(delta, Failure) or delta.finish:
                        return found


LIMITS = SchedulerSection(max_running=17, step_tokens=300)
FAKE = EngineSection(kind="fake", scheduler=LIMITS)
PAGE = 8


@asynccontextmanager
async def started(target_dir: Path, engine: EngineSection) -> AsyncIterator[tuple[WorkerServer, WorkerAddress]]:
    config = WorkerConfig(
        model=ModelSection(path=target_dir),
        engine=engine,
        session=SessionSection(heartbeat_s=0.05, max_queued_frames=MAX_QUEUED_FRAMES),
        metrics=MetricsSection(port=0),
    )
    server = WorkerServer(config, worker_id="w0", session_token=TOKEN)
    address = await server.start()
    try:
        yield server, address
    finally:
        await server.stop()


@asynccontextmanager
async def running(target_dir: Path, *, step_s: float = 0.0) -> AsyncIterator[tuple[WorkerServer, WorkerAddress]]:
    async with started(target_dir, FAKE) as (server, address):
        engine = server._engine._engine
        assert isinstance(engine, FakeEngine)
        engine._step_s = step_s
        yield server, address


def request(request_id: str, *, max_tokens: int = 5, deadline: float | None = None, prompt: int = 1) -> Request:
    return Request(request_id, (prompt, 2, 3), Sampling(seed=1, max_tokens=max_tokens), deadline=deadline)


async def test_tokens_come_back_in_order_and_end_once(target_dir: Path) -> None:
    async with running(target_dir) as (_, address):
        session = Session(address.session)
        hello = (await session.read()).hello
        assert (hello.worker_id, hello.model, hello.vocab_size) == ("w0", "target", 4096)
        assert (hello.max_running, hello.step_tokens) == (17, 300)
        await session.submit(request("a"))
        deltas = await session.deltas("a")
        tokens = [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids]
        assert tokens == [next_token((1, 2, 3), 0, position, 4096) for position in range(5)]
        await session.channel.close()


async def test_an_idle_session_carries_heartbeats(target_dir: Path) -> None:
    async with running(target_dir) as (_, address):
        session = Session(address.session)
        assert (await session.read()).WhichOneof("frame") == "hello"
        assert (await session.read()).kv_events.snapshot
        assert [(await session.read()).WhichOneof("frame") for _ in range(3)] == ["heartbeat"] * 3
        await session.channel.close()


async def test_totals_come_with_the_hello_and_then_with_heartbeats(
    target_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_server, "TOTALS_S", 0.05)
    async with running(target_dir) as (server, address):
        session = Session(address.session)
        hello = (await session.read()).hello
        first = convert.totals_from_proto(hello.totals)
        assert first.seconds > 0
        assert (first.generation_tokens, first.num_steps) == (0, 0)
        await session.submit(request("a"))
        await session.deltas("a")
        while (totals := await told(session)).generation_tokens < 5:
            assert totals.seconds >= first.seconds
        stats, metrics = server._engine.stats, await asyncio.to_thread(scrape, address.metrics)
        assert (totals.generation_tokens, totals.prompt_tokens) == (stats.generation_tokens, stats.prompt_tokens)
        assert totals.num_steps == metrics["headwater_step_sequences_count"]
        assert totals.num_step_outputs == metrics["headwater_step_sequences_sum"]
        again = await told(session)  # idle ones are told, too
        assert again.seconds > totals.seconds
        assert again._replace(seconds=0) == totals._replace(seconds=0)
        await session.channel.close()


async def read(session: Session, num_frames: int) -> None:
    for _ in range(num_frames):
        await session.read()


async def told(session: Session) -> EngineTotals:
    """The next totals."""
    while not (frame := await session.read()).heartbeat.HasField("totals"):
        pass
    return convert.totals_from_proto(frame.heartbeat.totals)


async def test_a_worker_whose_engine_hangs_tells_no_totals(target_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would not fall silent."""
    monkeypatch.setattr(worker_server, "TOTALS_S", 0.01)

    def hang() -> None:
        raise EngineFailure("it hangs")

    async with running(target_dir) as (server, address):
        session = Session(address.session)
        await session.read()
        monkeypatch.setattr(server._engine, "check", hang)
        with pytest.raises(grpc.aio.AioRpcError):
            await read(session, 50)
        await session.channel.close()


async def test_a_worker_that_cannot_tell_its_totals_any_more_says_so(
    target_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: WorkerServer) -> pb.WorkerFrame:
        raise RuntimeError("no totals")

    async def checked_until_it_fails() -> None:
        async with running(target_dir) as (server, _), asyncio.timeout(10):
            server.check()
            monkeypatch.setattr(WorkerServer, "_totals", fail)
            while True:
                await asyncio.sleep(0.01)
                server.check()

    monkeypatch.setattr(worker_server, "TOTALS_S", 0.01)
    with pytest.raises(RuntimeError, match="no totals"):
        await checked_until_it_fails()


async def test_sessions_do_not_see_each_other(target_dir: Path) -> None:
    async with running(target_dir) as (_, address):
        sessions = [Session(address.session) for _ in range(3)]
        for number, session in enumerate(sessions):
            await session.submit(request("same", prompt=number))
        for number, session in enumerate(sessions):
            deltas = await session.deltas("same")
            assert isinstance(deltas[0], Delta)
            assert deltas[0].token_ids == (next_token((number, 2, 3), 0, 0, 4096),)
            await session.channel.close()


async def test_a_paced_session_gets_the_same_tokens_in_fewer_frames(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.001) as (_, address):
        hasty, paced = Session(address.session), Session(address.session)
        await paced.pace(10_000_000)
        for session in (hasty, paced):
            await session.submit(request("a", max_tokens=40))
        deltas = {session: await session.deltas("a") for session in (hasty, paced)}
        expected = [next_token((1, 2, 3), 0, position, 4096) for position in range(40)]
        for found in deltas.values():
            assert [token for delta in found if isinstance(delta, Delta) for token in delta.token_ids] == expected
        assert len(deltas[hasty]) == 40
        assert [len(delta.token_ids) for delta in deltas[paced] if isinstance(delta, Delta)] == [1, 39]
        for session in (hasty, paced):
            await session.channel.close()


async def test_cancel_and_a_closed_session_free_the_engine(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.002) as (server, address):
        first, second = Session(address.session), Session(address.session)
        await first.submit(request("a", max_tokens=100_000), request("b", max_tokens=100_000))
        await second.submit(request("c", max_tokens=100_000))
        await first.step()
        await second.step()
        await first.cancel("a")
        await eventually(lambda: server._engine.num_live == 2)
        await first.channel.close()
        await eventually(lambda: server._engine.num_live == 1)
        await second.channel.close()
        await eventually(lambda: scrape(address.metrics)["headwater_kv_pages_in_use"] == 0)


@pytest.mark.parametrize("kind", ["torch", "fake"])
async def test_a_session_hears_what_the_prefix_cache_holds(target_dir: Path, kind: str) -> None:
    section = EngineSection(
        kind=kind,  # type: ignore[arg-type]
        kernels=KernelsSection(variant="off"),
        kv=KVSection(num_pages=64, page_size=PAGE),
    )
    prompt = tuple(range(1, 3 * PAGE + 4))
    async with started(target_dir, section) as (_, address):
        first = Session(address.session)
        await first.submit(Request("a", prompt, Sampling(seed=1, max_tokens=1), cache_salt="tenant"))
        await first.deltas("a")
        expected = set(block_hashes("tenant", prompt, PAGE)) if kind == "torch" else set()
        assert first.cache.blocks == expected
        late = Session(address.session)
        assert (await late.read()).WhichOneof("frame") == "hello"
        snapshot = await late.read()
        assert (snapshot.kv_events.snapshot, snapshot.kv_events.sequence) == (True, 1)
        assert late.cache.blocks == expected
        await late.resync()
        while late.cache.num_snapshots < 2:
            await late.read()
        assert late.cache.blocks == expected
        for session in (first, late):
            await session.channel.close()


async def test_a_router_that_is_cut_off_loses_its_requests(target_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_server, "KEEPALIVE", [(name, 1_000) for name, _ in worker_server.KEEPALIVE])
    async with running(target_dir, step_s=0.01) as (server, address), Proxy(address.session) as proxy:
        session = Session(proxy.address)
        await session.submit(request("a", max_tokens=100_000))
        await session.step()
        proxy.cut()
        await eventually(lambda: server._engine.num_live == 0, timeout_s=30)
        assert not server._sessions
        await session.channel.close()


async def test_a_passed_deadline_is_a_typed_failure(target_dir: Path) -> None:
    async with running(target_dir) as (_, address):
        session = Session(address.session)
        await session.submit(request("a", deadline=1.0))
        [failure] = await session.deltas("a")
        assert isinstance(failure, Failure)
        assert failure.kind == "DeadlineExceeded"
        await session.channel.close()


async def test_a_duplicate_is_refused_and_the_first_goes_on(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.002) as (_, address):
        session = Session(address.session)
        await session.submit(request("a", max_tokens=50), request("a"))
        kinds = []
        while len(kinds) < 2:
            last = (await session.deltas("a"))[-1]
            kinds.append(last.kind if isinstance(last, Failure) else "finish")
        assert sorted(kinds) == ["DuplicateRequest", "finish"]
        await session.channel.close()


async def test_a_broken_engine_ends_every_request_and_the_session(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.002) as (server, address):
        session = Session(address.session)
        await session.submit(request("a", max_tokens=100_000))
        await session.read()

        def explode() -> None:
            raise ValueError("boom")

        server._engine._engine.step = explode  # type: ignore[method-assign, assignment]
        last = (await session.deltas("a"))[-1]
        assert isinstance(last, Failure)
        assert (last.kind, last.message) == ("EngineFailure", "the engine failed: boom")
        with pytest.raises(Exception, match="boom"):
            server.check()
        with pytest.raises(grpc.aio.AioRpcError, match="boom"):
            await asyncio.wait_for(until_end(session), 5)
        await session.channel.close()


async def test_draining_ends_live_requests_and_refuses_new_ones(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.005) as (server, address):
        session = Session(address.session)
        await session.submit(request("a", max_tokens=30))
        await session.read()
        await session.read()
        drained = asyncio.create_task(server.drain(5))
        await asyncio.sleep(0)
        await session.submit(request("late"))
        [failure] = await session.deltas("late")
        assert isinstance(failure, Failure)
        assert failure.kind == "Draining"
        assert await drained
        await session.channel.close()


async def test_a_router_that_does_not_read_loses_its_session_not_our_memory(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.001) as (server, address):
        session = Session(address.session)
        await session.read()
        [queue] = server._sessions.values()
        queue.get = asyncio.Event().wait  # type: ignore[method-assign, assignment]  # as if every write blocked
        await session.submit(request("a", max_tokens=100_000))
        await eventually(lambda: not server._sessions)
        await eventually(lambda: server._engine.num_live == 0)
        assert queue.qsize() <= MAX_QUEUED_FRAMES + 1
        await session.channel.close()


async def test_a_wrong_token_is_refused(target_dir: Path) -> None:
    async with running(target_dir) as (_, address):
        session = Session(address.session, token="guess")
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await session.call.read()
        assert isinstance(from_rpc_error(refusal.value), Unauthenticated)
        await session.channel.close()


async def test_metrics_carry_the_conventional_names(target_dir: Path) -> None:
    async with running(target_dir) as (_, address):
        session = Session(address.session)
        await session.submit(request("a"))
        await session.deltas("a")
        await eventually(lambda: scrape(address.metrics)["vllm:generation_tokens_total"] == 5)
        found = scrape(address.metrics)
        for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits_total"):
            assert name in found
        assert found["vllm:time_to_first_token_seconds_count"] == 1
        assert found["vllm:inter_token_latency_seconds_count"] == 4
        assert found["vllm:request_success_total"] == 1
        await session.channel.close()


async def until_end(session: Session) -> None:
    while True:
        await session.read()


async def eventually(condition: object, timeout_s: float = 5.0) -> None:
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - nothing to await: it polls from outside
            await asyncio.sleep(0.02)
