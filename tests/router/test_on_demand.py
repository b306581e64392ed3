"""Workers that come when somebody waits for one: requests wait, the grace is theirs, and health says come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import errors
from protos.client import Client
from router.server import RouterServer
from tests.router.conftest import ONCE, Cluster, until
from tests.router.conftest import router_config as config_of
from tests.router.scripted_worker import ScriptedWorker, answer, hang

GRACE_S = 0.3


@asynccontextmanager
async def started(tokenizer_dir: Path, *, grace_s: float = GRACE_S) -> AsyncIterator[tuple[RouterServer, Client]]:
    """A router without workers, and a client of it."""
    server = RouterServer(
        config_of(no_worker_grace_s=grace_s),
        model_name="tiny",
        tokenizer_dir=tokenizer_dir,
        session_token="secret",
        router_id="r0",
        on_demand=True,
    )
    address = await server.start()
    try:
        async with Client(address.grpc, retry=ONCE) as client:
            yield server, client
        server.check()
    finally:
        await server.stop(0.2)


@asynccontextmanager
async def joined(server: RouterServer) -> AsyncIterator[ScriptedWorker]:
    """A worker of that router, for a while."""
    worker = ScriptedWorker("w0", answer(2))
    server.set_workers({"w0": await worker.start()})
    try:
        yield worker
    finally:
        server.set_workers({})
        await until(lambda: server.num_connected == 0)
        await worker.kill()


async def test_a_worker_is_wanted_while_somebody_waits(tokenizer_dir: Path) -> None:
    async with started(tokenizer_dir, grace_s=10) as (server, client):
        assert not server.wants_worker
        for _ in range(2):  # the second time the model's limits are known
            waiting = asyncio.create_task(client.complete("w5"))
            await until(lambda: server.wants_worker)
            async with joined(server):
                assert (await waiting).text == "t10 t11 "
                assert not server.wants_worker
            assert not server.wants_worker


async def test_who_leaves_wants_no_worker(tokenizer_dir: Path) -> None:
    async with started(tokenizer_dir, grace_s=10) as (server, client):
        async with joined(server):
            await client.complete("w5")
        waiting = asyncio.create_task(client.complete("w5"))
        await until(lambda: server.wants_worker)
        waiting.cancel()
        await until(lambda: not server.wants_worker)


@pytest.mark.parametrize("is_first", [True, False])
async def test_everybody_has_the_whole_grace(tokenizer_dir: Path, is_first: bool) -> None:
    """However long there was no worker before, and whoever gave up before."""
    async with started(tokenizer_dir) as (server, client):
        if not is_first:
            async with joined(server):
                await client.complete("w5")
        for _ in range(2):
            await asyncio.sleep(2 * GRACE_S)
            began = asyncio.get_running_loop().time()
            for ending in await asyncio.gather(*(client.complete("w5") for _ in range(2)), return_exceptions=True):
                assert isinstance(ending, errors.NoWorker)
            assert asyncio.get_running_loop().time() - began >= GRACE_S
            assert not server.wants_worker
        late = asyncio.create_task(client.complete("w5"))
        async with joined(server):
            assert (await late).text == "t10 t11 "


async def test_a_lost_worker_s_requests_want_another(tokenizer_dir: Path) -> None:
    async with started(tokenizer_dir, grace_s=10) as (server, client):
        async with joined(server) as worker:
            worker.script = hang()
            waiting = asyncio.create_task(client.complete("w5"))
            await until(lambda: bool(worker.submitted))
            await worker.kill()
            await until(lambda: server.wants_worker)
        async with joined(server):
            assert (await waiting).text == "t10 t11 "


async def test_a_router_without_workers_is_healthy(tokenizer_dir: Path) -> None:
    server = RouterServer(
        config_of(), model_name="tiny", tokenizer_dir=tokenizer_dir, session_token="s", router_id="r0", on_demand=True
    )
    address = await server.start()
    async with grpc.aio.insecure_channel(address.grpc) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    await server.stop(0)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_what_waits_is_told_though_nothing_else_is_sent(
    start_cluster: Callable[..., Awaitable[Cluster]],
) -> None:
    """Workers that are full get no frames, and just then more of them are wanted."""
    num_running = 8  # so many that one more changes their pace too little to be told
    cluster = await start_cluster()
    full = await cluster.add_worker("w0", hang(), max_running=num_running - 1)
    client = await cluster.client()
    calls = [asyncio.create_task(client.complete("w5", request_id=f"r{i}")) for i in range(num_running)]
    await until(lambda: len(full.submitted) == num_running)
    calls.append(asyncio.create_task(client.complete("w5", request_id="waiting")))
    await until(lambda: full.queued_tokens > 0)
    await client.abort("waiting")
    await until(lambda: full.queued_tokens == 0)
    assert (len(full.submitted), full.cancelled) == (num_running, [])
    for i in range(num_running):
        await client.abort(f"r{i}")
    await asyncio.gather(*calls)
