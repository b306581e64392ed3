"""What one router costs: its CPU time for each token that reaches a client, and whether its memory stays flat.

    python -m benchmarks.router_overhead                            # 64 streams of 128 tokens, closed loop
    python -m benchmarks.router_overhead --streams 1,64,256 --tokens 256
    python -m benchmarks.router_overhead --memory                   # 200,000 short requests; takes minutes

A real router in a process of its own, real gRPC to its clients, which are in this process, and to real workers, each in
a process of its own. Only the workers' engine is a fake: a step takes a millisecond (`--step-ms`) and gives every
running request a token. Everything shares the machine's cores; shares of one core are printed.

CPU time is that of the router's whole process, all threads, user and kernel, from the first request to the last one's
end. With `--memory`, its resident memory and the number of blocks that Python has allocated there (after a garbage
collection) are read after 10, 50 and 100 % of the requests, and at the end what it still holds for requests. Blocks
that grow are a leak of Python objects; memory that grows without them is fragmentation, or a leak in a native library.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.conditions import ROOT
from benchmarks.options import add_options, positive, read_options
from benchmarks.router_pipe import Child, child
from benchmarks.scrape import totals
from benchmarks.tally import tally
from benchmarks.target import Access, Target
from benchmarks.traffic import Ask, Trace, closed_loop
from protos.errors import HeadwaterError

MODEL: Final = ROOT / "models" / "target"
MODEL_NAME: Final = "target"
TOKEN: Final = "of this benchmark alone"
WAIT_S: Final = 30.0
REQUEST_TIMEOUT_S: Final = 120.0
REQUESTS_PER_STREAM: Final = 8
MEMORY_REQUESTS: Final = 200_000
QUICK_MEMORY_REQUESTS: Final = 5_000
MEMORY_TOKENS: Final = 2
NUM_PARTS: Final = 100  # of a memory run
CHECKPOINTS: Final = (10, 50, 100)  # parts
LEFT: Final = {
    "num_live_at_end": "headwater_requests_live",
    "num_waiting_at_end": "headwater_queue_requests",
    "num_index_blocks_at_end": "headwater_index_blocks",
}
KEPT: Final = ("num_requests", "num_refused", "requests_per_s", "output_tokens_per_s", "ttft_p50_ms", "itl_p50_ms")


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests from so many clients, each of whom sends its next one when the last one ended."""

    num_streams: int
    num_requests: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Size:
    """What the router held after a part of a memory run."""

    rss_bytes: int
    num_allocations: int


