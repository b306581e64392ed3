"""Workers die or hang in mid-stream: every answer is what it would have been, and the cluster heals."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from cluster.lifecycle import Cluster
from protos.client import Client, Completion
from tests.e2e.conftest import NUM_WORKERS, worker_processes
from tests.metrics import scrape

NUM_TOKENS = 160
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "seed": 5},
    "several": {"temperature": 1.0, "seed": 7, "n": 3},
    "stop strings": {"temperature": 0.0, "stop": ["\n        return", "\n\n\n"]},
    "logprobs": {"temperature": 0.7, "seed": 9, "logprobs": 2, "prompt_logprobs": 1},
    "penalties": {"temperature": 0.9, "seed": 11, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
}
PROMPTS = [
    "def fold(items, start):\n    ",
    "class Reader:\n    def __init__(self",
    "import os\nimport re\n\n\n",
    "def f",
]
ASKS = [(name, prompt) for name in WAYS for prompt in PROMPTS]


async def healed(client: Client) -> None:
    """Wait until every worker is back and serves."""
    async with asyncio.timeout(60):
        while [model.num_workers for model in await client.models()] != [NUM_WORKERS]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    answers = await asyncio.gather(*(client.complete("x", max_tokens=100, ignore_eos=True) for _ in range(8)))
    assert len({answer.prompt.worker_id for answer in answers}) == NUM_WORKERS


async def answers(client: Client, *, num_tokens: int = NUM_TOKENS) -> list[Completion]:
    """Of every prompt in every way, all at once."""
    calls = [
        client.complete(prompt, max_tokens=num_tokens, ignore_eos="stop" not in WAYS[name], **WAYS[name])
        for name, prompt in ASKS
    ]
    return await asyncio.gather(*calls)


def said(completion: Completion) -> Any:
    """What must not depend on where it was made."""
    outputs = [
        (output.text, output.token_ids, output.finish, [position.token_id for position in output.logprobs])
        for output in completion.outputs
    ]
    usage = completion.usage
    return outputs, len(completion.prompt_logprobs), usage.prompt_tokens, usage.completion_tokens


async def counted(cluster: Cluster, name: str, **labels: str) -> float:
    return (await asyncio.to_thread(scrape, cluster.endpoints[0].metrics, **labels)).get(name, 0.0)


async def disturb(client: Client, cluster: Cluster, number: signal.Signals) -> list[Completion]:
    """The same answers, while one of the workers gets a signal in the middle of them."""
    num_before = await counted(cluster, "headwater_generation_tokens_total")
    task = asyncio.create_task(answers(client))
    while await counted(cluster, "headwater_generation_tokens_total") < num_before + NUM_TOKENS:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    victim = worker_processes()[0]
    os.kill(victim.pid, number)
    try:
        async with asyncio.timeout(60):
            return await task
    finally:
        if victim.is_running():
            victim.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
async def test_the_answers_of_a_lost_worker_are_those_of_an_undisturbed_one(
    client: Client, cluster: Cluster, how: signal.Signals
) -> None:
    await healed(client)
    undisturbed = [said(completion) for completion in await answers(client)]
    num_before = await counted(cluster, "headwater_recoveries_total", outcome="resumed")
    for (name, prompt), completion, before in zip(ASKS, await disturb(client, cluster, how), undisturbed, strict=True):
        assert said(completion) == before, (name, prompt)
    assert await counted(cluster, "headwater_recoveries_total", outcome="resumed") > num_before
    await healed(client)
