"""Prefixes from worker to worker over real sessions and calls; whatever goes wrong, the request is computed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import convert
from protos.blocks import block_hashes
from protos.messages import Delta, Failure, Pin, PrefixSource, Request, Sampling
from protos.tls import PeerTLS
from protos.v1 import session_pb2 as pb
from protos.v1 import session_pb2_grpc as rpc
from tests.certificates import Authority
from tests.metrics import scrape
from tests.workers.test_server import TOKEN, Session, eventually
from workers.config import (
    EngineSection,
    ExchangeSection,
    KernelsSection,
    KVSection,
    MetricsSection,
    ModelSection,
    SessionSection,
    WorkerConfig,
)
from workers.exchange import Exchange, Pace, Puller
from workers.exports import Exports
from workers.server import WorkerAddress, WorkerServer

PAGE = 32
PREFIX = tuple((7 * i) % 3900 + 1 for i in range(6 * PAGE))
FETCHES = "headwater_prefix_fetches_total"


class Worker:
    """A worker, and a router's session with it."""

    def __init__(self, server: WorkerServer, address: WorkerAddress) -> None:
        self.server = server
        self.address = address
        self.session = Session(address.session) if server._tls is None else None
        self.num_asked = 0

    @property
    def as_source(self) -> PrefixSource:
        return PrefixSource(self.server._worker_id, self.address.session, len(PREFIX))

    async def answer(self, *, source: PrefixSource | None = None, rest: Sequence[int] = (9, 8, 7)) -> list[Delta]:
        """To the prefix and some more."""
        self.num_asked += 1
        assert self.session is not None
        await self.session.submit(asked(str(self.num_asked), source=source, rest=rest))
        return whole(await self.session.deltas(str(self.num_asked)))

    async def metrics(self, **labels: str) -> dict[str, float]:
        return await asyncio.to_thread(scrape, self.address.metrics, **labels)

    async def fetches(self, outcome: str) -> float:
        """Ended so; no others."""
        every = (await self.metrics()).get(FETCHES, 0)
        found = (await self.metrics(outcome=outcome)).get(FETCHES, 0)
        assert every == found, f"{every - found} ended otherwise"
        return found


class Neighbour(Puller):
    """Gets blocks from a worker in this process, as Ray's object store would from another node."""

    def __init__(self, source: Worker | None = None) -> None:
        self.source = source
        self.num_pulls = 0

    async def pull(self, worker_id: str, salt: str, token_ids: Sequence[int], *, timeout_s: float) -> memoryview | None:
        self.num_pulls += 1
        assert self.source is not None
        assert worker_id == self.source.server._worker_id
        return await asyncio.to_thread(self.source.server.packed_prefix, salt, token_ids, timeout_s=timeout_s)


def asked(request_id: str, *, source: PrefixSource | None = None, rest: Sequence[int] = (9, 8, 7)) -> Request:
    sampling = Sampling(seed=1, max_tokens=5, temperature=0.0, ignore_eos=True)
    return Request(request_id, (*PREFIX, *rest), sampling, cache_salt="tenant", prefix_source=source)


def whole(deltas: Sequence[Delta | Failure]) -> list[Delta]:
    found = [delta for delta in deltas if isinstance(delta, Delta)]
    assert len(found) == len(deltas), deltas
    return found


