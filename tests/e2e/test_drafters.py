"""The pool in a cluster: its drafts are used, they change no text, and losing it costs nobody anything."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cluster.lifecycle import Cluster
from protos.client import Client, Output
from tests.e2e.conftest import NUM_WORKERS, drafter_processes, worker_processes
from tests.e2e.test_generate import idle
from tests.metrics import scrape

NUM_TOKENS = 300
PROMPTS = [f"def f{i}(a, b):\n    return a\n\ndef g{i}(a, b):\n    return a\n\n" for i in range(6)]
WAYS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.7, "seed": 5}]

Answers = list[tuple[Output, ...]]


async def say(client: Client, **options: Any) -> Answers:
    """The outputs of every prompt in every way, all at once."""
    calls = [
        client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **way, **options)
        for prompt in PROMPTS
        for way in WAYS
    ]
    return [answer.outputs for answer in await asyncio.gather(*calls)]


@pytest.fixture(scope="module")
def plain(cluster: Cluster) -> Answers:
    """What is said without any drafts."""

    async def ask() -> Answers:
        async with Client(cluster.endpoints[0].grpc, timeout_s=60) as client:
            return await say(client, speculation="off")

    return asyncio.run(ask())


def by_worker(cluster: Cluster, metric: str, **labels: str) -> list[float]:
    return [scrape(address, **labels)[metric] for address in cluster.worker_metrics()]


def from_pool(cluster: Cluster) -> tuple[float, float]:
    """Tokens of the pool's that were verified, and of those, right."""
    names = ("headwater_drafted_tokens_total", "headwater_accepted_draft_tokens_total")
    drafted, accepted = (sum(by_worker(cluster, name, drafter="pool")) for name in names)
    return drafted, accepted


def of_drafter(cluster: Cluster, metric: str) -> float:
    """As the drafter itself tells."""
    [address] = cluster.drafter_metrics()
    return scrape(address)[metric]


def is_connected(cluster: Cluster) -> bool:
    """Whether every worker has its drafter, as both sides say."""
    try:
        num_targets = of_drafter(cluster, "headwater_drafter_targets")
    except (OSError, ValueError):  # there is none, or one that is gone
        return False
    return num_targets == NUM_WORKERS and by_worker(cluster, "headwater_pool_drafters") == [1] * NUM_WORKERS


async def speaking_until(client: Client, condition: Callable[[], bool], timeout_s: float = 90.0) -> Answers:
    """Have streams until the condition holds: workers turn to the pool only when they have work. The last answers."""
    answers: Answers = []
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):
            answers = await say(client)
    return answers


async def drafted_again(client: Client, cluster: Cluster) -> Answers:
    """Answers of a time in which drafts of the pool were right."""
    _, before = await asyncio.to_thread(from_pool, cluster)
    return await speaking_until(client, lambda: from_pool(cluster)[1] > before)


async def disturbed(client: Client, cluster: Cluster, act: Callable[[], None]) -> Answers:
    """Streams in whose midst `act` was done, when the drafter had drafted for them."""

    def num_drafts() -> float:
        return of_drafter(cluster, "headwater_drafter_drafts_total")

    await speaking_until(client, lambda: is_connected(cluster))
    async with asyncio.timeout(90):
        while True:
            before = await asyncio.to_thread(num_drafts)
            streams = asyncio.create_task(say(client))
            while not streams.done():
                if await asyncio.to_thread(num_drafts) > before and not streams.done():
                    act()
                    return await streams
            await streams


async def nothing_is_kept(client: Client, cluster: Cluster) -> None:
    """Neither workers nor drafter hold anything for those who are gone; a late drafter is told of some at the next."""

    def is_clear() -> bool:
        return is_connected(cluster) and of_drafter(cluster, "headwater_drafter_sequences") == 0

    await speaking_until(client, is_clear)
    await idle(cluster)


async def test_the_pool_drafts_and_changes_no_text(client: Client, cluster: Cluster, plain: Answers) -> None:
    def check() -> None:
        assert is_connected(cluster)
        assert of_drafter(cluster, "headwater_drafter_targets") == NUM_WORKERS
        assert of_drafter(cluster, "headwater_drafter_drafts_total") > 0
        assert of_drafter(cluster, "headwater_drafter_tokens_total") > 0

    await speaking_until(client, lambda: from_pool(cluster)[1] > 0)
    assert await say(client) == plain
    await asyncio.to_thread(check)
    await nothing_is_kept(client, cluster)


async def test_a_killed_drafter_is_replaced_and_no_stream_notices(
    client: Client, cluster: Cluster, plain: Answers
) -> None:
    [victim], workers = drafter_processes(), worker_processes()
    assert await disturbed(client, cluster, victim.kill) == plain

    def is_replaced() -> bool:
        successors = [process for process in drafter_processes() if process != victim]
        return len(successors) == 1 and is_connected(cluster)

    await speaking_until(client, is_replaced)
    assert await drafted_again(client, cluster) == plain
    assert worker_processes() == workers
    await nothing_is_kept(client, cluster)


async def test_a_hung_drafter_keeps_no_stream_waiting(client: Client, cluster: Cluster, plain: Answers) -> None:
    [victim], workers = drafter_processes(), worker_processes()
    try:
        assert await disturbed(client, cluster, victim.suspend) == plain
        assert await say(client) == plain
    finally:
        if victim.is_running():
            victim.resume()
    await speaking_until(client, lambda: is_connected(cluster))
    assert await drafted_again(client, cluster) == plain
    assert worker_processes() == workers
    await nothing_is_kept(client, cluster)
