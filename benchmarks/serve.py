"""How a running cluster serves: time to first token, time between tokens, throughput, errors and refusals.

    python -m benchmarks.serve                               # 127.0.0.1:9000; 1, 8 and 32 clients
    python -m benchmarks.serve --rate 2,8                    # open loop: Poisson arrivals per second
    python -m benchmarks.serve --target new=127.0.0.1:9000 --target old=127.0.0.1:9001

Several targets are compared, interleaved, on the same prompts; give them machines of their own, and never one cluster
twice: the second would find the first one's prompts in its cache. For the same reason the seed is a new one each time,
printed with the results; with --seed the run is repeated, on a fresh cluster. A request that is refused is counted as
refused and not sent again. How tokens are timed is told in `tally.py`. `--metrics` adds what the workers counted:
tokens of a drafted step, which drafts were right, and how often drafting paid.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, assert_never

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from benchmarks.prompts import Code, RandomTokens, Shape, lengths, prompts
from benchmarks.scrape import drafting, totals
from benchmarks.tally import tally
from benchmarks.target import Access, Target
from benchmarks.traffic import Ask, Trace, closed_loop, open_loop, poisson
from protos.client import ClientTLS

N = TypeVar("N", int, float)
Prompt = str | tuple[int, ...]
PromptKind = Literal["code", "tokens"]

MIXED = Shape(num_prompts=0, shortest_tokens=16, longest_tokens=1024)
SHARED = Shape(num_prompts=0, shortest_tokens=16, longest_tokens=128, prefix_tokens=1024, num_prefixes=4)
QUICK_MIXED = replace(MIXED, longest_tokens=128)
QUICK_SHARED = replace(SHARED, longest_tokens=32, prefix_tokens=256, num_prefixes=2)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a cluster, and how fast. Exactly one of concurrency and rate is not zero."""

    shape: Shape
    max_tokens: int  # of the longest output; the shortest is a quarter of it
    prompt_kind: PromptKind
    temperature: float
    duration_s: float
    concurrency: int = 0
    rate_per_s: float = 0.0


async def measure(target: Target, code: Code, workload: Workload[Load], *, endpoints: Sequence[str] = ()) -> Measured:
    """Put the load on the cluster once and tally what came back, and what its workers counted at `endpoints`."""
    load = workload.params
    texts = await _prompts(load, workload.seed, target, code)
    asks = requests(load, workload.seed, texts)
    before = await totals(endpoints)
    wall_begin_s, cpu_begin_s = time.perf_counter(), time.process_time()
    traces = await _drive(load, asks, target, workload.seed)
    cpu_percent = 100 * (time.process_time() - cpu_begin_s) / (time.perf_counter() - wall_begin_s)
    measured = tally(traces)
    drafted = drafting(before, await totals(endpoints))
    return replace(measured, values={**measured.values, "client_cpu_percent": cpu_percent, **drafted})


async def _prompts(load: Load, seed: int, target: Target, code: Code) -> Sequence[Prompt]:
    match load.prompt_kind:
        case "code":
            return prompts(load.shape, seed, code)
        case "tokens":
            return prompts(load.shape, seed, RandomTokens((await target.model()).vocab_size))
        case _:
            assert_never(load.prompt_kind)


