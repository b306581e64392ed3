"""What Headwater costs around vLLM: `vllm serve` against a whole cluster with the same engine, asked the same, in turn.

    .venv-vllm/bin/python -m benchmarks.vllm_serving            # 1, 8 and 32 clients; about six minutes
    .venv-vllm/bin/python -m benchmarks.vllm_serving --quick    # under two minutes; not for quoting

Two servers on this machine, both up all the time and asked one after the other by this process, which shares the cores
with them: vLLM's own over HTTP (/v1/completions), and `headwater serve` with one worker over gRPC. The engine settings
and the environment variables of the first are those of the second (`vllm_server.SAME`). vLLM by itself would put its
scheduler and its model into two processes on a CPU: `--stock` measures that as well. Prompts are random token ids, new
in each round; answers are streamed as text, greedy, and go on past the end of text.

CPU time is told in microseconds for each output token, by what a process is for. front: vLLM's HTTP server; router,
worker: Headwater's; scheduler, model: vLLM's, in both (one process on CPUs, then under scheduler); rest: Ray's own;
client: this process. `others` is what the servers that nobody asks use meanwhile. Before the rounds both answer the
same requests, and the conditions tell how many answers are equal: in bfloat16, where logits tie, batches of another
size may choose otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.conditions import ROOT
from benchmarks.options import Options, add_options, positive, read_options
from benchmarks.prompts import RandomTokens, Shape, prompts
from benchmarks.report import Report
from benchmarks.routing_cluster import ClusterFailedError, serving
from benchmarks.tally import tally
from benchmarks.target import Access, Target
from benchmarks.traffic import Ask, Send, closed_loop
from benchmarks.vllm_processes import Processes
from benchmarks.vllm_server import vllm_serving
from cluster.config import load
from protos.client import Client

START_TIMEOUT_S: Final = 300.0
REQUEST_TIMEOUT_S: Final = 120.0
LIMIT_S: Final = 120.0  # of a measurement; far above what one takes
IDLE_S: Final = 3.0
PAUSE_S: Final = 1.5  # two processes of vLLM's watch what they share for a second after their last step
VLLM: Final = "vllm serve"
STOCK: Final = "vllm serve, stock"
HEADWATER: Final = "headwater"
NUM_EQUAL: Final = 16  # answers compared
SHORTEST_TOKENS: Final = 64
LONGEST_TOKENS: Final = 256
ROUNDS_OF_CLIENTS: Final = 3  # requests of a measurement, for each client
FEWEST_REQUESTS: Final = 8
METRICS: Final = (
    *("num_requests", "output_tokens_per_s", "ttft_p50_ms", "ttft_p90_ms", "itl_p50_ms"),
    *("e2e_p50_ms", "cached_percent"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked at once, and for how long an answer."""

    num_clients: int
    num_requests: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that is up: how it is asked, and its processes."""

    send: Send
    answer: Callable[[Ask], Awaitable[tuple[int, ...]]]
    pid: int


def asks(load: Load, seed: int, vocab_size: int) -> list[Ask]:
    """The requests of one measurement."""
    shape = Shape(load.num_requests, SHORTEST_TOKENS, LONGEST_TOKENS)
    found = prompts(shape, seed, RandomTokens(vocab_size, first_id=1))
    return [Ask(prompt, load.max_tokens, seed=seed + index) for index, prompt in enumerate(found)]


async def measure(
    contender: Contender, others: Sequence[Contender], workload: Workload[Load], vocab_size: int
) -> Measured:
    """Put the load on a server once; what came back, and whose time it took."""
    load = workload.params
    sent = asks(load, workload.seed, vocab_size)
    processes, idle = Processes(contender.pid), [Processes(other.pid) for other in others]
    wall_begin_s, cpu_begin_s = time.perf_counter(), time.process_time()
    traces = await closed_loop(sent, contender.send, concurrency=load.num_clients, duration_s=LIMIT_S)
    client_s, wall_s = time.process_time() - cpu_begin_s, time.perf_counter() - wall_begin_s
    used, idle_s = processes.used(), sum(sum(other.used().values()) for other in idle)
    measured = tally(traces)
    num_tokens = measured.values["output_tokens"]
    seconds = [*used.items(), ("client", client_s), ("all", client_s + sum(used.values()))]
    values = {
        **{name: measured.values[name] for name in METRICS},
        "tokens_per_message": num_tokens / sum(len(trace.arrivals) for trace in traces),
        **{f"{part}_cpu_us": 1e6 * found / num_tokens for part, found in seconds},
        "others_cpu_percent": 100 * idle_s / wall_s,
    }
    return replace(measured, values=values)


def workloads(args: argparse.Namespace, *, quick: bool) -> list[Workload[Load]]:
    """One for each number of clients."""
    max_tokens = args.max_tokens or (16 if quick else 64)
    return [
        Workload(f"{num} clients", Load(num, max(num * ROUNDS_OF_CLIENTS, FEWEST_REQUESTS), max_tokens))
        for num in ((1, 8) if quick and args.clients is None else args.clients or (1, 8, 32))
    ]


def settings(args: argparse.Namespace) -> Mapping[str, object]:
    """Of the cluster; vLLM's server is given those of its worker's engine."""
    chosen = dict(setting.split("=", 1) for setting in args.set)
    return {
        "cluster.num_workers": 1,
        "cluster.drain_timeout_s": 2,
        "cluster.ready_timeout_s": START_TIMEOUT_S,
        "worker.model.path": ROOT / "models" / "target",
        "worker.model.dtype": "bfloat16",
        "worker.engine.kind": "vllm",
        "worker.engine.threads": args.threads,
        "worker.engine.vllm.enforce_eager": str(not args.compiled).lower(),
        **chosen,
    }


async def observe(args: argparse.Namespace, options: Options) -> Report:
    """Start both servers, compare their answers, measure, stop them."""
    chosen = settings(args)
    async with AsyncExitStack() as stack:
        up = {VLLM: await _start_vllm(stack, chosen, args.threads)}
        if args.stock:
            up[STOCK] = await _start_vllm(stack, chosen, args.threads, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
        up[HEADWATER], vocab_size = await _start_headwater(stack, chosen)
        benchmark = Benchmark(
            "vllm_serving",
            workloads(args, quick=options.quick),
            [_arm(name, up, vocab_size) for name in up],
            config={
                "cluster": {key: str(value) for key, value in chosen.items()},
                "prompts": f"{SHORTEST_TOKENS} to {LONGEST_TOKENS} random token ids",
                "equal answers": await _compare(up[VLLM], up[HEADWATER], vocab_size, options.seed),
                "idle CPU, % of one core": await _idle(up),
                "beside it": "all servers are up; the client shares their cores",
            },
        )
        return await harness.observe(benchmark, options)


async def _start_vllm(
    stack: AsyncExitStack, chosen: Mapping[str, object], threads: int, variables: Mapping[str, str] | None = None
) -> Contender:
    print("starting vLLM's server", file=sys.stderr)
    config = load(None, [f"{key}={value}" for key, value in chosen.items()])
    running = vllm_serving(config.worker, threads=threads, timeout_s=START_TIMEOUT_S, variables=variables)
    server, pid = await stack.enter_async_context(running)
    return Contender(server.send, server.tokens, pid)


async def _start_headwater(stack: AsyncExitStack, chosen: Mapping[str, object]) -> tuple[Contender, int]:
    print("starting a cluster", file=sys.stderr)
    served = await stack.enter_async_context(serving(chosen, timeout_s=START_TIMEOUT_S))
    target = Target(Access(served.address, START_TIMEOUT_S, REQUEST_TIMEOUT_S))
    await target.connect()
    stack.push_async_callback(target.close)
    client = await stack.enter_async_context(Client(served.address, timeout_s=REQUEST_TIMEOUT_S))

    async def answer(ask: Ask) -> tuple[int, ...]:
        whole = await client.complete(ask.prompt, max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True)
        return whole.outputs[0].token_ids

    return Contender(target.sender().send, answer, served.pid), (await target.model()).vocab_size


def _arm(name: str, up: Mapping[str, Contender], vocab_size: int) -> Arm[Load]:
    others = [other for of, other in up.items() if of != name]

    async def measure_one(workload: Workload[Load]) -> Measured:
        return await measure(up[name], others, workload, vocab_size)

    return Arm(name, measure_one)


async def _compare(plain: Contender, ours: Contender, vocab_size: int, seed: int) -> str:
    """How many answers are the same, one request at a time."""
    compared = asks(Load(1, NUM_EQUAL, 64), seed, vocab_size)
    pairs = [(await plain.answer(ask), await ours.answer(ask)) for ask in compared]
    return f"{sum(one == other for one, other in pairs)} of {len(pairs)}"


async def _idle(contenders: Mapping[str, Contender]) -> Mapping[str, float]:
    """What servers use while nobody asks, once they have calmed down."""
    await asyncio.sleep(IDLE_S)
    processes = {name: Processes(contender.pid) for name, contender in contenders.items()}
    await asyncio.sleep(IDLE_S)
    return {name: round(100 * sum(found.used().values()) / IDLE_S, 1) for name, found in processes.items()}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--clients", type=_numbers, help="at once, such as 1,8,32 (the default; 1,8 if quick)")
    made.add_argument("--max-tokens", type=positive, help="of every answer (default 64; 16 if quick)")
    made.add_argument("--threads", type=positive, default=1, help="of the model, in both (default 1)")
    made.add_argument("--compiled", action="store_true", help="compile the model, in both; enforce_eager otherwise")
    made.add_argument("--stock", action="store_true", help="also vLLM with its scheduler and model in two processes")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more of the cluster's settings")
    add_options(made, rounds=5)
    made.set_defaults(pause=PAUSE_S)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark; the exit code."""
    args = parser().parse_args(arguments)
    options = read_options(args)
    try:
        result = asyncio.run(observe(args, options))
    except ClusterFailedError as error:
        print(error, file=sys.stderr)
        return 2
    return harness.publish(result, options)


if __name__ == "__main__":
    sys.exit(main())
