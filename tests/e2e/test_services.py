"""What operators and foreign clients rely on: health, reflection, metrics, the command line."""

import asyncio
import json

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.lifecycle import Cluster
from protos.client import Client
from tests.e2e.conftest import HEADWATER
from tests.metrics import scrape


async def command_line(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        HEADWATER,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_health_and_reflection(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "headwater.v1.Inference"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in reflection.ServerReflectionInfo(iter([asked])):
            names = {service.name for service in reply.list_services_response.service}
            break
    assert {"headwater.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_router_and_workers_count_the_same_tokens(client: Client, cluster: Cluster) -> None:
    def totals() -> tuple[float, float]:
        router = scrape(cluster.endpoints[0].metrics)["headwater_generation_tokens_total"]
        workers = sum(scrape(address)["vllm:generation_tokens_total"] for address in cluster.worker_metrics())
        return router, workers

    before = await asyncio.to_thread(totals)
    await asyncio.gather(*(client.complete("import", max_tokens=10, ignore_eos=True) for _ in range(6)))
    after = await asyncio.to_thread(totals)
    assert (after[0] - before[0], after[1] - before[1]) == (60, 60)


async def test_a_pipe_gets_plain_text(target: str, client: Client) -> None:
    code, out, _ = await command_line(
        "generate", "def fibonacci(n):", "--target", target, "--seed", "5", "--max-tokens", "20"
    )
    answer = await client.complete("def fibonacci(n):", seed=5, max_tokens=20)
    assert code == 0
    assert answer.text.strip() in out
    assert "\x1b" not in out


async def test_json_is_one_object_a_line(target: str) -> None:
    code, out, _ = await command_line(
        "generate", "x", "--target", target, "--json", "--max-tokens", "5", "--ignore-eos"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert len(lines) > 1
    assert "usage" in lines[-1]


async def test_a_refused_request_is_one_clear_line(target: str) -> None:
    code, out, err = await command_line("generate", "x", "--target", target, "--top-p", "7")
    assert code != 0
    assert out == ""
    assert "top" in err
    assert "Traceback" not in err
