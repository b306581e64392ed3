"""Who calls, on the wire: every call of both services asks, tenants know nothing of each other, secrets stay secret."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]

from protos import errors
from protos.v1 import cluster_pb2, inference_pb2
from tests.metrics import scrape
from tests.router.conftest import Cluster, Keys, until
from tests.router.scripted_worker import ScriptedWorker, answer, hang

Start = Callable[..., Any]
WRONG = "hw-key-of-nobody-0000000000000"
METHODS = [
    f"/{service.full_name}/{method.name}"
    for service in (
        inference_pb2.DESCRIPTOR.services_by_name["Inference"],
        cluster_pb2.DESCRIPTOR.services_by_name["Cluster"],
    )
    for method in service.methods
]


@pytest.fixture
async def guarded(start_cluster: Start, keys: Keys) -> Cluster:
    cluster: Cluster = await start_cluster(tenants={"file": keys.file})
    await cluster.add_worker("w0", answer(2))
    return cluster


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", f"Bearer {WRONG}"),), (("x-api-key", WRONG),), (("authorization", "Basic x"),)]
)
async def test_every_call_asks_who_calls(guarded: Cluster, metadata: tuple[tuple[str, str], ...]) -> None:
    async with grpc.aio.insecure_channel(guarded.address.grpc) as channel:
        for method in METHODS:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in channel.unary_stream(method)(b"", metadata=metadata, timeout=10):
                    pass
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
            error = errors.from_rpc_error(raised.value)
            assert isinstance(error, errors.Unauthenticated)
            assert WRONG not in str(raised.value) + error.message
    assert guarded.workers["w0"].submitted == []
    assert scrape(guarded.address.metrics, outcome="Unauthenticated")["headwater_requests_total"] == len(METHODS)


async def test_health_and_reflection_ask_nobody(guarded: Cluster) -> None:
    async with grpc.aio.insecure_channel(guarded.address.grpc) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        [reply] = [reply async for reply in replies]
        assert {service.name for service in reply.list_services_response.service} >= {
            "headwater.v1.Inference",
            "headwater.v1.Cluster",
        }


async def test_ids_of_tenants_stay_apart(guarded: Cluster, keys: Keys) -> None:
    """Another tenant's live id can be used, is not found by Abort, and is not told by a refusal."""
    worker = guarded.workers["w0"]
    worker.script = hang(1)
    acme, globex = await guarded.client(api_key=keys.acme), await guarded.client(api_key=keys.globex)
    tasks = [asyncio.create_task(acme.complete("w5", request_id="same"))]
    await until(lambda: len(worker.submitted) == 1)
    assert not await globex.abort("same")
    tasks.append(asyncio.create_task(globex.complete("w5", request_id="same")))
    await until(lambda: len(worker.submitted) == 2)
    with pytest.raises(errors.DuplicateRequest) as raised:
        await globex.complete("w5", request_id="same")
    assert "acme" not in raised.value.message
    assert await globex.abort("same")
    assert (await tasks[1]).outputs[0].finish.reason == "abort"
    assert not tasks[0].done()
    assert await acme.abort("same")
    await tasks[0]


async def salts(cluster: Cluster, keys: Keys) -> list[str]:
    """What a worker is told of two tenants' Generate and Score."""
    worker: ScriptedWorker = cluster.workers["w0"]
    for key in (keys.acme, keys.globex):
        client = await cluster.client(api_key=key)
        await client.complete("w5", max_tokens=1)
        await client.score([5], [[6]])
    return [request.cache_salt for request in worker.submitted]


async def test_workers_are_told_whose_a_prompt_is(guarded: Cluster, keys: Keys) -> None:
    assert await salts(guarded, keys) == ["acme", "acme", "globex", "globex"]


async def test_without_isolation_all_share(start_cluster: Start, keys: Keys) -> None:
    cluster: Cluster = await start_cluster(tenants={"file": keys.file, "isolation": "none"})
    await cluster.add_worker("w0", answer(2))
    assert await salts(cluster, keys) == [""] * 4


async def test_anonymous_callers_are_one_tenant_where_they_are_allowed(start_cluster: Start, keys: Keys) -> None:
    cluster: Cluster = await start_cluster(tenants={"file": keys.file, "allow_anonymous": True})
    worker = await cluster.add_worker("w0", answer(2))
    nobody, wrong = await cluster.client(), await cluster.client(api_key=WRONG)
    await nobody.complete("w5", max_tokens=1)
    assert worker.submitted[0].cache_salt == "anonymous"
    with pytest.raises(errors.PermissionDenied):
        await nobody.topology()
    with pytest.raises(errors.Unauthenticated):
        await wrong.complete("w5")


async def test_calls_are_counted_by_tenant(guarded: Cluster, keys: Keys) -> None:
    acme = await guarded.client(api_key=keys.acme)
    await acme.complete([5, 6, 7], max_tokens=2)
    with pytest.raises(errors.EmptyPrompt):
        await acme.complete([])
    counted = scrape(guarded.address.metrics, tenant="acme")
    assert counted["headwater_tenant_requests_total"] == 2
    assert scrape(guarded.address.metrics, tenant="acme", kind="generation")["headwater_tenant_tokens_total"] == 2
    assert scrape(guarded.address.metrics, tenant="acme", kind="prompt")["headwater_tenant_tokens_total"] == 3


async def test_answers_and_errors_tell_where_they_ran(guarded: Cluster, keys: Keys) -> None:
    acme = await guarded.client(api_key=keys.acme)
    assert (await acme.complete("w5", max_tokens=1)).route.startswith("only w0 ")
