"""Messages are shared among the streams that write: the router counts streams, and its workers keep the interval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from router.config import StreamingSection
from router.pacer import Pacer
from tests.router.conftest import Cluster, until
from tests.router.scripted_worker import hang


def test_messages_are_shared_among_the_streams_that_write() -> None:
    told: list[float] = []
    pacer = Pacer(StreamingSection(messages_per_s=100, max_interval_s=0.04), told.append)
    with pacer.stream():
        assert pacer.interval_s == 0  # a stream alone has no other to share with
        with pacer.stream(), pacer.stream():
            assert pacer.interval_s == 0.03
            with pacer.stream(), pacer.stream():
                assert pacer.interval_s == 0.04
        assert pacer.interval_s == 0
    assert told == [0.02, 0.03, 0.04, 0.03, 0.02, 0]


async def test_workers_are_told_when_streams_come_and_go(start_cluster: Callable[..., Any]) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", hang(1))
    client = await cluster.client()
    reading = [asyncio.create_task(client.complete([5, 6])) for _ in range(40)]
    await until(lambda: len(worker.submitted) == 40)
    await until(lambda: worker.interval_us is not None and 32_000 <= worker.interval_us <= 40_000)
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    await until(lambda: worker.interval_us == 0)


async def test_a_worker_that_comes_later_is_told_too(start_cluster: Callable[..., Any]) -> None:
    cluster: Cluster = await start_cluster()
    first = await cluster.add_worker("w0", hang(1))
    client = await cluster.client()
    reading = [asyncio.create_task(client.complete([5, 6])) for _ in range(20)]
    await until(lambda: len(first.submitted) == 20)
    second = await cluster.add_worker("w1", hang(1))
    await until(lambda: second.interval_us == 20_000)
    await second.kill()
    second.interval_us = None
    await second.start()
    await until(lambda: second.interval_us == 20_000)  # a new session knows nothing of the last one
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
