"""Pinned prefixes on real workers: every one has them, a new one before it gets work."""

from __future__ import annotations

import asyncio

from cluster.lifecycle import Cluster
from protos.client import Client
from tests.e2e.conftest import NUM_WORKERS, worker_processes

PREFIX = "# Everybody begins with this\n" + "".join(f"def rule_{i}(x):\n    return x * {i}\n\n" for i in range(24))


async def everywhere(client: Client) -> None:
    """Wait until every worker has the only pin."""
    async with asyncio.timeout(60):
        while [pin.num_workers for pin in await client.pins()] != [NUM_WORKERS]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_pinned_prefix_is_on_every_worker_and_on_those_that_come(client: Client, cluster: Cluster) -> None:
    pinned = await client.pin_prefix(PREFIX)
    try:
        await everywhere(client)
        answers = await asyncio.gather(*(client.complete(f"{PREFIX}# {i}", max_tokens=64) for i in range(8)))
        assert min(answer.usage.cached_tokens for answer in answers) >= pinned.num_tokens
        victim = worker_processes()[0]
        victim.kill()
        victim.wait(10)
        await everywhere(client)
        later = await asyncio.gather(*(client.complete(f"{PREFIX}# new {i}", max_tokens=64) for i in range(8)))
        assert {answer.prompt.worker_id for answer in later} != {answer.prompt.worker_id for answer in answers}
        assert min(answer.usage.cached_tokens for answer in later) >= pinned.num_tokens
    finally:
        assert await client.unpin_prefix(pinned.pin_id)
    assert await client.pins() == ()
