"""Workers die, hang, drain and leave: every stream ends exactly once, and the router goes on."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from protos import errors
from protos.client import Client
from protos.messages import Load
from tests.router.conftest import Cluster, until, until_async
from tests.router.scripted_worker import ScriptedWorker, answer, hang


async def ending(client: Client, **options: object) -> str:
    """The one end of a stream; more than one usage, or none, would show."""
    try:
        events = [event async for event in client.generate("w5", **options)]
    except errors.HeadwaterError as error:
        return type(error).__name__
    assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]
    finishes = [output.finish for event in events for output in event.outputs if output.finish]
    assert len(finishes) == 1
    return finishes[0].reason


async def test_every_stream_ends_once_when_a_worker_dies(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(3)
    streams = [asyncio.create_task(ending(client)) for _ in range(40)]
    await until(lambda: len(worker.submitted) == 40)
    await worker.kill()
    assert Counter(await asyncio.gather(*streams)) == {"WorkerLost": 40}


async def test_every_stream_ends_once_when_a_worker_falls_silent(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(3)
    streams = [asyncio.create_task(ending(client)) for _ in range(40)]
    await until(lambda: len(worker.submitted) == 40)
    worker.silent = True
    started = asyncio.get_running_loop().time()
    assert Counter(await asyncio.gather(*streams)) == {"WorkerLost": 40}
    assert asyncio.get_running_loop().time() - started < 3


async def test_loss_names_the_worker_and_is_retryable(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(1)
    events = client.generate("w5")
    await anext(events)
    await worker.kill()
    with pytest.raises(errors.WorkerLost, match="w0") as raised:
        await anext(events)
    assert raised.value.retryable


async def test_the_other_worker_takes_over(cluster: Cluster, client: Client) -> None:
    await cluster.add_worker("w1", answer(30, delay_s=0.01))
    cluster.workers["w0"].script = answer(30, delay_s=0.01)
    streams = [asyncio.create_task(ending(client, max_tokens=30)) for _ in range(20)]
    await until(lambda: sum(len(worker.submitted) for worker in cluster.workers.values()) == 20)
    assert [len(worker.submitted) for worker in cluster.workers.values()] == [10, 10]
    await cluster.workers["w0"].kill()
    assert Counter(await asyncio.gather(*streams)) == {"length": 20}
    assert len(cluster.workers["w1"].submitted) == 20


async def test_a_worker_that_comes_back_is_used_again(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    await worker.kill()
    await worker.start()
    await until(lambda: worker.num_sessions == 2)
    assert await ending(client, max_tokens=2) == "length"


async def test_a_silent_worker_that_speaks_again_is_used_again(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.silent = True
    await until(lambda: worker.num_sessions > 1)
    worker.silent = False
    await until_async(lambda: _is_served(client))


async def _is_served(client: Client) -> bool:
    return await ending(client, max_tokens=2) == "length"


async def test_a_pause_of_the_router_is_not_the_workers_silence(cluster: Cluster, client: Client) -> None:
    import time

    worker = cluster.workers["w0"]
    worker.script = answer(10, delay_s=0.02)
    stream = asyncio.create_task(ending(client, max_tokens=10))
    await until(lambda: bool(worker.submitted))
    time.sleep(1.0)  # noqa: ASYNC251  twice the watchdog
    assert await stream == "length"
    assert worker.num_sessions == 1


async def test_a_worker_of_another_model_is_refused(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    stranger = ScriptedWorker("w9", answer(1), model="other")
    cluster.stack.push_async_callback(stranger.kill)
    cluster.server.set_workers({**cluster.members, "w9": await stranger.start()})
    await until(lambda: stranger.num_sessions > 1)
    assert "'other'" in caplog.text
    client = await cluster.client()
    assert (await client.models())[0].num_workers == 1


async def test_a_removed_worker_finishes_what_it_holds(cluster: Cluster, client: Client) -> None:
    leaving = cluster.workers["w0"]
    leaving.script = answer(20, delay_s=0.02)
    streams = [asyncio.create_task(ending(client, max_tokens=20)) for _ in range(5)]
    await until(lambda: len(leaving.submitted) == 5)
    staying = await cluster.add_worker("w1", answer(2))
    cluster.remove_worker("w0")
    assert await ending(client, max_tokens=2) == "length"
    assert len(staying.submitted) == 1
    assert await asyncio.gather(*streams) == ["length"] * 5
    await until(lambda: not leaving._out)  # the session has closed


async def test_a_draining_worker_gets_no_new_work(cluster: Cluster, client: Client) -> None:
    other = await cluster.add_worker("w1", answer(2))
    draining = cluster.workers["w0"]
    draining.set_load(Load(draining=True))
    await asyncio.sleep(0.1)
    for _ in range(4):
        assert await ending(client, max_tokens=2) == "length"
    assert (len(draining.submitted), len(other.submitted)) == (0, 4)


async def test_lost_work_before_the_first_token_is_repeated_by_the_client(cluster: Cluster) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang()
    client = await cluster.client(retry=None)
    task = asyncio.create_task(ending(client, max_tokens=2))
    await until(lambda: bool(worker.submitted))
    await worker.kill()
    worker.script = answer(2)
    await worker.start()
    assert await task == "length"


async def test_router_stop_lets_streams_end_and_refuses_new_ones(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = answer(10, delay_s=0.03)
    stream = asyncio.create_task(ending(client, max_tokens=10))
    await until(lambda: bool(worker.submitted))
    stop = asyncio.create_task(cluster.server.stop(5))
    await asyncio.sleep(0.05)
    assert await ending(client) == "Draining"
    assert await stream == "length"
    await stop


async def test_router_stop_ends_what_outlives_the_grace(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(1)
    stream = asyncio.create_task(ending(client))
    await until(lambda: bool(worker.submitted))
    await cluster.server.stop(0.1)
    assert await stream == "Draining"
