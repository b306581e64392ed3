"""A minute of everything at once: streams, cancels, refusals and dying workers. Nothing is lost, nothing is left."""

import asyncio
import random
import time

import pytest

from cluster.lifecycle import Cluster
from protos.client import Client, RetryPolicy
from protos.errors import HeadwaterError, InvalidRequest, Overloaded, WorkerLost
from tests.e2e.conftest import worker_processes
from tests.e2e.test_generate import idle
from tests.e2e.test_loss import healed

SOAK_S = 60.0
KILL_EVERY_S = 20.0
NUM_CLIENTS = 12


class Tally:
    """How calls ended."""

    def __init__(self) -> None:
        self.served = self.cancelled = self.refused = self.lost = 0


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
    except (WorkerLost, Overloaded):
        tally.lost += 1
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
        assert tally.lost > 0
        await healed(client)
        await idle(cluster)