class Rig:
    """A router and its workers. Owns their processes from `setup` to `teardown`."""

    def __init__(
        self, router: Mapping[str, Any], worker: Mapping[str, Any], *, num_workers: int, step_s: float
    ) -> None:
        self._router_settings = {"router": router, "model": str(MODEL), "model_name": MODEL_NAME, "token": TOKEN}
        self._worker_settings = {"worker": worker, "step_s": step_s, "token": TOKEN}
        self._num_workers = num_workers
        self._workers: list[Child] = []
        self._exits = AsyncExitStack()

    async def setup(self) -> None:
        """Start all processes and connect. Raises ChildFailedError or NoServerError, with nothing left running."""
        async with AsyncExitStack() as exits:
            sessions = {str(number): await self._start_worker(exits, number) for number in range(self._num_workers)}
            self._router = await exits.enter_async_context(child("benchmarks.router_process", self._router_settings))
            addresses = await self._router.hear()
            await self._router.ask(workers=sessions)
            self._target = Target(Access(addresses["grpc"], WAIT_S, REQUEST_TIMEOUT_S))
            self._metrics = addresses["metrics"]
            await self._target.connect()
            exits.push_async_callback(self._target.close)
            self._exits = exits.pop_all()

    async def teardown(self) -> None:
        """End all processes."""
        await self._exits.aclose()

    async def _start_worker(self, exits: AsyncExitStack, number: int) -> str:
        settings = {**self._worker_settings, "worker_id": str(number)}
        worker = await exits.enter_async_context(child("benchmarks.router_fake_worker", settings))
        self._workers.append(worker)
        return str((await worker.hear())["session"])

    async def measure(self, workload: Workload[Load]) -> Measured:
        """What the router's process used for the tokens of all requests."""
        load = workload.params
        asks = make_asks(load, workload.seed)
        before, begin_s = self._cpu_s(), time.perf_counter()
        traces = await closed_loop(asks, self._target.sender().send, concurrency=load.num_streams, duration_s=math.inf)
        after, wall_s = self._cpu_s(), time.perf_counter() - begin_s
        measured = tally(traces)
        used = {name: after[name] - before[name] for name in after}
        values = {name: measured.values[name] for name in KEPT if name in measured.values}
        values |= {f"{name}_cpu_percent": 100 * cpu_s / wall_s for name, cpu_s in used.items()}
        values["router_cpu_per_token_us"] = 1e6 * used["router"] / measured.values["output_tokens"]
        values["mean_message_tokens"] = measured.values["output_tokens"] / sum(len(trace.arrivals) for trace in traces)
        values["router_rss_bytes"] = self._router.rss_bytes
        return replace(measured, values=values)

    async def measure_memory(self, workload: Workload[Load]) -> Measured:
        """What the router's process held in the course of all requests."""
        load, mishaps, sizes = workload.params, Counter[str](), dict[int, Size]()
        cpu_begin_s, begin_s = self._router.cpu_s, time.perf_counter()
        for part, num in enumerate(parts(load.num_requests), start=1):
            mishaps += failures(await self._send(replace(load, num_requests=num), workload.seed + part))
            if part in CHECKPOINTS:
                sizes[part] = await self._size()
            if part % 10 == 0:
                self._tell(part, load.num_requests, time.perf_counter() - begin_s)
        wall_s, cpu_s = time.perf_counter() - begin_s, self._router.cpu_s - cpu_begin_s
        values = growth(sizes, load.num_requests) | await self._left()
        values |= {
            "requests_per_s": load.num_requests / wall_s,
            "router_cpu_per_request_us": 1e6 * cpu_s / load.num_requests,
        }
        return Measured(values, errors=mishaps)

    async def _send(self, load: Load, seed: int) -> list[Trace]:
        asks = make_asks(load, seed)
        return await closed_loop(asks, self._target.sender().send, concurrency=load.num_streams, duration_s=math.inf)

    async def _size(self) -> Size:
        num_allocations = (await self._router.ask())["num_allocations"]
        return Size(self._router.rss_bytes, num_allocations)

    async def _left(self) -> dict[str, float]:
        found = await totals([self._metrics])
        return {name: found[metric, ""] for name, metric in LEFT.items()}

    def _tell(self, part: int, num_requests: int, seconds: float) -> None:
        num, mebibytes = num_requests * part // NUM_PARTS, self._router.rss_bytes / 2**20
        print(f"{num:,} requests, {num / seconds:,.0f}/s; the router holds {mebibytes:.1f} MiB", file=sys.stderr)

    def _cpu_s(self) -> dict[str, float]:
        """CPU time so far, by who used it."""
        workers_s = sum(worker.cpu_s for worker in self._workers)
        return {"router": self._router.cpu_s, "workers": workers_s, "client": time.process_time()}


def make_asks(load: Load, seed: int) -> list[Ask]:
    """Prompts of random tokens, no two alike."""
    source, vocabulary = random.Random(seed), range(1, 4096)
    return [
        Ask(tuple(source.choices(vocabulary, k=load.prompt_tokens)), load.max_tokens, seed=index)
        for index in range(load.num_requests)
    ]


