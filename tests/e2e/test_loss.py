"""Workers that die or hang in mid-stream: every stream has exactly one end, and the cluster heals."""

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest

from cluster.lifecycle import Cluster
from protos.client import Client
from protos.errors import WorkerLost
from tests.e2e.conftest import NUM_WORKERS, worker_processes

NUM_STREAMS = 12
NUM_TOKENS = 400


async def ends(client: Client, index: int, started: asyncio.Queue[int]) -> list[str]:
    """Everything that ended this stream."""
    found: list[str] = []
    first = True
    try:
        async for event in client.generate("def f", max_tokens=NUM_TOKENS, ignore_eos=True, seed=index):
            found += [o.finish.reason for o in event.outputs if o.finish]
            if first:
                started.put_nowait(index)
                first = False
    except WorkerLost:
        found.append("WorkerLost")
    return found


async def healed(client: Client) -> None:
    """Wait until every worker is back and serves."""
    async with asyncio.timeout(60):
        while [model.num_workers for model in await client.models()] != [NUM_WORKERS]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    answers = await asyncio.gather(*(client.complete("x", max_tokens=100, ignore_eos=True) for _ in range(8)))
    assert len({answer.prompt.worker_id for answer in answers}) == NUM_WORKERS


async def disturb(client: Client, signals: Sequence[signal.Signals]) -> list[list[str]]:
    """Start streams on every worker, send the signals to one of them, and collect how each stream ended."""
    started: asyncio.Queue[int] = asyncio.Queue()
    tasks = [asyncio.create_task(ends(client, index, started)) for index in range(NUM_STREAMS)]
    for _ in range(NUM_STREAMS):
        await asyncio.wait_for(started.get(), 30)
    victim = worker_processes()[0]
    for number in signals:
        os.kill(victim.pid, number)
    try:
        async with asyncio.timeout(60):
            return await asyncio.gather(*tasks)
    finally:
        if victim.is_running():
            victim.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
async def test_a_lost_worker_ends_each_of_its_streams_once(
    client: Client, cluster: Cluster, how: signal.Signals
) -> None:
    await healed(client)
    found = await disturb(client, [how])
    assert all(len(one) == 1 for one in found), found
    kinds = {one[0] for one in found}
    assert kinds == {"WorkerLost", "length"}, kinds
    await healed(client)
