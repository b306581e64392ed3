"""What routing by prefix is worth on real workers: one cluster for each policy, asked the same, in turn.

    python -m benchmarks.routing                                  # prefix against least_loaded, 10 to 12 minutes
    python -m benchmarks.routing --quick                          # about two minutes; not for quoting
    python -m benchmarks.routing --policies all --cases uniform   # every policy, one case
    python -m benchmarks.routing --engine vllm --cases uniform --clients 16,64 --seconds 15   # in .venv-vllm
    python -m benchmarks.routing --policies prefix,again --cases nothing-shared --clients 64 --seconds 15 --rounds 5

Each policy has a `headwater serve` of its own: three workers with the shipped model in bfloat16, one engine thread
each, on free ports. All are up all the time and driven one after the other by this process, which shares the cores with
them (`client CPU`). In a round every policy gets the same requests; queries are new in each. Tenants' contexts stay,
and so do the caches, as in life: what one measurement leaves there, the next one finds. Where the case changes, two
requests a tenant go ahead, uncounted. Workers do not take prefixes from each other, unless `--exchange auto`: on one
machine that is so cheap that it hides where a request was sent. Tenants are contexts here; to the cluster, all requests
are one caller's. The policy `again` is least_loaded on one more cluster: what differs between the two is noise.

One worker's cache holds half of the contexts (`--kv-share`): three hold all of them together, no one alone does. Cases:
uniform: all tenants alike. zipf: the first ones most often, exponent 1. fits-everywhere: as many tenants as every
worker can hold at once. nothing-shared: no prompt begins like another; all are as long.

Loads: closed loops of some clients, and open loops (Poisson arrivals) at multiples of the saturation of least_loaded:
the highest rate at which it kept up in the warm-up, which goes before the rounds. The routers' queues are short
(64 requests), so that overload is refused, and counted, rather than waited out.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, get_args

from rich import box
from rich.console import Console

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.conditions import ROOT
from benchmarks.options import Options, add_options, positive, read_options
from benchmarks.prompts import Code, P, RandomTokens, Source
from benchmarks.report import Report
from benchmarks.results import cells
from benchmarks.routing_cluster import ClusterFailedError, serving
from benchmarks.routing_saturation import completed_per_s, find_saturation
from benchmarks.routing_summary import table
from benchmarks.routing_traces import Case, Lengths, make_asks, make_contexts
from benchmarks.tally import tally
from benchmarks.target import Access, Target
from benchmarks.traffic import Ask, Trace, closed_loop, open_loop, poisson

CaseName = Literal["uniform", "zipf", "fits-everywhere", "nothing-shared"]
Policy = Literal["prefix", "least_loaded", "round_robin", "random", "consistent_hash"]
Requests = Callable[[Case, int, int], list[Ask]]  # of a case, so many, with a seed

CASES: Final = get_args(CaseName)
POLICIES: Final = get_args(Policy)
BASELINE: Final = "least_loaded"
AGAIN: Final = "again"  # the baseline's policy on a cluster of its own: what differs is noise
LENGTHS: Final = Lengths(context=1400, query=48, output=32)
QUICK_LENGTHS: Final = Lengths(context=350, query=24, output=16)
PAGE_SIZE: Final = 32
MAX_QUEUED: Final = 64
START_TIMEOUT_S: Final = 400.0
REQUEST_TIMEOUT_S: Final = 120.0
MOST_PER_S: Final = 250  # no cluster here answers more, so clients never run out of requests
FEWEST_REQUESTS: Final = 24  # of an open loop, however slow: percentiles need some
WARM_CLIENTS: Final = 16
MANY_CLIENTS: Final = 64
METRICS: Final = (
    *("num_requests", "num_refused", "requests_per_s", "output_tokens_per_s"),
    *("ttft_p50_ms", "ttft_p90_ms", "cached_percent", "client_cpu_percent"),
)


@dataclass(frozen=True, slots=True)
class Level:
    """The loads of one case."""

    clients: tuple[int, ...]
    factors: tuple[float, ...] = ()  # of the baseline's saturation


LEVELS: Final[Mapping[CaseName, Level]] = {
    "uniform": Level((1, 16, 64), (0.5, 1, 1.5, 2, 3)),
    "zipf": Level((64,), (1, 2)),
    "fits-everywhere": Level((16, 64)),
    "nothing-shared": Level((16, 64), (1,)),
}
QUICK_LEVELS: Final[Mapping[CaseName, Level]] = {"uniform": Level((16,), (1, 2)), "nothing-shared": Level((16,))}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a cluster, and how fast. Exactly one of clients and rate is not zero."""

    case: Case
    seconds: float  # in which requests begin
    num_clients: int = 0
    rate_per_s: float = 0.0