def parts(num_requests: int) -> list[int]:
    """The requests of a memory run in NUM_PARTS parts, as alike as they can be."""
    ends = [num_requests * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def failures(traces: Sequence[Trace]) -> Counter[str]:
    """Requests that did not complete, by their error. A refusal is one as well: nothing here asks for too much."""
    errors: list[HeadwaterError] = [trace.error for trace in traces if trace.error is not None]
    return Counter(type(error).__name__ for error in errors)


def growth(sizes: Mapping[int, Size], num_requests: int) -> dict[str, float]:
    """What the router held at each checkpoint, and how that grew from the first one to the last."""
    first, last = sizes[CHECKPOINTS[0]], sizes[CHECKPOINTS[-1]]
    num_between = num_requests * (CHECKPOINTS[-1] - CHECKPOINTS[0]) / 100
    rss = {f"rss_after_{percent}_percent_bytes": float(size.rss_bytes) for percent, size in sizes.items()}
    allocations = {
        f"num_allocations_after_{percent}_percent": float(size.num_allocations) for percent, size in sizes.items()
    }
    grown = last.rss_bytes - first.rss_bytes
    return {
        **rss,
        "growth_bytes": float(grown),
        "growth_per_request_bytes": grown / num_between,
        **allocations,
        "num_allocations_grown": float(last.num_allocations - first.num_allocations),
    }


def make_benchmark(args: argparse.Namespace) -> Benchmark[Load]:
    """Streams, or memory."""
    worker = {
        "model": {"path": str(MODEL), "name": MODEL_NAME},
        "engine": {"kind": "fake", "scheduler": {"max_running": max(args.streams)}},
        "metrics": {"port": 0},
    }
    router = {"grpc": {"port": 0}, "metrics": {"port": 0}}
    rig = Rig(router, worker, num_workers=args.workers, step_s=args.step_ms / 1000)
    measure = rig.measure_memory if args.memory else rig.measure
    return Benchmark(
        "router overhead",
        [_workload(args, num_streams) for num_streams in args.streams],
        [Arm("router", measure, setup=rig.setup, teardown=rig.teardown)],
        config={"router": f"defaults but {router}", "workers": f"{args.workers}, fake, steps of {args.step_ms:g} ms"},
    )


def _workload(args: argparse.Namespace, num_streams: int) -> Workload[Load]:
    if args.memory:
        num_requests = args.requests or (QUICK_MEMORY_REQUESTS if args.quick else MEMORY_REQUESTS)
        load = Load(num_streams, num_requests, args.prompt_tokens, args.tokens or MEMORY_TOKENS)
        return Workload(f"memory, {num_requests:,} requests, {num_streams} streams", load)
    num_requests = args.requests or num_streams * (2 if args.quick else REQUESTS_PER_STREAM)
    return Workload(f"{num_streams} streams", Load(num_streams, num_requests, args.prompt_tokens, args.tokens or 128))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.router_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--streams", type=_numbers, default=[64], help="requests at once, such as 1,64 (default 64)")
    made.add_argument("--requests", type=positive, help="a measurement (default 8 a stream; 200,000 with --memory)")
    made.add_argument("--tokens", type=positive, help="of every output (default 128; 2 with --memory)")
    made.add_argument("--prompt-tokens", type=positive, default=64, help="of every prompt (default 64)")
    made.add_argument("--workers", type=positive, default=1, help="behind the router (default 1)")
    made.add_argument("--step-ms", type=_milliseconds, default=1.0, help="of the workers' engines (default 1)")
    made.add_argument("--memory", action="store_true", help="many short requests: does the router grow?")
    add_options(made, rounds=5)
    return made


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _milliseconds(text: str) -> float:
    value = float(text)
    if value < 0 or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark; the exit code."""
    args = parser().parse_args(arguments)
    options = read_options(args)
    if args.memory:  # one long run is its own warm-up: its first tenth
        options = replace(options, rounds=args.rounds or 1, warmup_rounds=0)
    return harness.main(make_benchmark(args), options)


if __name__ == "__main__":
    sys.exit(main())
