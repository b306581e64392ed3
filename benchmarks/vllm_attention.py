"""What shared attention is worth in vLLM: decoding with vLLM's own attention, and with ours in its place.

    python -m benchmarks.vllm_attention                     # in .venv-vllm; every workload
    python -m benchmarks.vllm_attention --dtype float32 --tokens 128 --batch 64

Arms: `vllm` is vLLM with its own CPU attention, `shared` the same with worker.engine.vllm.attention = shared. Both are
eager, so that nothing is compiled while it is measured, and both have the prefix cached: a request computes its own
last tokens only. All requests of a workload come together and are decoded together.

decode_tokens_per_s counts while all requests decode: from when each has its first token until one has its last;
prompt_s is what came before. read_percent are the keys that attention read, of those that its rows see: the counted
work, which no machine changes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from vllm import LLM, SamplingParams

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from workers.engine.vllm.settings import SECTION, environment

BLOCK_SIZE: Final = 32
ARMS: Final = ("vllm", "shared")
STEP_TOKENS: Final = 8192
SHUTDOWN_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that come together."""

    batch: int
    num_shared: int  # tokens that all prompts begin with
    num_own: int
    num_new: int

    @property
    def num_blocks(self) -> int:
        own = -(-(self.num_own + self.num_new) // BLOCK_SIZE) + 1
        return self.num_shared // BLOCK_SIZE + self.batch * own


class Moment(NamedTuple):
    """When a step's tokens had come, and how many each request had by then."""

    time_s: float
    made: tuple[int, ...]


class EngineArm:
    """One vLLM engine with one of the two backends. Mutated only by the harness that calls it."""

    def __init__(self, attention: str, args: argparse.Namespace, most: Load) -> None:
        """`most`: as many blocks as this load needs, twice."""
        self._attention = attention
        self._args = args
        self._num_blocks = 2 * most.num_blocks
        self._context = most.num_shared + most.num_own + most.num_new + 1
        self._llm: LLM | None = None

    def set_up(self) -> None:
        args = self._args
        self._llm = LLM(
            model=str(args.model),
            dtype=args.dtype,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=self._context,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=self._num_blocks,
            kv_cache_memory_bytes=1 << 20,  # the number of blocks is given
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=args.batch,
            async_scheduling=False,
            worker_cls="benchmarks.vllm_attention_worker.AttentionWorker",
            additional_config={SECTION: {"attention": self._attention, "threads": args.threads}},
        )

    def tear_down(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)

    def measure(self, workload: Workload[Load]) -> Measured:
        load, draw = workload.params, np.random.default_rng(workload.seed)
        vocab_size = 4096 if self._llm is None else self._llm.model_config.get_vocab_size()

        def tokens(count: int) -> list[int]:
            drawn: list[int] = draw.integers(1, vocab_size, count).tolist()
            return drawn

        shared = tokens(load.num_shared)
        if shared:
            self._follow([shared], 1)
        before = self._counts()
        moments = self._follow([shared + tokens(load.num_own) for _ in range(load.batch)], load.num_new)
        return Measured(_times(moments, load) | _work(before, self._counts()))

    def _follow(self, prompts: Sequence[list[int]], num_new: int) -> list[Moment]:
        assert self._llm is not None, "measured before it was set up"
        engine = self._llm.llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        moments = [Moment(time.perf_counter(), (0,) * len(prompts))]
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        made = [0] * len(prompts)
        while engine.has_unfinished_requests():
            for output in engine.step():
                made[int(output.request_id)] = len(output.outputs[0].token_ids)
            moments.append(Moment(time.perf_counter(), tuple(made)))
        return moments

    def _counts(self) -> dict[str, int] | None:
        assert self._llm is not None, "counted before it was set up"
        counts: list[dict[str, int] | None] = self._llm.collective_rpc("attention_counts")
        return counts[0]


def _times(moments: Sequence[Moment], load: Load) -> dict[str, float]:
    begin = next(moment for moment in moments if min(moment.made) > 0)
    end = next(moment for moment in moments if max(moment.made) == load.num_new)
    return {
        "decode_tokens_per_s": (sum(end.made) - sum(begin.made)) / (end.time_s - begin.time_s),
        "prompt_s": begin.time_s - moments[0].time_s,
    }


def _work(before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> dict[str, float]:
    if before is None or after is None:
        return {}
    needed, read = (after[name] - before[name] for name in ("keys", "read_keys"))
    return {"read_percent": 100 * read / needed}


def workloads(args: argparse.Namespace) -> list[Workload[Load]]:
    """A short and a long prefix, and nothing in common."""
    num_new, own = args.tokens or (8 if args.quick else 64), 64
    sizes = {"shared 256": 256} if args.quick else {"shared 1K": 1024, "shared 4K": 4096}
    shared = [Workload(name, Load(args.batch, size, own, num_new)) for name, size in sizes.items()]
    return [*shared, Workload("distinct 512", Load(args.batch, 0, 512, num_new))]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_attention", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument("--model", type=Path, default=Path("models/target"), help="(default: the shipped one)")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="(default: one per core)")
    made.add_argument("--batch", type=positive, default=32, help="requests at once (default 32)")
    made.add_argument("--tokens", type=positive, help="new tokens of each request (default 64; 8 if quick)")
    add_options(made, rounds=5)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark; the exit code."""
    args = parser().parse_args(arguments)
    # A process of its own for each engine: one takes one backend only.
    os.environ.update({**environment(threads=args.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    loads = workloads(args)
    most = max((workload.params for workload in loads), key=lambda load: load.num_blocks)
    longest = max(load.params.num_shared + load.params.num_own for load in loads)
    room = Load(args.batch, longest, most.num_own, most.num_new)
    engines = {name: EngineArm(name, args, room) for name in ARMS}
    arms = [Arm(name, arm.measure, arm.set_up, arm.tear_down) for name, arm in engines.items()]
    config = {"model": str(args.model), "dtype": args.dtype, "threads": args.threads, "eager": True}
    return harness.main(Benchmark("vllm_attention", loads, arms, config=config), read_options(args))


if __name__ == "__main__":
    sys.exit(main())