class Contender:
    """A cluster under one policy. Mutated only by its own measurements, of which one runs at a time."""

    def __init__(self, target: Target, requests: Requests) -> None:
        self._target = target
        self._requests = requests
        self._case: Case | None = None  # that its caches saw last

    async def measure(self, workload: Workload[Load]) -> Measured:
        """Put the load on the cluster and tally what came back."""
        await self._enter(workload.params.case, workload.seed)
        wall_begin_s, cpu_begin_s = time.perf_counter(), time.process_time()
        measured = tally(await self._drive(workload.params, workload.seed))
        cpu_percent = 100 * (time.process_time() - cpu_begin_s) / (time.perf_counter() - wall_begin_s)
        values = {**measured.values, "client_cpu_percent": cpu_percent}
        return replace(measured, values={name: values[name] for name in METRICS if name in values})

    async def drive(self, load: Load, seed: int) -> list[Trace]:
        """Put the load on the cluster; what came of each request."""
        await self._enter(load.case, seed)
        return await self._drive(load, seed)

    async def _enter(self, case: Case, seed: int) -> None:
        """Another case: two requests a tenant, for nothing but the caches."""
        if self._case == case:
            return
        self._case = case
        asks = [replace(ask, max_tokens=1) for ask in self._requests(case, 2 * case.num_tenants, seed + 1)]
        await closed_loop(asks, self._target.sender().send, concurrency=WARM_CLIENTS, duration_s=math.inf)

    async def _drive(self, load: Load, seed: int) -> list[Trace]:
        send = self._target.sender().send
        if load.num_clients:
            asks = self._requests(load.case, round(MOST_PER_S * load.seconds), seed)
            return await closed_loop(asks, send, concurrency=load.num_clients, duration_s=load.seconds)
        asks = self._requests(load.case, max(FEWEST_REQUESTS, round(load.rate_per_s * load.seconds)), seed)
        return await open_loop(asks, send, due_s=poisson(len(asks), load.rate_per_s, seed), duration_s=math.inf)


def make_cases(num_tenants: int, kv_share: float) -> Mapping[CaseName, Case]:
    """Every case. Where all fits everywhere, a third of a worker's cache is left for what runs."""
    return {
        "uniform": Case("uniform", num_tenants),
        "zipf": Case("zipf", num_tenants, zipf=1.0),
        "fits-everywhere": Case("fits-everywhere", max(1, math.floor(num_tenants * kv_share * 2 / 3))),
        "nothing-shared": Case("nothing-shared", 0),
    }


def num_pages(num_tenants: int, kv_share: float, lengths: Lengths) -> int:
    """Of one worker's cache, so that it holds this share of all contexts."""
    return math.ceil(num_tenants * lengths.context * kv_share / PAGE_SIZE)


def make_workloads(
    cases: Mapping[CaseName, Case],
    levels: Mapping[CaseName, Level],
    saturation: Mapping[CaseName, float],
    seconds: float,
) -> list[Workload[Load]]:
    """Every case that has levels, at each of them."""
    made: list[Workload[Load]] = []
    for name, level in levels.items():
        load = Load(cases[name], seconds)
        made += [Workload(f"{name}, {num} clients", replace(load, num_clients=num)) for num in level.clients]
        rates = [(factor, factor * saturation[name]) for factor in level.factors]
        made += [
            Workload(f"{name}, {factor:g}x = {rate:.1f}/s", replace(load, rate_per_s=rate)) for factor, rate in rates
        ]
    return made