def said(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def config(target_dir: Path, directory: Path, *, kernels: str = "off", **exchange: Any) -> WorkerConfig:
    settings = {"directory": directory, "min_tokens": PAGE, "max_bytes": 1 << 24, "timeout_s": 30.0, **exchange}
    return WorkerConfig(
        model=ModelSection(path=target_dir),
        engine=EngineSection(
            kernels=KernelsSection(variant=kernels),  # type: ignore[arg-type]
            kv=KVSection(num_pages=128, page_size=PAGE, exchange=ExchangeSection(**settings)),
        ),
        session=SessionSection(heartbeat_s=0.05),
        metrics=MetricsSection(port=0),
    )


@asynccontextmanager
async def worker(
    settings: WorkerConfig, worker_id: str, *, puller: Puller | None = None, tls: PeerTLS | None = None
) -> AsyncIterator[Worker]:
    server = WorkerServer(settings, worker_id=worker_id, session_token=TOKEN, puller=puller, tls=tls)
    found = Worker(server, await server.start())
    try:
        yield found
    finally:
        if found.session is not None:
            await found.session.channel.close()
        await server.stop()


@pytest.fixture
async def source(target_dir: Path, tmp_path: Path) -> AsyncIterator[Worker]:
    """A worker that has computed the prefix."""
    async with worker(config(target_dir, tmp_path / "arena"), "source") as found:
        await found.answer()
        yield found


@pytest.fixture
async def expected(source: Worker) -> list[int]:
    return said(await source.answer())


@pytest.mark.parametrize("kernels", ["auto", "off"])
async def test_a_prefix_comes_through_shared_memory(target_dir: Path, tmp_path: Path, kernels: str) -> None:
    settings = config(target_dir, tmp_path / "arena", kernels=kernels)
    async with worker(settings, "a") as first, worker(settings, "b") as second, worker(settings, "c") as third:
        expected = said(await first.answer())
        way = "copied" if first.server._engine._engine.kernels == "torch" else "mapped"  # type: ignore[attr-defined]
        for other in (second, third):
            found = await other.answer(source=first.as_source)
            assert (found[0].cached_tokens, said(found)) == (len(PREFIX), expected)
            assert await other.fetches(way) == 1
            metrics = await other.metrics()
            assert metrics["headwater_prefix_fetched_tokens_total"] == len(PREFIX)
            assert metrics["headwater_prefix_fetch_seconds_total"] > 0
        metrics = await first.metrics()
        assert metrics["headwater_prefix_exports_total"] == 1, "the second is served from the arena"
        assert metrics["headwater_arena_bytes"] > 0
    assert [path.name for path in (tmp_path / "arena").iterdir() if path.is_dir()] == []


async def test_what_is_there_is_not_fetched(source: Worker, target_dir: Path, tmp_path: Path) -> None:
    async with worker(config(target_dir, tmp_path / "arena"), "b") as other:
        await other.answer()
        await other.answer(source=source.as_source)
        await source.answer(source=source.as_source)
        assert (await other.metrics())[FETCHES] == 0
        assert (await source.metrics())[FETCHES] == 0


async def test_a_prefix_comes_over_the_network_once_for_all_who_wait(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path
) -> None:
    puller = Neighbour(source)
    async with worker(config(target_dir, tmp_path / "other"), "b", puller=puller) as other:
        assert other.session is not None
        requests = [asked(str(number), source=source.as_source, rest=(9, 8, 7)) for number in range(3)]
        await other.session.submit(*requests)
        found = [await other.session.deltas("2")]
        assert [said(whole(deltas)) for deltas in found] == [expected]
        assert puller.num_pulls == 1
        assert await other.fetches("copied") == 1


async def test_a_worker_without_shared_memory_pulls(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    puller = Neighbour(source)
    async with worker(config(target_dir, tmp_path / "file"), "b", puller=puller) as other:
        assert "no prefixes through shared memory" in caplog.text
        found = await other.answer(source=source.as_source)
        assert (found[0].cached_tokens, said(found), puller.num_pulls) == (len(PREFIX), expected, 1)


@pytest.mark.parametrize(("mode", "outcome"), [("node", "failed"), ("off", None)])
async def test_what_may_not_be_moved_is_computed(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path, mode: str, outcome: str | None
) -> None:
    puller = Neighbour(source)
    async with worker(config(target_dir, tmp_path / "other", mode=mode), "b", puller=puller) as other:
        found = await other.answer(source=source.as_source)
        assert (found[0].cached_tokens, said(found), puller.num_pulls) == (0, expected, 0)
        assert outcome is None or await other.fetches(outcome) == 1


async def test_what_is_computed_faster_is_computed(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path
) -> None:
    async with worker(config(target_dir, tmp_path / "arena"), "b") as other:
        other.server._engine._prefill_rate = 1e12
        found = await other.answer(source=source.as_source)
        assert (found[0].cached_tokens, said(found)) == (0, expected)
        assert await other.fetches("computed") == 1


async def test_too_few_tokens_are_computed(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path
) -> None:
    async with worker(config(target_dir, tmp_path / "arena", min_tokens=len(PREFIX) + 1), "b") as other:
        assert said(await other.answer(source=source.as_source)) == expected
        assert await other.fetches("computed") == 1


async def test_a_source_that_is_gone_costs_nothing_but_time(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path
) -> None:
    async with worker(config(target_dir, tmp_path / "arena"), "b") as other:
        gone = PrefixSource("gone", "127.0.0.1:1", len(PREFIX))
        assert said(await other.answer(source=gone)) == expected
        assert await other.fetches("failed") == 1


async def test_a_source_that_has_lost_the_prefix(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path
) -> None:
    async with (
        worker(config(target_dir, tmp_path / "arena"), "empty") as empty,
        worker(config(target_dir, tmp_path / "arena"), "b") as other,
    ):
        assert said(await other.answer(source=empty.as_source)) == expected
        assert await other.fetches("failed") == 1


async def test_a_damaged_file_is_computed(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path
) -> None:
    async with worker(config(target_dir, tmp_path / "arena"), "b") as other:
        stub = rpc.WorkerSessionStub(source.session.channel)  # type: ignore[union-attr]
        arena_id = (tmp_path / "arena" / "id").read_text()
        request = pb.ExportPrefixRequest(cache_salt="tenant", token_ids=PREFIX, arena_id=arena_id)
        found = await stub.ExportPrefix(request, metadata=(("headwater-session-token", TOKEN),))
        assert found.num_tokens == len(PREFIX)
        file = tmp_path / "arena" / found.path
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        answer = await other.answer(source=source.as_source)
        assert (answer[0].cached_tokens, said(answer)) == (0, expected)
        assert await other.fetches("failed") == 1


async def test_a_late_prefix_is_computed(
    source: Worker, expected: list[int], target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Exports, "answer", never)
    async with worker(config(target_dir, tmp_path / "arena", timeout_s=0.2), "b") as other:
        assert said(await other.answer(source=source.as_source)) == expected
        assert await other.fetches("late") == 1


async def never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_others_go_on_while_one_waits_and_a_cancel_ends_it(
    source: Worker, target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Exchange, "_bring", never)
    async with worker(config(target_dir, tmp_path / "arena", timeout_s=600), "b") as other:
        assert other.session is not None
        await other.session.submit(asked("waits", source=source.as_source), asked("first"), asked("second"))
        await other.session.deltas("second")
        assert other.server._num_fetching == 1
        await other.session.cancel("waits")
        await eventually(lambda: other.server._num_fetching == 0)
        await other.session.submit(asked("third"))
        await other.session.deltas("third")
        assert other.server._engine.num_live == 0


async def test_the_end_of_a_session_ends_its_waiting(
    source: Worker, target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Exchange, "_bring", never)
    async with worker(config(target_dir, tmp_path / "arena", timeout_s=600), "b") as other:
        session = Session(other.address.session)
        await session.submit(asked("waits", source=source.as_source))
        await eventually(lambda: other.server._num_fetching == 1)
        await session.channel.close()
        await eventually(lambda: other.server._num_fetching == 0)
        await eventually(lambda: other.server._engine.num_live == 0)  # a command that is not taken yet counts


async def test_a_pin_is_fetched_stays_and_ends_with_its_session(
    source: Worker, target_dir: Path, tmp_path: Path
) -> None:
    names = set(block_hashes("tenant", PREFIX, PAGE))
    async with worker(config(target_dir, tmp_path / "arena"), "b") as other:
        sessions = [Session(other.address.session) for _ in range(2)]
        for session in sessions:
            pin = Pin("p", "tenant", PREFIX, source.as_source)
            await session.call.write(pb.RouterFrame(pin=[convert.pin_to_proto(pin)]))
            while not names <= session.cache.blocks:
                await session.read()
        await pinned(other, 6)
        assert await other.fetches("copied") == 1
        assert (await other.metrics())["headwater_computed_tokens_total"] == 0
        await sessions[0].call.write(pb.RouterFrame(unpin=["p"]))
        await sessions[0].submit(asked("a"))
        await sessions[0].deltas("a")
        await pinned(other, 6)
        await sessions[1].channel.close()
        await pinned(other, 0)
        await sessions[0].channel.close()


async def test_a_pin_without_a_source_is_computed(target_dir: Path, tmp_path: Path) -> None:
    async with worker(config(target_dir, tmp_path / "arena"), "b") as other:
        assert other.session is not None
        pin = Pin("p", "tenant", PREFIX)
        await other.session.call.write(pb.RouterFrame(pin=[convert.pin_to_proto(pin)]))
        while not set(block_hashes("tenant", PREFIX, PAGE)) <= other.session.cache.blocks:
            await other.session.read()
        await eventually(lambda: not other.server._engine._engine.has_work)
        found = await other.answer()
        assert found[0].cached_tokens == len(PREFIX)
        await pinned(other, 6)


async def pinned(worker: Worker, num_pages: int) -> None:
    await eventually(lambda: scrape(worker.address.metrics)["headwater_kv_pages_pinned"] == num_pages)


async def test_prefixes_are_for_those_who_know_the_token(source: Worker) -> None:
    assert source.session is not None
    stub = rpc.WorkerSessionStub(source.session.channel)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.ExportPrefix(pb.ExportPrefixRequest(token_ids=PREFIX, cache_salt="tenant"))
    assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED
    other_salt = pb.ExportPrefixRequest(token_ids=PREFIX, cache_salt="guess")
    found = await stub.ExportPrefix(other_salt, metadata=(("headwater-session-token", TOKEN),))
    assert (found.num_tokens, found.path) == (0, "")


async def test_workers_with_certificates_exchange_too(target_dir: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    tls = authority.peer(authority.issue("worker"))
    settings = config(target_dir, tmp_path / "arena")
    async with worker(settings, "a", tls=tls) as first, worker(settings, "b", tls=tls) as second:
        loop = first.server._engine
        loop.open(7)
        loop.submit(7, asked("warm"))
        await eventually(lambda: loop.num_held(block_hashes("tenant", PREFIX, PAGE)) == 6)
        await eventually(lambda: loop.num_live == 0)
        assert second.server._exchange is not None
        await second.server._exchange.fetch("tenant", PREFIX, first.as_source)
        await eventually(lambda: second.server._engine.num_held(block_hashes("tenant", PREFIX, PAGE)) == 6)
        assert await second.fetches("copied") == 1


SERVE = """
import asyncio, sys
from pathlib import Path
from tests.workers.test_exchange import TOKEN, config
from workers.server import WorkerServer

async def main() -> None:
    settings = config(Path(sys.argv[1]), Path(sys.argv[2]), kernels="auto")
    server = WorkerServer(settings, worker_id="killed", session_token=TOKEN)
    address = await server.start()
    print(address.session, address.metrics, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_prefix_outlives_the_worker_that_made_it(target_dir: Path, tmp_path: Path) -> None:
    """A killed one: its block is used for as long as it is needed, and its folder is removed by the next worker."""
    settings = config(target_dir, tmp_path / "arena", kernels="auto")
    command = [sys.executable, "-c", SERVE, str(target_dir), str(tmp_path / "arena")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - it ends below
    try:
        assert process.stdout is not None
        addresses = await asyncio.to_thread(process.stdout.readline)
        session = Session(addresses.split()[0])
        await session.submit(asked("a"))
        expected = said(whole(await session.deltas("a")))
        async with worker(settings, "b") as other:
            made = PrefixSource("killed", addresses.split()[0], len(PREFIX))
            first = await other.answer(source=made)
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
            async with worker(settings, "c"):
                folders = [path for path in (tmp_path / "arena").iterdir() if path.is_dir()]
                assert len(folders) == 2, "those of the living"
            second = await other.answer(source=made)
            assert [said(first), said(second)] == [expected] * 2
            assert second[0].cached_tokens >= len(PREFIX)
        await session.channel.close()
    finally:
        process.kill()
        process.communicate()


def test_a_pace_is_learned_and_forgotten() -> None:
    pace = Pace(latency_s=0.01, bytes_per_s=1e9)
    assert pace.predict(10**9) == pytest.approx(1.01)
    for _ in range(50):
        pace.observe(10**9, 3.03)
    assert pace.predict(10**9) == pytest.approx(3.03, rel=0.01)
    for _ in range(300):
        pace.forget()
    assert pace.predict(10**9) == pytest.approx(1.01, rel=0.01)
