"""What prepacking is worth: prompts of real lengths, padded, ordered by length and padded, and packed.

    python -m benchmarks.packing
    python -m benchmarks.packing --model /path/to/model --threads 2

Prompts come in batches of 64. `padded` fills each up to the longest of its batch, as a server with rectangular batches
does; `length-ordered` sorts all prompts first, so that batches are of nearly equal lengths (no server that answers in
the order of arrival can); `packed` sends them as they are: one flat stream, cut into steps of equal budget. All arms
compute on the same engine and kernels; `computed_per_needed` is counted, not timed.

The lengths are drawn from distributions like those of well-known sets of prompts (medians and spreads, not the sets):
MMLU's questions, Alpaca's instructions, RLHF conversations, and Wikitext's lines cut at 512 tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from protos.messages import Request, Sampling
from workers.config import WorkerConfig
from workers.engine.factory import make_engine
from workers.engine.protocol import Engine

Packing = Literal["padded", "length-ordered", "packed"]
PACKINGS: tuple[Packing, ...] = ("padded", "length-ordered", "packed")
BATCH = 64
NUM_PROMPTS = 192
QUICK_PROMPTS = 64
FIRST_TOKEN = 16  # ids below may mean something


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal distribution of prompt lengths, in tokens; `num_short` of every thousand are headlines instead."""

    median: int
    spread: float
    shortest: int
    longest: int
    num_short: int = 0

    def draw(self, source: random.Random) -> int:
        """One prompt's length."""
        if source.randrange(1000) < self.num_short:
            return source.randrange(3, 20)
        drawn = round(source.lognormvariate(math.log(self.median), self.spread))
        return min(max(drawn, self.shortest), self.longest)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A workload: how many prompts of which lengths."""

    lengths: Lengths
    num_prompts: int


DISTRIBUTIONS: Mapping[str, Lengths] = {
    "mmlu-like": Lengths(48, 0.9, 3, 1200),
    "alpaca-like": Lengths(85, 0.55, 30, 900),
    "rlhf-like": Lengths(170, 0.75, 10, 2000),
    "wikitext512-like": Lengths(140, 0.6, 10, 512, num_short=370),
}


def make_prompts(prompts: Prompts, vocab_size: int, seed: int) -> list[list[int]]:
    """The workload's prompts: random tokens, so that none begins like another."""
    source = random.Random(seed)
    sizes = [prompts.lengths.draw(source) for _ in range(prompts.num_prompts)]
    return [[source.randrange(FIRST_TOKEN, vocab_size) for _ in range(size)] for size in sizes]


def make_batches(prompts: Sequence[list[int]], packing: Packing, filler: Callable[[], int]) -> list[list[list[int]]]:
    """What is sent, batch by batch. Padding is of `filler`'s tokens, new for each, so that none is found in a cache."""
    match packing:
        case "packed":
            return _split(prompts)
        case "padded":
            return [_padded(batch, filler) for batch in _split(prompts)]
        case "length-ordered":
            return [_padded(batch, filler) for batch in _split(sorted(prompts, key=len))]
        case _:
            assert_never(packing)


def _split(prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    return [list(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]


def _padded(batch: Sequence[list[int]], filler: Callable[[], int]) -> list[list[int]]:
    longest = max(map(len, batch))
    return [[*prompt, *(filler() for _ in range(longest - len(prompt)))] for prompt in batch]


class Bench:
    """One engine for all arms. Mutated only by the harness's thread."""

    def __init__(self, config: WorkerConfig, threads: int) -> None:
        self._config = config
        self._threads = threads
        self._engine: Engine | None = None
        self._num_asked = 0

    def setup(self) -> None:
        """Load the model, once."""
        self._engine = self._engine or make_engine(self._config, threads=self._threads)

    def measure(self, packing: Packing, workload: Workload[Prompts]) -> Measured:
        """Every prompt to its first token."""
        assert self._engine is not None
        vocab_size = self._engine.model.vocab_size
        prompts = make_prompts(workload.params, vocab_size, workload.seed)
        source = random.Random(workload.seed + 1)
        batches = make_batches(prompts, packing, lambda: source.randrange(FIRST_TOKEN, vocab_size))
        before, began = self._engine.stats().computed_tokens, time.perf_counter()
        for batch in batches:
            self._run(self._engine, batch)
        seconds = time.perf_counter() - began
        num_computed, num_needed = self._engine.stats().computed_tokens - before, sum(map(len, prompts))
        return Measured(
            {
                "wall_ms": seconds * 1000,
                "needed_tokens_per_s": num_needed / seconds,
                "num_needed_tokens": num_needed,
                "computed_per_needed": num_computed / num_needed,
            }
        )

    def _run(self, engine: Engine, batch: Sequence[list[int]]) -> None:
        for prompt in batch:
            self._num_asked += 1
            engine.submit(Request(str(self._num_asked), tuple(prompt), Sampling(seed=0, max_tokens=1, temperature=0.0)))
        num_open = len(batch)
        while num_open:
            result = engine.step()
            assert not result.failures, result.failures
            num_open -= sum(delta.finish is not None for delta in result.deltas)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds=3)
    parser.add_argument("--model", default="models/target", help="a Hugging Face directory (default models/target)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (default 2)")
    args = parser.parse_args(arguments)
    options = read_options(args)
    config = WorkerConfig.model_validate(_config(args))
    bench = Bench(config, args.threads)
    num_prompts = QUICK_PROMPTS if options.quick else NUM_PROMPTS
    benchmark = Benchmark(
        "packing",
        [Workload(name, Prompts(lengths, num_prompts)) for name, lengths in DISTRIBUTIONS.items()],
        [_arm(packing, bench) for packing in PACKINGS],
        baseline="packed",
        config={"model": args.model, "dtype": args.dtype, "threads": args.threads, "batch": BATCH},
    )
    return harness.main(benchmark, options)


def _arm(packing: Packing, bench: Bench) -> Arm[Prompts]:
    return Arm(packing, lambda workload: bench.measure(packing, workload), setup=bench.setup)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"path": args.model, "dtype": args.dtype},
        "engine": {
            "kv": {"num_pages": 5120, "prefix_cache": False},
            "scheduler": {"max_running": BATCH, "step_tokens": 2048},
        },
    }


if __name__ == "__main__":
    sys.exit(main())
