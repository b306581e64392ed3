"""A minute of everything at once: streams, cancels, refusals and dying workers. No answer is lost, nothing is left.

And many short answers while the drafter dies again and again: all of them are those of a run without drafts.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from cluster.lifecycle import Cluster
from protos.client import Client, Output, RetryPolicy
from protos.errors import HeadwaterError, InvalidRequest, Overloaded
from tests.e2e.conftest import drafter_processes, worker_processes
from tests.e2e.test_drafters import from_pool, is_connected, nothing_is_kept, speaking_until
from tests.e2e.test_generate import idle
from tests.e2e.test_loss import healed

SOAK_S = 60.0
KILL_EVERY_S = 20.0
NUM_CLIENTS = 12

NUM_REQUESTS = 2000
NUM_AT_ONCE = 16
KILL_DRAFTER_S = (2.0, 5.0)  # between two kills
PROMPTS = [
    "def f(a, b):\n    return a\n\ndef g(a, b):\n    return a\n\n",  # it goes on as it began
    "import os\nimport re\nimport sys\n",
    "class Cache:\n" + "".join(f"    def method_{i}(self):\n        return {i}\n" for i in range(12)),
    "# Copyright",
    "x = [1, 2, 3, ",
]


class Tally:
    """How calls ended."""

    def __init__(self) -> None:
        self.served = self.cancelled = self.refused = self.overloaded = 0


async def one_call(client: Client, draw: random.Random, tally: Tally) -> None:
    """Send one request of a random kind, and check that it has exactly one end of a kind it may have."""
    kind = draw.choice(["plain", "plain", "several", "cancel", "bad"])
    prompt = "def f" * draw.randint(1, 60)
    max_tokens = draw.randint(1, 80)
    num_outputs = draw.randint(2, 4) if kind == "several" else 1
    stream = client.generate(
        prompt,
        n=num_outputs,
        top_p=7.0 if kind == "bad" else 0.9,
        max_tokens=max_tokens,
        ignore_eos=True,
    )
    ends = 0
    try:
        async for event in stream:
            ends += sum(output.finish is not None for output in event.outputs)
            if kind == "cancel":
                await stream.aclose()
                tally.cancelled += 1
                return
    except InvalidRequest:
        assert kind == "bad"
        tally.refused += 1
    except Overloaded:
        tally.overloaded += 1
    else:
        assert kind != "bad"
        assert ends == num_outputs
        tally.served += 1


async def keep_calling(client: Client, seed: int, until: float, tally: Tally) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        try:
            await one_call(client, draw, tally)
        except HeadwaterError as error:
            raise AssertionError(f"an end that is not allowed: {error!r}") from error


async def keep_killing(until: float) -> int:
    num_killed = 0
    while time.monotonic() + KILL_EVERY_S < until:
        await asyncio.sleep(KILL_EVERY_S)
        worker_processes()[num_killed % 2].kill()
        num_killed += 1
    return num_killed


@pytest.mark.slow
async def test_a_minute_of_everything(target: str, cluster: Cluster) -> None:
    async with Client(target, timeout_s=60, retry=RetryPolicy(max_attempts=1)) as client:
        await healed(client)
        until, tally = time.monotonic() + SOAK_S, Tally()
        killer = asyncio.create_task(keep_killing(until))
        await asyncio.gather(*(keep_calling(client, seed, until, tally) for seed in range(NUM_CLIENTS)))
        assert await killer >= 2
        assert tally.served > 50
        assert tally.cancelled > 5
        assert tally.refused > 5
        await healed(client)
        await idle(cluster)


def some_requests(draw: random.Random) -> list[dict[str, Any]]:
    """Short requests of all kinds, each with only one right answer."""
    greedy = {"temperature": 0.0}
    return [
        {
            "prompt": draw.choice(PROMPTS) + draw.choice(["", "def ", "    ", f"{draw.randint(0, 99)}"]),
            "max_tokens": draw.randint(16, 48),
            "ignore_eos": draw.random() < 0.5,
            **draw.choice([greedy, {"temperature": draw.choice([0.5, 1.0]), "top_p": 0.95, "seed": number}]),
            **draw.choice([{}, {}, {"n": 2, "stop": ["\n\n", "return"]}]),
        }
        for number in range(NUM_REQUESTS)
    ]


async def answers(client: Client, asked: Sequence[dict[str, Any]], **options: Any) -> list[tuple[Output, ...]]:
    """To each request, a bounded number at once. Raises what any of them raises."""
    found: list[tuple[Output, ...]] = [()] * len(asked)

    async def answer_some(left: Iterator[tuple[int, dict[str, Any]]]) -> None:
        for number, request in left:
            found[number] = (await client.complete(**request, **options)).outputs

    left = iter(enumerate(asked))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_AT_ONCE):
            tasks.create_task(answer_some(left))
    return found


async def keep_killing_drafters(done: asyncio.Event) -> int:
    """How many died."""
    draw, killed = random.Random(2), set()
    while not done.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), draw.uniform(*KILL_DRAFTER_S))
        for process in [] if done.is_set() else await asyncio.to_thread(drafter_processes):
            process.kill()
            killed.add(process.pid)
    return len(killed)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_thousand_answers_while_the_drafter_dies(target: str, cluster: Cluster) -> None:
    asked, done = some_requests(random.Random(1)), asyncio.Event()
    async with Client(target, timeout_s=60, retry=RetryPolicy(max_attempts=1)) as client:
        await healed(client)
        plain = await answers(client, asked, speculation="off")
        before = await asyncio.to_thread(from_pool, cluster)
        killer = asyncio.create_task(keep_killing_drafters(done))
        try:
            drafted = await answers(client, asked)
        finally:
            done.set()
            num_killed = await killer
        after = await asyncio.to_thread(from_pool, cluster)
        assert [number for number in range(NUM_REQUESTS) if drafted[number] != plain[number]] == []
        assert num_killed >= 2
        assert after[0] > before[0]
        assert after[1] > before[1]
        await speaking_until(client, lambda: is_connected(cluster))
        await nothing_is_kept(client, cluster)
