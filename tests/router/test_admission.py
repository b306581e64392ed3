"""Waiting for a worker: bounded, in order, with deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from protos import errors
from protos.client import Client
from tests.router.conftest import Cluster, until
from tests.router.scripted_worker import answer, hang

Start = Callable[..., Any]


async def busy(start_cluster: Start, **limits: Any) -> tuple[Cluster, Client, asyncio.Task[Any]]:
    """A cluster whose only worker runs its only request, which hangs."""
    cluster: Cluster = await start_cluster(sessions={"max_in_flight": 1}, max_continuations=1, **limits)
    worker = await cluster.add_worker("w0", hang())
    client = await cluster.client()
    running = asyncio.create_task(client.complete("w5", request_id="running"))
    await until(lambda: len(worker.submitted) == 1)
    return cluster, client, running


async def test_full_queue_refuses_at_once_with_a_hint(start_cluster: Start) -> None:
    cluster, client, running = await busy(start_cluster, max_queued_requests=2)
    waiting = [asyncio.create_task(client.complete("w5", request_id=f"{i}")) for i in range(2)]
    await asyncio.sleep(0.1)
    with pytest.raises(errors.Overloaded, match="limit is 2") as raised:
        await client.complete("w5")
    assert raised.value.retry_after_s is not None
    assert 0.1 <= raised.value.retry_after_s <= 10
    for request_id in ("1", "0", "running"):
        assert await client.abort(request_id)
    ended = await asyncio.gather(running, *waiting)
    assert {completion.outputs[0].finish.reason for completion in ended} == {"abort"}
    assert len(cluster.workers["w0"].submitted) == 1


async def test_full_queue_of_tokens_refuses(start_cluster: Start) -> None:
    _, client, running = await busy(start_cluster, max_queued_tokens=10)
    waiting = asyncio.create_task(client.complete([5] * 30, request_id="0"))  # alone, however large
    await asyncio.sleep(0.1)
    with pytest.raises(errors.Overloaded, match="limit is 10"):
        await client.complete("w5")
    await client.abort("0")
    await client.abort("running")
    await asyncio.gather(running, waiting)


async def test_waiting_requests_run_in_order(start_cluster: Start) -> None:
    cluster, client, running = await busy(start_cluster)
    worker = cluster.workers["w0"]
    worker.script = answer(1)
    waiting = []
    for i in range(5):
        waiting.append(asyncio.create_task(client.complete([5 + i])))
        await asyncio.sleep(0.03)
    await client.abort("running")
    await asyncio.gather(running, *waiting)
    assert [request.token_ids for request in worker.submitted[1:]] == [(5 + i,) for i in range(5)]


async def test_deadline_in_the_queue_ends_and_frees_the_place(start_cluster: Start) -> None:
    cluster, client, running = await busy(start_cluster, max_queued_requests=1)
    impatient = await cluster.client(timeout_s=0.2)
    with pytest.raises(errors.DeadlineExceeded):
        await impatient.complete("w5")
    waiting = asyncio.create_task(client.complete("w5", request_id="0"))
    await asyncio.sleep(0.1)
    await client.abort("0")
    await client.abort("running")
    await asyncio.gather(running, waiting)
    assert len(cluster.workers["w0"].submitted) == 1


async def test_a_client_without_time_left_reaches_no_worker(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", answer(1))
    hopeless = await cluster.client(timeout_s=1e-9)
    with pytest.raises(errors.DeadlineExceeded):
        await hopeless.complete("w5")
    assert worker.submitted == []


async def test_disconnect_in_the_queue_frees_the_place(start_cluster: Start) -> None:
    cluster, client, running = await busy(start_cluster, max_queued_requests=1)
    gone = asyncio.create_task(client.complete("w5"))
    await asyncio.sleep(0.1)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(client.complete("w5", max_tokens=1, request_id="0"))
    await asyncio.sleep(0.05)
    cluster.workers["w0"].script = answer(1)
    await client.abort("running")
    await asyncio.gather(running, waiting)
    assert len(cluster.workers["w0"].submitted) == 2


async def test_no_worker_ends_after_the_grace(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    client = await cluster.client()
    with pytest.raises(errors.NoWorker, match=r"0\.3 s"):
        await client.complete("w5")
    with pytest.raises(errors.NoWorker):  # at once, now
        await asyncio.wait_for(client.complete("w5"), 0.2)
    assert await client.models() == ()


async def test_request_waits_for_the_first_worker(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(no_worker_grace_s=10)
    client = await cluster.client()
    early = asyncio.create_task(client.complete("w5", max_tokens=1))
    await asyncio.sleep(0.1)
    await cluster.add_worker("w0")
    assert (await early).prompt.worker_id == "w0"


async def test_waiting_requests_end_when_the_last_worker_stays_away(start_cluster: Start) -> None:
    cluster, client, running = await busy(start_cluster)
    waiting = asyncio.create_task(client.complete("w5"))
    await asyncio.sleep(0.1)
    await cluster.workers["w0"].kill()
    with pytest.raises(errors.WorkerLost):
        await running
    with pytest.raises(errors.NoWorker):
        await waiting
    await cluster.workers["w0"].start()
    cluster.workers["w0"].script = answer(1)
    await cluster.wait_connected()
    assert (await client.complete("w5")).outputs[0].token_ids == (10,)


async def test_least_loaded_worker_runs_it(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    first = await cluster.add_worker("w0", hang())
    second = await cluster.add_worker("w1", hang())
    client = await cluster.client()
    tasks = [asyncio.create_task(client.complete([5] * 40, max_tokens=20, request_id="big"))]
    await until(lambda: len(first.submitted) == 1)
    tasks += [asyncio.create_task(client.complete([5], max_tokens=5, request_id=f"{i}")) for i in range(3)]
    await until(lambda: len(second.submitted) == 3)
    assert len(first.submitted) == 1
    for request_id in ("big", "0", "1", "2"):
        await client.abort(request_id)
    await asyncio.gather(*tasks)
