"""What a prefix costs the second worker: time to first token where it is computed, taken from another, or cached.

    python -m benchmarks.exchange                   # two workers, prefixes of 1K, 4K and 16K tokens
    python -m benchmarks.exchange --prefix 4096 --rounds 9

A whole cluster on this machine. Each round makes a new prefix of random tokens. `computed`: nobody has it. Then that
worker is drained at the router, so that the same prefix with another end goes to the second worker: `fetched`, if its
`cached_tokens` say so, else an error. `cached`: once more there. All else is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client, GenerateEvent, RetryPolicy

NUM_END_TOKENS = 16  # behind the prefix, new in each request
DEFAULT_PREFIXES = (1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class Load:
    """One prefix."""

    num_tokens: int


class Contender:
    """A running cluster of two workers. Owned by the arm."""

    def __init__(self, dtype: str) -> None:
        self._cluster = Cluster(
            load(
                None,
                [
                    "cluster.num_workers=2",
                    "cluster.drain_timeout_s=2",
                    "router.grpc.port=0",
                    "router.metrics.port=0",
                    "worker.metrics.port=0",
                    f"worker.model.dtype={dtype}",
                    "worker.engine.threads=1",
                    "worker.engine.kv.num_pages=4096",
                ],
            )
        )

    async def setup(self) -> None:
        await asyncio.to_thread(self._cluster.start)

    async def teardown(self) -> None:
        await asyncio.to_thread(self._cluster.stop)

    async def measure(self, workload: Workload[Load]) -> Measured:
        """One prefix in the three ways."""
        draw = random.Random(workload.seed)
        prefix = _tokens(draw, workload.params.num_tokens)
        async with Client(self._cluster.endpoints[0].grpc, retry=RetryPolicy(max_attempts=1)) as client:
            computed_s, first = await _ask(client, prefix + _tokens(draw, NUM_END_TOKENS))
            await asyncio.sleep(0.3)  # the router hears what is cached
            await client.drain(first.worker_id)
            try:
                fetched_s, second = await _ask(client, prefix + _tokens(draw, NUM_END_TOKENS))
                cached_s, third = await _ask(client, prefix + _tokens(draw, NUM_END_TOKENS))
            finally:
                await client.drain(first.worker_id, resume=True)
        is_fetched = second.worker_id != first.worker_id and second.cached_tokens >= len(prefix) // 2
        values = {
            "computed_ttft_ms": 1e3 * computed_s,
            "fetched_ttft_ms": 1e3 * fetched_s,
            "cached_ttft_ms": 1e3 * cached_s,
            "fetched_share": fetched_s / computed_s,
        }
        return Measured(values, {} if is_fetched and third.cached_tokens else {"not fetched": 1})


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered, and what it had."""

    worker_id: str
    cached_tokens: int


async def _ask(client: Client, prompt: Sequence[int]) -> tuple[float, Answer]:
    """Seconds to the first token, and who made it."""
    begin, first_s = time.perf_counter(), 0.0
    events: list[GenerateEvent] = []
    async for event in client.generate(token_ids=prompt, max_tokens=2, ignore_eos=True, temperature=0.0):
        first_s = first_s or time.perf_counter() - begin
        events.append(event)
    prompt_info, usage = events[0].prompt, events[-1].usage
    assert prompt_info is not None
    assert usage is not None
    return first_s, Answer(prompt_info.worker_id, usage.cached_tokens)


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(10, 4000) for _ in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, rounds=5)
    parser.add_argument("--prefix", type=positive, help="tokens (default 1024, 4096 and 16384)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")
    args = parser.parse_args(arguments)
    contender = Contender(args.dtype)
    prefixes = (args.prefix,) if args.prefix else DEFAULT_PREFIXES
    benchmark = Benchmark(
        "exchange",
        [Workload(f"prefix of {num_tokens}", Load(num_tokens)) for num_tokens in prefixes],
        [Arm("cluster", contender.measure, setup=contender.setup, teardown=contender.teardown)],
        config={"dtype": args.dtype},
    )
    return harness.main(benchmark, read_options(args))


if __name__ == "__main__":
    sys.exit(main())