async def warm_up(
    contenders: Mapping[str, Contender],
    cases: Mapping[CaseName, Case],
    levels: Mapping[CaseName, Level],
    options: Options,
    seconds: float,
) -> Mapping[CaseName, float]:
    """Every policy through every case once; the baseline's saturation, requests/s, where rates are asked for."""
    found: dict[CaseName, float] = {}
    for name, level in levels.items():
        load = Load(cases[name], seconds)
        for contender in contenders.values():
            await contender.drive(replace(load, num_clients=WARM_CLIENTS), options.seed)
        if level.factors:
            found[name] = await _saturation(contenders[BASELINE], load, options.seed + 1)
            print(f"warm-up: {name}: {BASELINE} keeps up with {found[name]:.1f} requests/s", file=sys.stderr)
    return found


async def _saturation(contender: Contender, load: Load, seed: int) -> float:
    async def offer(rate_per_s: float) -> Sequence[Trace]:
        return await contender.drive(replace(load, rate_per_s=rate_per_s), seed + round(1000 * rate_per_s))

    at_most = completed_per_s(await contender.drive(replace(load, num_clients=MANY_CLIENTS), seed))
    return await find_saturation(at_most, offer)


def make_requests(source: Source[P], num_tenants: int, lengths: Lengths, seed: int) -> Requests:
    """All that will be asked in a run, by case and seed."""
    contexts = make_contexts(num_tenants, lengths.context, seed, source)

    def requests(case: Case, num: int, seed: int) -> list[Ask]:
        return make_asks(case, contexts, lengths, num=num, seed=seed, source=source)

    return requests


async def observe(args: argparse.Namespace, options: Options) -> Report:
    """Start the clusters, warm them up, measure, stop them."""
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    cases, levels, seconds = make_cases(args.tenants, args.kv_share), _levels(args), _seconds(args)
    settings = _settings(args, lengths)
    async with AsyncExitStack() as stack:
        targets = {policy: await _start(stack, policy, settings) for policy in args.policies}
        requests = await _requests(args, targets[BASELINE], lengths, options.seed)
        contenders = {policy: Contender(target, requests) for policy, target in targets.items()}
        saturation = await warm_up(contenders, cases, levels, options, seconds)
        benchmark = Benchmark(
            "routing",
            make_workloads(cases, levels, saturation, seconds),
            [Arm(policy, contender.measure) for policy, contender in contenders.items()],
            baseline=BASELINE,
            config={
                "every cluster": {key: str(value) for key, value in settings.items()},
                "tokens": f"context {lengths.context}, query {lengths.query}, output {lengths.output}; {args.prompts}",
                "tenants": f"{args.tenants}; one worker holds {args.kv_share:.0%} of their contexts",
                "saturation of the baseline, requests/s": {name: round(rate, 2) for name, rate in saturation.items()},
                "beside it": f"{len(args.policies)} clusters are up; the client shares their cores",
            },
        )
        return await harness.observe(benchmark, options)


async def _start(stack: AsyncExitStack, policy: str, settings: Mapping[str, object]) -> Target:
    print(f"starting a cluster for {policy}", file=sys.stderr)
    of_policy = {**settings, "router.routing.policy": BASELINE if policy == AGAIN else policy}
    served = await stack.enter_async_context(serving(of_policy, timeout_s=START_TIMEOUT_S))
    target = Target(Access(served.address, START_TIMEOUT_S, REQUEST_TIMEOUT_S))
    await target.connect()
    stack.push_async_callback(target.close)
    return target


async def _requests(args: argparse.Namespace, target: Target, lengths: Lengths, seed: int) -> Requests:
    if args.prompts == "code":
        return make_requests(Code.heldout(), args.tenants, lengths, seed)
    vocab_size = (await target.model()).vocab_size
    return make_requests(RandomTokens(vocab_size), args.tenants, lengths, seed)


