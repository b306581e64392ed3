"""What clients feel when a worker dies or hangs: the longest wait between two tokens, and whether the text is right.

    python -m benchmarks.recovery              # 3 workers, 24 streams, one worker killed or stopped in their middle
    python -m benchmarks.recovery --rounds 5 --json out.json

A whole cluster on this machine. Every stream's text is compared with the one it has when nobody is disturbed: a wrong
one is an error. The wait is measured in the client, which shares the cores with everything else; `nobody` is the same
load undisturbed. float32, so that the text must be equal whoever takes over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import psutil

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from cluster.config import HeadwaterConfig, load
from cluster.lifecycle import Cluster
from protos.client import Client, RetryPolicy
from protos.errors import HeadwaterError

Fault = Literal["nobody", "killed", "hung"]
FAULTS: tuple[Fault, ...] = ("nobody", "killed", "hung")
PROMPTS = ("def fold(items, start):\n    ", "class Reader:\n    def __init__(self", "import os\nimport re\n\n", "def f")
HEAL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """Streams, and what happens to a worker in their middle."""

    fault: Fault
    num_streams: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Heard:
    """One stream as its client saw it."""

    text: str
    worst_gap_s: float  # between two messages with tokens
    error: str = ""


class Contender:
    """A running cluster, driven and disturbed. Owned by the arm."""

    def __init__(self, config: HeadwaterConfig) -> None:
        self._config = config
        self._cluster = Cluster(config)
        self._undisturbed: dict[Load, list[str]] = {}

    async def setup(self) -> None:
        await asyncio.to_thread(self._cluster.start)

    async def teardown(self) -> None:
        await asyncio.to_thread(self._cluster.stop)

    async def measure(self, workload: Workload[Load]) -> Measured:
        """Drive the streams once, with the fault when a third of their tokens have come."""
        load = workload.params
        async with Client(self._cluster.endpoints[0].grpc, retry=RetryPolicy(max_attempts=1)) as client:
            await self._healed(client)
            expected = await self._expected(client, load)
            heard = await self._drive(client, load)
            await self._healed(client)
        errors = {one.error: sum(other.error == one.error for other in heard) for one in heard if one.error}
        pairs = zip(heard, expected, strict=True)
        if num_wrong := sum(not one.error and one.text != text for one, text in pairs):
            errors["wrong text"] = num_wrong
        gaps = sorted(one.worst_gap_s for one in heard)
        return Measured({"worst_gap_s": gaps[-1], "median_gap_s": gaps[len(gaps) // 2]}, errors)

    async def _expected(self, client: Client, load: Load) -> list[str]:
        """The texts when nobody is disturbed; they are the same for every fault."""
        calm = Load("nobody", load.num_streams, load.num_tokens)
        if calm not in self._undisturbed:
            self._undisturbed[calm] = [one.text for one in await self._drive(client, calm)]
        return self._undisturbed[calm]

    async def _drive(self, client: Client, load: Load) -> list[Heard]:
        num_heard, third = 0, asyncio.Event()

        def count(num_tokens: int) -> None:
            nonlocal num_heard
            num_heard += num_tokens
            if num_heard >= load.num_streams * load.num_tokens // 3:
                third.set()

        streams = [asyncio.create_task(_listen(client, index, load, count)) for index in range(load.num_streams)]
        victim = None
        if load.fault != "nobody":
            await third.wait()
            victim = _strike(load.fault)
        try:
            return await asyncio.gather(*streams)
        finally:
            if victim is not None and victim.is_running():
                victim.kill()

    async def _healed(self, client: Client) -> None:
        async with asyncio.timeout(HEAL_TIMEOUT_S):
            while [model.num_workers for model in await client.models()] != [self._config.cluster.num_workers]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


async def _listen(client: Client, index: int, load: Load, count: Callable[[int], None]) -> Heard:
    """Read one stream to its end; greedy and sampled ones take turns."""
    texts: list[str] = []
    last, worst_s = None, 0.0
    try:
        async for event in client.generate(
            PROMPTS[index % len(PROMPTS)],
            max_tokens=load.num_tokens,
            ignore_eos=True,
            temperature=0.8 * (index % 2),
            seed=index,
        ):
            now, num_tokens = time.perf_counter(), sum(len(output.token_ids) for output in event.outputs)
            texts += [output.text for output in event.outputs]
            if num_tokens:
                worst_s = max(worst_s, now - last) if last is not None else worst_s
                last = now
                count(num_tokens)
    except HeadwaterError as error:
        return Heard("".join(texts), worst_s, type(error).__name__)
    return Heard("".join(texts), worst_s)


def _strike(fault: Fault) -> psutil.Process:
    """Kill or stop one of this cluster's workers."""
    name = "ServeReplica:headwater:Worker"
    workers = [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
    match fault:
        case "killed":
            os.kill(workers[0].pid, signal.SIGKILL)
        case "hung":
            os.kill(workers[0].pid, signal.SIGSTOP)
        case "nobody":
            raise ValueError("nobody is to be struck")
        case _:
            assert_never(fault)
    return workers[0]


def config(num_workers: int) -> HeadwaterConfig:
    """A cluster on this machine, on free ports."""
    return load(
        None,
        [
            f"cluster.num_workers={num_workers}",
            "cluster.drain_timeout_s=2",
            "router.grpc.port=0",
            "router.metrics.port=0",
            "worker.metrics.port=0",
            "worker.engine.threads=1",
            "worker.engine.kv.num_pages=1024",
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, rounds=3)
    parser.add_argument("--workers", type=positive, default=3, help="workers (default 3)")
    parser.add_argument("--streams", type=positive, default=24, help="streams at once (default 24)")
    parser.add_argument("--tokens", type=positive, default=400, help="tokens of each (default 400)")
    args = parser.parse_args(arguments)
    contender = Contender(config(args.workers))
    benchmark = Benchmark(
        "recovery",
        [Workload(fault, Load(fault, args.streams, args.tokens)) for fault in FAULTS],
        [Arm("cluster", contender.measure, setup=contender.setup, teardown=contender.teardown)],
        config={"workers": args.workers},
    )
    return harness.main(benchmark, read_options(args))


if __name__ == "__main__":
    sys.exit(main())