def requests(load: Load, seed: int, texts: Sequence[Prompt]) -> list[Ask]:
    """One request for each prompt, with outputs of mixed lengths: the same ones for the same seed."""
    sizes = lengths(len(texts), max(load.max_tokens // 4, 1), load.max_tokens, random.Random(seed + 1))
    return [
        Ask(text, size, load.temperature, seed + index)
        for index, (text, size) in enumerate(zip(texts, sizes, strict=True))
    ]


async def _drive(load: Load, asks: Sequence[Ask], target: Target, seed: int) -> list[Trace]:
    send = target.sender().send
    if load.concurrency:
        return await closed_loop(asks, send, concurrency=load.concurrency, duration_s=load.duration_s)
    due_s = poisson(len(asks), load.rate_per_s, seed)
    return await open_loop(asks, send, due_s=due_s, duration_s=load.duration_s)


def workloads(args: argparse.Namespace) -> list[Workload[Load]]:
    """Every kind of prompts at every level of load."""
    shapes = {
        "mixed": QUICK_MIXED if args.quick else MIXED,
        "shared-prefix": QUICK_SHARED if args.quick else SHARED,
    }
    return [
        Workload(f"{name}, {level}", load)
        for name in args.workloads
        for level, load in _levels(args, replace(shapes[name], num_prompts=args.requests or (16 if args.quick else 64)))
    ]


def _levels(args: argparse.Namespace, shape: Shape) -> list[tuple[str, Load]]:
    max_tokens = args.max_tokens or (16 if args.quick else 64)
    load = Load(shape, max_tokens, args.prompts, args.temperature, args.duration)
    concurrency = args.concurrency or ([] if args.rate else [1, 8, 32])
    closed = [(f"concurrency {num}", replace(load, concurrency=num)) for num in concurrency]
    return closed + [(f"{rate:g} requests/s", replace(load, rate_per_s=rate)) for rate in args.rate or []]


def _numbers(kind: Callable[[str], N]) -> Callable[[str], list[N]]:
    """Reads positive numbers with commas between them."""

    def numbers(text: str) -> list[N]:
        values = [kind(part) for part in text.split(",")]
        if not all(value > 0 for value in values):
            raise argparse.ArgumentTypeError(f"{text} is not all above 0")
        return values

    return numbers


def arms(args: argparse.Namespace, code: Code) -> list[Arm[Load]]:
    """One for each target; code is where prompts of that kind come from."""
    tls = ClientTLS(ca_file=args.ca) if args.ca else None
    api_key = args.api_key_file.read_text().strip() if args.api_key_file else None
    named = (text.rpartition("=") for text in args.target or ["127.0.0.1:9000"])
    return [
        _arm(name or address, Target(Access(address, args.wait, args.timeout, tls, api_key)), code, args.metrics)
        for name, _, address in named
    ]


def _arm(name: str, target: Target, code: Code, endpoints: Sequence[str]) -> Arm[Load]:
    async def measure_target(workload: Workload[Load]) -> Measured:
        return await measure(target, code, workload, endpoints=endpoints)

    return Arm(name, measure_target, setup=target.connect, teardown=target.close)


def parser(prog: str = "python -m benchmarks.serve") -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--target", action="append", help="[name=]host:port of a cluster (default 127.0.0.1:9000)")
    made.add_argument(
        "--metrics", action="append", default=[], help="host:port of a worker's metrics: tell how its drafts went"
    )
    made.add_argument("--ca", type=Path, help="speak TLS, and trust the authority in this PEM file")
    made.add_argument("--api-key-file", type=Path, help="holds the key to show to the cluster")
    made.add_argument("--concurrency", type=_numbers(int), help="closed-loop clients, such as 1,8,32")
    made.add_argument("--rate", type=_numbers(float), help="open-loop requests per second, such as 2,8")
    made.add_argument("--requests", type=positive, help="requests a measurement (default 64; 16 if quick)")
    made.add_argument("--max-tokens", type=positive, help="tokens of the longest output (default 64; 16 if quick)")
    made.add_argument("--duration", type=float, default=30.0, help="no request begins after this many seconds")
    made.add_argument("--timeout", type=float, default=60.0, help="deadline of one request, seconds")
    made.add_argument("--wait", type=float, default=30.0, help="seconds to wait for a healthy server")
    made.add_argument("--prompts", choices=("code", "tokens"), default="code", help="real text, or random token ids")
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--workloads", nargs="+", choices=("mixed", "shared-prefix"), default=["mixed", "shared-prefix"])
    add_options(made, rounds=3, seed=None)
    return made


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m benchmarks.serve") -> int:
    """Parse the command line, run the benchmark; the exit code."""
    command_line = parser(prog)
    args = command_line.parse_args(arguments)
    if args.metrics and len(args.target or ()) > 1:
        command_line.error("--metrics are of one cluster's workers: give one --target")
    try:
        benchmark = Benchmark(name="serve", workloads=workloads(args), arms=arms(args, Code.heldout()))
    except ValueError as error:
        command_line.error(str(error))
    return harness.main(benchmark, read_options(args))


if __name__ == "__main__":
    sys.exit(main())
