"""What stands around the service: health, reflection, metrics, ports, TLS, stopping."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import errors
from protos.client import Client, ClientTLS
from router.config import GrpcSection, MetricsSection, RouterConfig, TLSSection
from router.server import RouterServer
from router.tokenizer import Tokenizer
from tests.router.conftest import ONCE, Cluster, router_config, until, until_async
from tests.router.scripted_worker import hang

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Start = Callable[..., Any]


def router(tokenizer_dir: Path, config: RouterConfig) -> RouterServer:
    return RouterServer(config, model_name="tiny", tokenizer_dir=tokenizer_dir, session_token="secret", router_id="r1")


async def health(channel: grpc.aio.Channel, service: str) -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


@pytest.mark.parametrize("service", ["", "headwater.v1.Inference"])
async def test_health_follows_the_workers(start_cluster: Start, service: str) -> None:
    cluster: Cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.address.grpc) as channel:
        assert await health(channel, service) == NOT_SERVING
        worker = await cluster.add_worker("w0")
        await until_async(lambda: _is(channel, service, SERVING))
        await worker.kill()
        await until_async(lambda: _is(channel, service, NOT_SERVING))
        await worker.start()
        await until_async(lambda: _is(channel, service, SERVING))


async def _is(channel: grpc.aio.Channel, service: str, status: int) -> bool:
    return await health(channel, service) == status


async def test_reflection_lists_every_service(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.address.grpc) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        response = await call.read()
        assert await call.read() == grpc.aio.EOF
    names = {service.name for service in response.list_services_response.service}
    assert names == {
        "headwater.v1.Inference",
        "headwater.v1.Cluster",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def scrape_now(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^([^#\s]+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


async def scrape(cluster: Cluster) -> dict[str, float]:
    return await asyncio.to_thread(scrape_now, cluster.address.metrics)


async def test_metrics_count_what_happened(cluster: Cluster, client: Client) -> None:
    await client.complete("w5 w6", max_tokens=3)
    await client.score([5], [[6]])
    with pytest.raises(errors.EmptyPrompt):
        await client.complete("")
    series = await scrape(cluster)
    assert series['headwater_time_to_first_token_seconds_count{worker="w0"}'] == 1
    assert series['headwater_inter_token_latency_seconds_count{worker="w0"}'] == 2
    assert series['headwater_e2e_request_latency_seconds_count{worker="w0"}'] == 2
    assert series["headwater_request_queue_time_seconds_count"] == 2
    assert series['headwater_requests_total{method="Generate",outcome="length"}'] == 1
    assert series['headwater_requests_total{method="Generate",outcome="EmptyPrompt"}'] == 1
    assert series['headwater_requests_total{method="Score",outcome="ok"}'] == 1
    assert series["headwater_prompt_tokens_total"] == 5
    assert series["headwater_generation_tokens_total"] == 3
    assert series["headwater_requests_live"] == 0
    assert series["headwater_queue_requests"] == 0
    assert series["headwater_queue_tokens"] == 0
    assert series['headwater_workers{state="ready"}'] == 1
    assert not any(name.startswith(("python_", "process_")) for name in series)


async def test_metrics_of_queue_and_losses(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(sessions={"max_in_flight": 1}, max_continuations=1)
    worker = await cluster.add_worker("w0", hang())
    client = await cluster.client()
    tasks = [asyncio.create_task(client.complete([5, 6, 7])) for _ in range(3)]
    await until(lambda: bool(worker.submitted))
    await asyncio.sleep(0.1)
    series = await scrape(cluster)
    assert (series["headwater_requests_live"], series["headwater_queue_requests"]) == (3, 2)
    assert series["headwater_queue_tokens"] == 6
    await worker.kill()
    await asyncio.gather(*tasks, return_exceptions=True)
    series = await scrape(cluster)
    assert series['headwater_worker_losses_total{reason="connection"}'] == 1
    assert series['headwater_workers{state="connecting"}'] == 1


async def test_series_of_a_worker_that_left_are_removed(cluster: Cluster, client: Client) -> None:
    await client.complete("w5")
    assert any('worker="w0"' in name for name in await scrape(cluster))
    cluster.remove_worker("w0")
    await until_async(lambda: _lacks(cluster, 'worker="w0"'))


async def _lacks(cluster: Cluster, label: str) -> bool:
    return not any(label in name for name in await scrape(cluster))


async def test_second_router_on_the_grpc_port_fails_clearly(cluster: Cluster, tokenizer_dir: Path) -> None:
    port = int(cluster.address.grpc.rsplit(":", 1)[1])
    config = RouterConfig(grpc=GrpcSection(port=port), metrics=MetricsSection(port=0))
    with pytest.raises(errors.SetupError, match=rf"{port}.*set grpc\.port"):
        await router(tokenizer_dir, config).start()


async def test_second_router_on_the_metrics_port_fails_clearly(cluster: Cluster, tokenizer_dir: Path) -> None:
    port = int(cluster.address.metrics.rsplit(":", 1)[1])
    config = RouterConfig(grpc=GrpcSection(port=0), metrics=MetricsSection(port=port))
    with pytest.raises(errors.SetupError, match=rf"{port}.*set metrics\.port"):
        await router(tokenizer_dir, config).start()


async def test_missing_certificate_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    tls = TLSSection(cert_file=tmp_path / "cert.pem", key_file=tmp_path / "key.pem")
    config = RouterConfig(grpc=GrpcSection(port=0, tls=tls), metrics=MetricsSection(port=0))
    with pytest.raises(errors.SetupError, match=r"`router\.grpc\.tls\.cert_file`: .*cert\.pem cannot be read"):
        await router(tokenizer_dir, config).start()


def test_tokenizer_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.ModelError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


async def test_message_over_the_limit_is_its_own_error(client: Client) -> None:
    with pytest.raises(errors.MessageTooLarge):
        await client.complete("w5 " * 40_000)


async def test_stop_is_idempotent_and_leaves_no_task(tokenizer_dir: Path) -> None:
    before = asyncio.all_tasks()
    server = router(tokenizer_dir, router_config())
    await server.start()
    server.set_workers({"w0": "127.0.0.1:1"})
    await asyncio.sleep(0.1)
    server.check()
    await server.stop(0.1)
    await server.stop(0.1)
    left = {task for task in asyncio.all_tasks() - before if "poll" not in repr(task)}
    assert not left


def test_a_group_larger_than_a_worker_is_a_config_error() -> None:
    with pytest.raises(ValueError, match="max_continuations 9 is above"):
        router_config(sessions={"max_in_flight": 8}, max_continuations=9)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
async def test_mutual_tls(tokenizer_dir: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    await asyncio.to_thread(
        subprocess.run, [*make, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    tls = TLSSection(cert_file=cert, key_file=key, client_ca_file=cert)
    server = router(tokenizer_dir, RouterConfig(grpc=GrpcSection(port=0, tls=tls), metrics=MetricsSection(port=0)))
    address = await server.start()
    try:
        async with Client(address.grpc, tls=ClientTLS(ca_file=cert, cert_file=cert, key_file=key)) as client:
            assert await client.tokenize("w5") == (0, 5)
        async with Client(address.grpc, tls=ClientTLS(ca_file=cert), retry=ONCE) as stranger:
            with pytest.raises(errors.NoWorker):
                await stranger.tokenize("w5")
    finally:
        await server.stop(0)