def _settings(args: argparse.Namespace, lengths: Lengths) -> Mapping[str, object]:
    """What the clusters have in common."""
    return {
        "cluster.num_workers": args.workers,
        "cluster.drain_timeout_s": 2,
        "cluster.ready_timeout_s": START_TIMEOUT_S,
        "router.limits.max_queued_requests": MAX_QUEUED,
        "worker.model.path": ROOT / "models" / "target",
        "worker.model.dtype": "bfloat16",
        "worker.engine.threads": 1,
        "worker.engine.kv.page_size": PAGE_SIZE,
        "worker.engine.kv.exchange.mode": args.exchange,
        "worker.engine.kv.num_pages": num_pages(args.tenants, args.kv_share, lengths),
        **({"worker.engine.kind": "vllm", "worker.engine.vllm.enforce_eager": "true"} if args.engine == "vllm" else {}),
    }


def _levels(args: argparse.Namespace) -> Mapping[CaseName, Level]:
    known = QUICK_LEVELS if args.quick and not args.cases else LEVELS
    chosen = {name: known[name] for name in args.cases or known}
    if args.clients is None and args.factors is None:
        return chosen
    return dict.fromkeys(chosen, Level(args.clients or (), args.factors or ()))


def _seconds(args: argparse.Namespace) -> float:
    return float(args.seconds or (2 if args.quick else 4))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--policies",
        type=_policies,
        default=("prefix", BASELINE),
        help=f"of {', '.join(POLICIES)}, or all; {AGAIN} is {BASELINE} once more (default prefix,{BASELINE})",
    )
    made.add_argument("--cases", type=partial(_listed, known=CASES), help=f"of {', '.join(CASES)} (default all)")
    made.add_argument("--clients", type=partial(_numbers, kind=int), help="closed loops of every case, such as 1,16")
    made.add_argument("--factors", type=partial(_numbers, kind=float), help="open loops of every case, such as 0.5,1")
    made.add_argument("--seconds", type=float, help="in which requests begin (default 4; 2 if quick)")
    made.add_argument("--workers", type=positive, default=3, help="of each cluster (default 3)")
    made.add_argument("--tenants", type=positive, default=60, help="contexts (default 60)")
    made.add_argument("--kv-share", type=float, default=0.5, help="of all contexts, in one worker (default 0.5)")
    made.add_argument("--exchange", choices=("off", "auto"), default="off", help="of prefixes between workers")
    made.add_argument("--engine", choices=("torch", "vllm"), default="torch", help="of the workers; vllm: not compiled")
    made.add_argument("--prompts", choices=("code", "tokens"), default="code", help="real text, or random token ids")
    add_options(made, rounds=3)
    made.set_defaults(warmup_rounds=0)  # the search for the saturation is the warm-up
    return made


def _policies(text: str) -> tuple[str, ...]:
    """The baseline is always among them."""
    chosen = POLICIES if text == "all" else _listed(text, known=(*POLICIES, AGAIN))
    return chosen if BASELINE in chosen else (*chosen, BASELINE)


def _listed(text: str, *, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(known)}")
    return names


def _numbers(text: str, *, kind: Callable[[str], float]) -> tuple[float, ...]:
    values = tuple(kind(part) for part in text.split(","))
    if not all(value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not all above 0")
    return values


async def _to_the_end(work: Awaitable[Report]) -> Report:
    """Cancelled by the first Ctrl-C or SIGTERM; further ones do not disturb the end of the clusters."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked = False

    def stop() -> None:
        nonlocal asked
        if not asked:
            task.cancel()
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return await work


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark; the exit code."""
    args = parser().parse_args(arguments)
    options = read_options(args)
    try:
        result = asyncio.run(_to_the_end(observe(args, options)))
    except asyncio.CancelledError:
        print("interrupted; the clusters are gone", file=sys.stderr)
        return 130
    except ClusterFailedError as error:
        print(error, file=sys.stderr)
        return 2
    code = harness.publish(result, options)
    screen = Console() if sys.stdout.isatty() else Console(width=200, color_system=None)
    screen.print(table(cells(result.trials, BASELINE), box.SIMPLE_HEAD if screen.is_terminal else box.MARKDOWN))
    return code


if __name__ == "__main__":
    sys.exit(main())
