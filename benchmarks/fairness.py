"""What one tenant's flood does to another: time to first token of a polite tenant, alone and beside a flood.

    python -m benchmarks.fairness              # 200 requests at once by one tenant, 8 clients of another
    python -m benchmarks.fairness --rounds 5 --json out.json

A whole cluster on this machine, with a tenants file. The polite tenant keeps a few streams going, as it does in any
case; `flooded` is the same while the other tenant sends its requests all at once and as many again as they end. Clients
share the cores with the cluster, so the flood's clients cost the polite one time, too.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from benchmarks.percentiles import percentile
from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client, RetryPolicy
from protos.errors import HeadwaterError, Overloaded
from router.api_key import key_hash, new_key

POLITE, FLOOD = "polite", "flood"


@dataclass(frozen=True, slots=True)
class Load:
    """What the two tenants do."""

    num_flooding: int  # the flood's requests at once; 0: none
    num_polite: int  # the polite tenant's streams at once
    num_asked: int  # its requests in all
    num_prompt_tokens: int
    num_tokens: int  # of each answer


class Contender:
    """A running cluster with two tenants. Owned by the arm."""

    def __init__(self, num_workers: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hw-fairness-")
        self._keys = {name: new_key() for name in (POLITE, FLOOD)}
        tenants = Path(self._folder.name) / "tenants.yaml"
        entries = {name: {"keys": [key_hash(key)]} for name, key in self._keys.items()}
        tenants.write_text(yaml.safe_dump({"tenants": entries}))
        self._cluster = Cluster(
            load(
                None,
                [
                    f"cluster.num_workers={num_workers}",
                    "cluster.drain_timeout_s=2",
                    "router.grpc.port=0",
                    "router.metrics.port=0",
                    f"router.tenants.file={tenants}",
                    "worker.metrics.port=0",
                    "worker.model.dtype=bfloat16",
                    "worker.engine.threads=1",
                ],
            )
        )

    async def setup(self) -> None:
        await asyncio.to_thread(self._cluster.start)

    async def teardown(self) -> None:
        await asyncio.to_thread(self._cluster.stop)
        self._folder.cleanup()

    async def measure(self, workload: Workload[Load]) -> Measured:
        """The polite tenant's times to first token, with or without a flood beside it."""
        load, draw = workload.params, random.Random(workload.seed)
        flood = asyncio.create_task(self._flood(load, draw))
        try:
            if load.num_flooding:
                await asyncio.sleep(1.0)  # until it fills every queue
            first_tokens, errors = await self._polite(load, draw)
        finally:
            flood.cancel()
            await asyncio.gather(flood, return_exceptions=True)
        values = {"ttft_p50_s": percentile(first_tokens, 50), "ttft_p90_s": percentile(first_tokens, 90)}
        return Measured(values, {"errors": errors} if errors else {})

    async def _polite(self, load: Load, draw: random.Random) -> tuple[list[float], int]:
        found: list[float] = []
        num_errors = 0
        left = iter(range(load.num_asked))

        async def keep_asking(client: Client) -> None:
            nonlocal num_errors
            for _ in left:
                try:
                    found.append(await _first_token_s(client, load, draw))
                except HeadwaterError:
                    num_errors += 1

        async with self._client(POLITE) as client, asyncio.TaskGroup() as tasks:
            for _ in range(load.num_polite):
                tasks.create_task(keep_asking(client))
        return found, num_errors

    async def _flood(self, load: Load, draw: random.Random) -> None:
        """Until cancelled."""

        async def pour(client: Client) -> None:
            while True:
                try:
                    await _first_token_s(client, load, draw)
                except Overloaded as error:
                    await asyncio.sleep(error.retry_after_s or 0.1)

        async with self._client(FLOOD) as client, asyncio.TaskGroup() as tasks:
            for _ in range(load.num_flooding):
                tasks.create_task(pour(client))

    def _client(self, tenant: str) -> Client:
        target = self._cluster.endpoints[0].grpc
        return Client(target, api_key=self._keys[tenant], retry=RetryPolicy(max_attempts=1))


async def _first_token_s(client: Client, load: Load, draw: random.Random) -> float:
    """Ask something that nobody has asked before, read all of the answer, and say when its first token came."""
    prompt = [draw.randrange(10, 1000) for _ in range(load.num_prompt_tokens)]
    begin, first = time.perf_counter(), 0.0
    async for event in client.generate(token_ids=prompt, max_tokens=load.num_tokens, ignore_eos=True, temperature=0.0):
        if not first and any(output.token_ids for output in event.outputs):
            first = time.perf_counter() - begin
    return first


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, rounds=3)
    parser.add_argument("--workers", type=positive, default=2, help="workers (default 2)")
    parser.add_argument("--flood", type=positive, default=200, help="the flood's requests at once (default 200)")
    parser.add_argument("--polite", type=positive, default=8, help="the polite tenant's streams at once (default 8)")
    parser.add_argument("--asked", type=positive, default=48, help="its requests in a round (default 48)")
    parser.add_argument("--prompt", type=positive, default=256, help="prompt tokens (default 256)")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of each answer (default 64)")
    args = parser.parse_args(arguments)
    calm = Load(0, args.polite, args.asked, args.prompt, args.tokens)
    contender = Contender(args.workers)
    flooded = Load(args.flood, args.polite, args.asked, args.prompt, args.tokens)
    benchmark = Benchmark(
        "fairness",
        [Workload("alone", calm), Workload("flooded", flooded)],
        [Arm("cluster", contender.measure, setup=contender.setup, teardown=contender.teardown)],
        config={"workers": args.workers},
    )
    return harness.main(benchmark, read_options(args))


if __name__ == "__main__":
    sys.exit(main())
