"""vLLM's engine in a whole cluster: real Ray, real gRPC; whatever of it dies, streams go on and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client, Completion, RetryPolicy
from tests.e2e.conftest import command, worker_processes
from tests.e2e.test_loss import ASKS, answers, counted, said
from tests.metrics import scrape
from tests.workers.engine.drive import request, run, torch_engine

NUM_WORKERS = 2
NUM_TOKENS = 48
SETTINGS = (
    f"cluster.num_workers={NUM_WORKERS}",
    "cluster.drain_timeout_s=2",
    "cluster.ready_timeout_s=300",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "router.limits.no_worker_grace_s=120",
    "worker.metrics.port=0",
    "worker.engine.kind=vllm",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=512",
    "worker.engine.vllm.enforce_eager=true",
)


@pytest.fixture(scope="module")
def cluster(target_dir: Path) -> Iterator[Cluster]:
    with Cluster(load(None, [*SETTINGS, f"worker.model.path={target_dir}"])) as running:
        yield running
        processes = vllm_processes()
        assert processes
    gone, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, "vLLM's processes outlive the cluster"
    assert len(gone) == len(processes)


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
    async with Client(cluster.endpoints[0].grpc, timeout_s=200, retry=RetryPolicy(max_attempts=1)) as one:
        yield one


def vllm_processes(of: psutil.Process | None = None) -> list[psutil.Process]:
    """vLLM's engines among the descendants of a process, or of this one."""
    return [one for one in (of or psutil.Process()).children(recursive=True) if is_vllm(one)]


def is_vllm(process: psutil.Process) -> bool:
    return " ".join(command(process)).startswith("VLLM::")


async def healed(client: Client) -> None:
    """Wait until every worker is back, and those before it are gone: vLLM takes its time to start."""
    async with asyncio.timeout(240):
        while [model.num_workers for model in await client.models()] != [NUM_WORKERS]:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        while [len(vllm_processes(worker)) for worker in worker_processes()] != [1] * NUM_WORKERS:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def test_outputs_are_those_of_the_torch_engine(client: Client, target_dir: Path) -> None:
    engine = torch_engine(target_dir)
    for number, temperature in enumerate((0.0, 0.8)):
        asked = {"max_tokens": 32, "temperature": temperature, "seed": 4, "n": 2, "ignore_eos": True}
        answer = await client.complete(token_ids=list(range(10, 80)), **asked)  # type: ignore[arg-type]
        expected = run(engine, request(str(number), list(range(10, 80)), **asked))  # type: ignore[arg-type]
        assert [list(output.token_ids) for output in answer.outputs] == [
            expected[str(number), index].tokens for index in range(2)
        ]


async def test_prompts_that_begin_alike_meet_in_one_cache(client: Client, cluster: Cluster) -> None:
    shared = [17 + at % 300 for at in range(320)]
    first = await client.complete(token_ids=[*shared, 1], max_tokens=2, temperature=0.0)
    async with asyncio.timeout(20):  # until the router has heard of the prefix
        while (await client.explain_route(token_ids=[*shared, 2])).worker_id != first.prompt.worker_id:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    again = await client.complete(token_ids=[*shared, 2], max_tokens=2, temperature=0.0)
    assert again.prompt.worker_id == first.prompt.worker_id
    assert again.usage.cached_tokens == 320
    found = sum(scrape(address).get("vllm:prefix_cache_hits_total", 0) for address in await addresses(cluster))
    assert found >= 320


async def addresses(cluster: Cluster) -> list[str]:
    return await asyncio.to_thread(cluster.worker_metrics)


async def test_cancelled_and_late_calls_leave_nothing_running(client: Client, cluster: Cluster) -> None:
    async for event in client.generate(prompt="def f", max_tokens=400, ignore_eos=True):
        if any(output.token_ids for output in event.outputs):
            break
    async with asyncio.timeout(20):
        while any(scrape(at)["vllm:num_requests_running"] for at in await addresses(cluster)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def engine_of(worker: psutil.Process) -> psutil.Process:
    [engine] = vllm_processes(worker)
    return engine


@pytest.mark.parametrize("find", [engine_of, lambda worker: worker], ids=["engine", "worker"])
async def test_streams_go_on_when_a_process_is_killed_and_none_is_left(
    client: Client, cluster: Cluster, find: Callable[[psutil.Process], psutil.Process]
) -> None:
    await healed(client)
    undisturbed = [said(completion) for completion in await answers(client, num_tokens=NUM_TOKENS)]
    num_before = await counted(cluster, "headwater_recoveries_total", outcome="resumed")
    worker = worker_processes()[0]
    processes = vllm_processes(worker)
    assert len(processes) == 1
    for (name, prompt), completion, before in zip(
        ASKS, await disturb(client, cluster, find(worker)), undisturbed, strict=True
    ):
        assert said(completion) == before, (name, prompt)
    assert await counted(cluster, "headwater_recoveries_total", outcome="resumed") > num_before
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=20)
    assert not alive
    await healed(client)


async def disturb(client: Client, cluster: Cluster, victim: psutil.Process) -> list[Completion]:
    """The same answers, while a process is killed in the middle of them."""
    num_before = await counted(cluster, "headwater_generation_tokens_total")
    task = asyncio.create_task(answers(client, num_tokens=NUM_TOKENS))
    while await counted(cluster, "headwater_generation_tokens_total") < num_before + NUM_TOKENS:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    async with asyncio.timeout(200):
        return await task
